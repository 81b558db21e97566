"""The two clients are one: what one can do the other can, and says it in the same words."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peculium import _aio_sender, _sync_sender, aio, client

CLASSES = ["Client", "Budget", "Hold", "Admin", "Audit"]
SPECIAL = {"__aenter__": "__enter__", "__aexit__": "__exit__"}
TOOL = Path(__file__).parents[2] / "tools" / "sync_client.py"


def members(cls: type) -> dict[str, Any]:
    """What a class offers, under the names of the blocking client."""
    return {
        SPECIAL.get(name, name): getattr(cls, name)
        for name in dir(cls)
        if name in SPECIAL or name in SPECIAL.values() or not name.startswith("_")
    }


def verbs() -> list[tuple[str, Any, Any]]:
    pairs = [("connect", aio.connect, client.connect)]
    for name in CLASSES:
        ours, theirs = members(getattr(aio, name)), members(getattr(client, name))
        pairs += [(f"{name}.{each}", ours[each], theirs[each]) for each in ours if each in theirs]
    return pairs


@pytest.mark.parametrize("name", CLASSES)
def test_both_clients_have_the_same_members(name: str) -> None:
    assert members(getattr(aio, name)).keys() == members(getattr(client, name)).keys()


@pytest.mark.parametrize(
    ("one", "other"), [pair[1:] for pair in verbs()], ids=[pair[0] for pair in verbs()]
)
def test_a_verb_has_the_same_parameters_and_words(one: Any, other: Any) -> None:
    assert inspect.getdoc(one) == inspect.getdoc(other)
    assert inspect.getdoc(one)
    if callable(one):
        ours, theirs = inspect.signature(one), inspect.signature(other)
        assert list(ours.parameters.values()) == list(theirs.parameters.values())


@pytest.mark.parametrize("name", ["Budget", "Admin", "Audit", "Client"])
def test_every_verb_takes_a_timeout_by_keyword(name: str) -> None:
    without = {"close", "receiver", "ref", "moved", "admin", "audit"}
    for verb, member in members(getattr(client, name)).items():
        if verb in without or verb.startswith("__"):
            continue
        timeout = inspect.signature(member).parameters["timeout"]
        assert timeout.kind is inspect.Parameter.KEYWORD_ONLY
        assert timeout.default is None


def test_both_senders_offer_what_the_verbs_need() -> None:
    ours, theirs = members(_aio_sender.Sender), members(_sync_sender.Sender)
    assert ours.keys() == theirs.keys()
    for name, member in ours.items():
        if callable(member):
            ours_takes = list(inspect.signature(member).parameters)
            assert ours_takes == list(inspect.signature(theirs[name]).parameters), name


def test_the_blocking_client_is_what_the_other_one_generates() -> None:
    tool = loaded(TOOL)
    for module in tool.MODULES:
        assert module.target.read_text() == tool.generated(module)


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
