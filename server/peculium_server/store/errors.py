"""What can go wrong below the rules, and the one translation of a database driver's errors to it.

    StoreError
    ├── StoreUnavailable   no answer: nothing was done, or it is unknown whether it was
    ├── StoreContended     other writers of the lane were in the way too often
    ├── SchemaOutdated     the database is not at the schema that this version was written for
    ├── SettingsUnsafe     the database could forget what it has committed
    └── LedgerCorrupt      a row that has to be there is not, or is not as it has to be

What these say is fit for callers. A driver's own text can carry connection settings and rows, so it
goes to the log only.
"""

from __future__ import annotations


class StoreError(Exception):
    """The ledger's database could not be used as asked."""


class StoreUnavailable(StoreError):
    """No answer can be had from the database just now; asking again later may help."""

    def __init__(self, problem: str, *, outcome_unknown: bool = False) -> None:
        super().__init__(problem)
        self.outcome_unknown = outcome_unknown
        """True: what was to be saved may have been, or not; replaying it tells. False: it was not."""


class StoreContended(StoreError):
    """Transactions on a lane were aborted in favour of others each time; nothing was done."""

    def __init__(self, attempts: int) -> None:
        super().__init__(f"aborted in favour of other transactions {attempts} times")
        self.attempts = attempts


class SchemaOutdated(StoreError):
    """The database's schema is older or newer than this version; `peculium migrate` makes it current."""

    def __init__(self, found: str | None, expected: str) -> None:
        state = "has no schema" if found is None else f"is at schema {found}"
        super().__init__(
            f"the database {state}, this version needs {expected}: run peculium migrate"
        )
        self.found = found
        self.expected = expected


class SettingsUnsafe(StoreError):
    """With these settings of the database a crash could lose or tear what was committed."""

    def __init__(self, settings: dict[str, str]) -> None:
        listed = ", ".join(f"{name} is {value}" for name, value in sorted(settings.items()))
        super().__init__(f"the database is not durable: {listed}")
        self.settings = settings
        """The offending settings, with their values."""


class LedgerCorrupt(StoreError):
    """Rows contradict each other: tampering, a partial restore, or a bug. Nothing was done."""
