"""What can go wrong below the rules, and the one translation of a database driver's errors to it.

    StoreError
    ├── StoreUnavailable   no answer: nothing was done, or it is unknown whether it was
    │   └── LedgerRestored the database has forgotten something: the ledger has another incarnation
    ├── StoreContended     other writers of the lane were in the way too often
    ├── SchemaOutdated     the database is at an older schema than this version was written for
    ├── ServerOutdated     the database is at a newer schema than this version can serve
    ├── SettingsUnsafe     the database could forget what it has committed
    ├── StatementRefused   a right that is missing, a table that is not there, or a bug
    └── LedgerCorrupt      a row that has to be there is not, or is not as it has to be

What these say is fit for callers. A driver's own text can carry connection settings and rows, so it
goes to the log only.
"""

from __future__ import annotations

import logging
import re

import psycopg

_logger = logging.getLogger(__name__)


class StoreError(Exception):
    """The ledger's database could not be used as asked."""


class StoreUnavailable(StoreError):
    """No answer can be had from the database just now; asking again later may help."""

    def __init__(self, problem: str, *, outcome_unknown: bool = False) -> None:
        super().__init__(problem)
        self.outcome_unknown = outcome_unknown
        """True: what was to be saved may have been, or not; replaying it tells. False: it was not."""


class LedgerRestored(StoreUnavailable):
    """The database has another incarnation of the ledger than the one that was opened; open it again."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"the ledger was restored to its past, or copied: {problem}")


class StoreContended(StoreError):
    """Transactions on a lane were aborted in favour of others each time; nothing was done."""

    def __init__(self, attempts: int) -> None:
        super().__init__(f"aborted in favour of other transactions {attempts} times")
        self.attempts = attempts


class SchemaOutdated(StoreError):
    """The database's schema is older than this version's; `peculium migrate` makes it current."""

    def __init__(self, found: str | None, expected: str) -> None:
        state = "has no schema" if found is None else f"is at schema {found}"
        super().__init__(
            f"the database {state}, this version needs {expected}: run peculium migrate"
        )
        self.found = found
        self.expected = expected


class ServerOutdated(StoreError):
    """The database's schema is newer than this version's, and lacks what this version uses."""

    def __init__(self, found: str, serves_from: str, own: str) -> None:
        super().__init__(
            f"the database is at schema {found}, which servers of schema {serves_from} or newer may"
            f" serve, and this version is of {own}: start a newer version"
        )
        self.found = found
        self.serves_from = serves_from
        self.own = own


class SettingsUnsafe(StoreError):
    """With these settings of the database a crash could lose or tear what was committed."""

    def __init__(self, settings: dict[str, str]) -> None:
        listed = ", ".join(f"{name} is {value}" for name, value in sorted(settings.items()))
        super().__init__(f"the database is not durable: {listed}")
        self.settings = settings
        """The offending settings, with their values."""


class StatementRefused(StoreError):
    """The database works, and refuses what it was asked: waiting does not help, an operator has to."""

    def __init__(self, state: str) -> None:
        super().__init__(f"the database refused a statement (SQLSTATE {state})")
        self.state = state
        """The SQLSTATE."""


class LedgerCorrupt(StoreError):
    """Rows contradict each other: tampering, a partial restore, or a bug. Nothing was done."""


_LOCK_NOT_AVAILABLE = "55P03"
_CONTENTION = frozenset({"40001", "40P01", _LOCK_NOT_AVAILABLE})
"""Serialization failure, deadlock, and a lock that was not had in time."""

_RESULT_AMBIGUOUS = "40003"
"""What CockroachDB says when it does not know whether a commit was done."""

_ENDS_THE_SESSION = frozenset({"FATAL", "PANIC"})

_UNIQUE_VIOLATION = "23505"
_OUR_TABLES = re.compile(
    r"(ledger|incarnations|lanes|roots|budgets|holds|entries|collections|refusals|checkpoints"
    r"|checkpoint_\w+?|key_acts"
    r"|alerts|alert_\w+?|webhooks|webhook_\w+?|security_events)(_\d+)?"
)
"""The tables and their partitions: a violation is reported of the partition."""

_OUT_OF_RESOURCES = "53"
_UNAVAILABLE = {
    "08": "the connection broke",
    "28": "it refuses these credentials",
    "3D": "it does not exist",
    _OUT_OF_RESOURCES: "it is out of resources: disk, memory or connections",
    "57": "it was shut down or ended the session, or a statement took too long",
    "58": "its system failed",
    # A standby refuses SERIALIZABLE and writes.
    "0A": "it is a standby",
    "25": "it is read-only, or ended the session",
    "40": "other transactions were in the way",
    _LOCK_NOT_AVAILABLE: "another session keeps what is needed locked",
}
"""By SQLSTATE, or its class."""

_CORRUPT = frozenset({"22003", "22012", "23502", "23514", "XX001", "XX002"})
"""A check that failed, those by division included, and pages or indexes that Postgres found broken."""


def is_contention(error: psycopg.Error) -> bool:
    """Say whether another transaction was in the way, so that repeating this one may help."""
    if error.sqlstate == _UNIQUE_VIOLATION:
        return _OUR_TABLES.fullmatch(error.diag.table_name or "") is not None
    return error.sqlstate in _CONTENTION


def is_lost(error: psycopg.Error) -> bool:
    """Say whether the connection is gone with the error, and with it the answer.

    Whatever ends the session counts: a server that panics over a commit, for want of disk say, may find
    that commit in its log when it recovers.
    """
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError)
    return (
        error.diag.severity_nonlocalized in _ENDS_THE_SESSION
        or error.sqlstate[:2] == "08"
        or error.sqlstate == _RESULT_AMBIGUOUS
    )


def is_starved(error: psycopg.Error) -> bool:
    """Say whether the database lacks disk or memory for what it was asked."""
    return (error.sqlstate or "")[:2] == _OUT_OF_RESOURCES


def translate(error: psycopg.Error, *, outcome_unknown: bool = False) -> StoreError:
    """The store's error for a driver's. The driver's own text goes to the log."""
    _logger.warning(
        "database error %s: %s (%s)",
        error.sqlstate or "without a code",
        error.diag.message_primary or error,
        error.diag.constraint_name or type(error).__name__,
    )
    state = error.sqlstate
    if state is None:
        problem = "the connection broke, or there is none to a primary"
        return StoreUnavailable(problem, outcome_unknown=outcome_unknown)
    if state in _CORRUPT:
        named = error.diag.constraint_name or error.diag.table_name or "a row was not as expected"
        return LedgerCorrupt(f"the database refused a change (SQLSTATE {state}): {named}")
    known = _UNAVAILABLE.get(state) or _UNAVAILABLE.get(state[:2])
    if known is None and not outcome_unknown and not is_lost(error):
        return StatementRefused(state)
    problem = f"the database cannot be used: {known or 'it gave up a statement'} (SQLSTATE {state})"
    return StoreUnavailable(problem, outcome_unknown=outcome_unknown)
