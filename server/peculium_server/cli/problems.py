"""What to say about an error, and the exit code that goes with it."""

from __future__ import annotations

from typing import Final, NamedTuple

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


def explain(error: Exception) -> Problem | None:
    """What is to be said about an error; None if it is a bug."""
    match error:
        case ConfigInvalid():
            return Problem(USAGE, tuple(error.problems))
        case KeysInvalid():
            return Problem(USAGE, tuple(f"{error.path}: {text}" for text in error.problems))
        case EmbeddedPostgresError() | CannotListen() | StoreError():
            return Problem(NO_ANSWER, (str(error),))
        case _:
            return None
