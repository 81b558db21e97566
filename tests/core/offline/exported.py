"""A ledger of the core's tests as it is exported, and what an offline verification finds in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from peculium_server.core.offline.export import ExportAudit
from peculium_server.core.offline.records import BudgetRow, Counts, Header, HoldRow, digest_of
from peculium_server.core.state import Budget, Entry, Hold
from peculium_server.core.verify import Finding
from peculium_server.signing import is_signed
from tests.core.ledger import Ledger
from tests.core.tampering import ENTRY_COLUMNS, alter_one

_EXPORTED = [name for name in ENTRY_COLUMNS if name != "previous_hash"]
"""What a hash follows is not told again."""


def budget_row(budget: Budget) -> BudgetRow:
    """A budget as it is exported: without its token."""
    return BudgetRow(budget._replace(token=None), digest_of(budget.token))


def hold_row(root_id: bytes, hold: Hold) -> HoldRow:
    """A hold as it is exported: without its token."""
    digest = digest_of(hold.token)
    assert digest is not None
    return HoldRow(root_id, hold._replace(token=b""), digest)


class Exported(NamedTuple):
    """What an export has. Its ledger has one lane."""

    header: Header
    entries: Sequence[Entry]
    budgets: Sequence[Budget]
    holds: Sequence[tuple[bytes, Hold]]
    """Each with its root."""

    @classmethod
    def of(cls, ledger: Ledger) -> Exported:
        """Export all of a ledger."""
        return cls(
            Header(1, bytes(16), ledger.now, (ledger.position,), None),
            tuple(ledger.journal),
            tuple(budget for tree in ledger.trees.values() for budget in tree.known_budgets()),
            tuple(
                (root, hold) for root, tree in ledger.trees.items() for hold in tree.known_holds()
            ),
        )

    def tampered(self, seed: int) -> Exported:
        """The same with one column of one entry altered, both chosen by a seed."""
        entries = list(self.entries)
        alter_one(entries, _EXPORTED, seed)
        return self._replace(entries=entries)

    def findings(self, *, decide: bool = False) -> list[Finding]:
        """What an offline verification finds."""
        audit = ExportAudit(public_keys=None, is_signed=is_signed, decide=decide)
        audit.header(self.header)
        for entry in self.entries:
            audit.entry(entry, 0)
        for budget in self.budgets:
            audit.budget(*budget_row(budget))
        for root_id, hold in self.holds:
            audit.hold(*hold_row(root_id, hold))
        audit.trailer(Counts(len(self.entries), len(self.budgets), len(self.holds), 0))
        return audit.finish()
