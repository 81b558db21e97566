"""No secret is written down anywhere, whatever is done with it: not in a log, a trace, an error, the database.

Each secret of a real server and of who calls it is looked for in every form, and sixteen bytes of one are
enough. What is planted on purpose is found in each of these places: else they would not have been looked at.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leaks.scene import Scene, play
from tests.system.world import METHODS

pytestmark = [pytest.mark.xdist_group("leaks"), pytest.mark.timeout(240)]

ENCRYPTED = {"journal"}
"""Nobody can find anything there, planted or not."""
REACHED = {
    *("UNAUTHENTICATED", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS"),
    *("FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE"),
}
"""How calls have to have ended for the tests to say anything."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    # Which whoever runs PostgreSQL may enter.
    folder = Path(tempfile.mkdtemp(prefix="peculium-leaks-"))
    folder.chmod(0o755)
    try:
        yield play(tmp_path_factory.mktemp("leaks"), folder / "data")
    finally:
        shutil.rmtree(folder)


def test_no_secret_is_written_down_anywhere(scene: Scene) -> None:
    assert len(scene.marks) > 100
    assert scene.leaks() == []


def test_what_is_planted_is_found_in_every_place(scene: Scene) -> None:
    assert scene.told() == scene.channels.keys() - ENCRYPTED


def test_every_method_that_the_server_has_was_called(scene: Scene) -> None:
    assert scene.served == set(METHODS)
    assert scene.driven >= scene.served
    assert scene.statuses >= REACHED


def test_auditors_are_shown_no_token_that_is_live(scene: Scene) -> None:
    for views in scene.channels["views for auditors"]:
        assert scene.live.found_in(views) == set()
        assert scene.consumed.found_in(views)


def test_a_server_that_crashes_leaves_no_image_of_its_memory(scene: Scene) -> None:
    assert scene.core_bytes == 0
