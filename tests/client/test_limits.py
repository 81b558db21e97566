"""The client repeats what it has to know of the ledger's bounds; here they are held together."""

from __future__ import annotations

import pytest

from peculium import _limits
from peculium._requests import SECRET_TEXT
from peculium_server.core import limits
from peculium_server.core.shape import _SECRET

SHARED = sorted(name for name in dir(_limits) if name.isupper() and hasattr(limits, name))


@pytest.mark.parametrize("name", SHARED)
def test_a_bound_is_the_ledgers(name: str) -> None:
    assert getattr(_limits, name) == getattr(limits, name)


def test_a_hold_may_live_as_long_as_the_ledger_lets_it() -> None:
    assert _limits.HOLD_TTL_US_MAX == limits.HOLD_AGE_US_MAX


def test_most_bounds_are_compared() -> None:
    assert len(SHARED) > 15


def test_what_no_text_may_have_in_it_is_the_same_for_client_and_ledger() -> None:
    assert SECRET_TEXT.pattern == _SECRET.pattern
