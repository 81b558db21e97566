from __future__ import annotations

from pathlib import Path

import pytest

from peculium_server.core.refusals import Refusal
from tools import reference

PAGES = reference.pages()


@pytest.mark.parametrize("path", PAGES)
def test_a_page_tells_what_the_code_does(path: Path) -> None:
    written = (reference.ROOT / path).read_text(encoding="utf-8")
    assert written == PAGES[path], "run tools/reference.py and commit what it writes"


def test_every_refusal_is_told_in_order_of_precedence_with_an_example() -> None:
    told = list(reference.reasons("RefusalReason", "REFUSAL_REASON_"))
    assert [reason.name for reason in told] == [refusal.name for refusal in Refusal]
    assert all(isinstance(reason.example, dict) for reason in told)
