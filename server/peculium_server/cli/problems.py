"""What to say about an error, and the exit code that goes with it."""

from __future__ import annotations

from typing import Final, NamedTuple

from peculium.errors import Invalid, PeculiumError, Refused, Unavailable
from peculium_server.config import ConfigInvalid
from peculium_server.embedded import EmbeddedPostgresError
from peculium_server.identity import KeysInvalid
from peculium_server.rpc.server import CannotListen
from peculium_server.store.errors import StoreError

REFUSED: Final = 1
"""The ledger said no, or does not verify."""
USAGE: Final = 2
NO_ANSWER: Final = 3
"""A server or database cannot be reached, or not be relied upon."""


class Problem(NamedTuple):
    """An error as it is told to people."""

    exit_code: int
    lines: tuple[str, ...]


_EXIT_CODES: Final[tuple[tuple[type[Exception], int], ...]] = (
    (ConfigInvalid, USAGE),
    (KeysInvalid, USAGE),
    (EmbeddedPostgresError, NO_ANSWER),
    (CannotListen, NO_ANSWER),
    (StoreError, NO_ANSWER),
    (Refused, REFUSED),
    (Invalid, USAGE),
    (Unavailable, NO_ANSWER),
)


def explain(error: Exception) -> Problem | None:
    """What is to be said about an error; None if it is a bug."""
    for kind, exit_code in _EXIT_CODES:
        if isinstance(error, kind):
            return Problem(exit_code, _lines(error))
    return None


def _lines(error: Exception) -> tuple[str, ...]:
    match error:
        case ConfigInvalid():
            return tuple(error.problems)
        case KeysInvalid():
            return tuple(f"{error.path}: {problem}" for problem in error.problems)
        case PeculiumError():
            return _told(error)
        case _:
            return (str(error),)


def _told(error: PeculiumError) -> tuple[str, ...]:
    """What happened, to which budget, and what to do."""
    lines = [str(error)]
    if error.remedy:
        lines.append(f"what helps: {error.remedy.replace('_', ' ')}")
    return tuple(lines)
