"""What to say about an error, and the exit code that goes with it."""

from __future__ import annotations

from typing import Final, NamedTuple

from peculium.errors import Invalid, PeculiumError, Refused, Unavailable
from peculium_server.archive.files import ExportUnreadable
from peculium_server.config import CannotListen, ConfigInvalid
from peculium_server.reconcile.problems import BillInvalid

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
        case BillInvalid() | ExportUnreadable():
            return Problem(REFUSED if isinstance(error, ExportUnreadable) else USAGE, (str(error),))
        case Refused():
            return Problem(REFUSED, _told(error))
        case Invalid():
            return Problem(USAGE, _told(error))
        case Unavailable():
            return Problem(NO_ANSWER, _told(error))
        case _:
            return _of_server(error)


def _of_server(error: Exception) -> Problem | None:
    """What keeps a server from running; its modules take longer to import than a client's call."""
    from peculium_server.bootstrap import BootstrapRefused  # noqa: PLC0415 - see above
    from peculium_server.embedded import EmbeddedPostgresError  # noqa: PLC0415
    from peculium_server.keyfile import KeysInvalid  # noqa: PLC0415
    from peculium_server.rpc.tls import TlsInvalid  # noqa: PLC0415
    from peculium_server.signing import SigningKeyInvalid  # noqa: PLC0415
    from peculium_server.store.errors import StoreError  # noqa: PLC0415
    from peculium_server.webhooks.keys import WebhookKeysInvalid  # noqa: PLC0415

    match error:
        case KeysInvalid():
            return Problem(USAGE, tuple(f"{error.path}: {problem}" for problem in error.problems))
        case BootstrapRefused() | SigningKeyInvalid() | TlsInvalid() | WebhookKeysInvalid():
            return Problem(USAGE, (str(error),))
        case EmbeddedPostgresError() | CannotListen() | StoreError():
            return Problem(NO_ANSWER, (str(error),))
        case _:
            return None


def _told(error: PeculiumError) -> tuple[str, ...]:
    """What happened, to which budget, and what to do."""
    lines = [str(error)]
    lines += getattr(error, "__notes__", [])
    if error.remedy:
        lines.append(f"what helps: {error.remedy.replace('_', ' ')}")
    return tuple(lines)
