"""A hard, delegable, auditable spending limit for fleets of LLM agents: the client.

    with peculium.connect() as client:
        budget = client.open("acme/research")
        with budget.reserve(price.upper(prompt_tokens, 1000)) as hold:
            answer = call_the_provider()
            hold.settle(price.actual(answer.usage), reference=answer.id)

`peculium.aio` has the same for asyncio.
"""

from __future__ import annotations

from peculium import aio, errors
from peculium._config import Tls
from peculium._context import current, use
from peculium._sync_audit import Audit
from peculium.audit import (
    BudgetFilter,
    Delegation,
    EntryFilter,
    Movement,
    Reach,
    Statement,
    TokenStep,
    UsageGroup,
    UsageReport,
    Watched,
)
from peculium.capability import BudgetRef, Capability, Receiver
from peculium.client import Admin, Budget, Client, Hold, Resumed, connect
from peculium.errors import (
    BudgetClosed,
    BudgetExhausted,
    BudgetExpired,
    BudgetFrozen,
    BudgetHeld,
    CapabilityMoved,
    CapabilityUnknown,
    Invalid,
    JournalLocked,
    JournalUnreadable,
    LedgerUnavailable,
    LedgerWentBack,
    NotCopyable,
    OutcomeUnknown,
    PeculiumError,
    PriceUnknown,
    Refused,
    TokenConsumed,
    TreeOverrun,
    Unavailable,
)
from peculium.journal import Journal
from peculium.money import USD_NANOS, Price, PriceList, Usage, usd
from peculium.proofs import Checkpoint, Proof
from peculium.values import (
    FENCE,
    SKIP,
    Balances,
    BudgetInfo,
    BudgetState,
    Child,
    Custody,
    Delegated,
    EntryInfo,
    Finding,
    HoldInfo,
    HoldState,
    IfHeld,
    LedgerPosition,
    Receipt,
    Verification,
)

__all__ = [
    "FENCE",
    "SKIP",
    "USD_NANOS",
    "Admin",
    "Audit",
    "Balances",
    "Budget",
    "BudgetClosed",
    "BudgetExhausted",
    "BudgetExpired",
    "BudgetFilter",
    "BudgetFrozen",
    "BudgetHeld",
    "BudgetInfo",
    "BudgetRef",
    "BudgetState",
    "Capability",
    "CapabilityMoved",
    "CapabilityUnknown",
    "Checkpoint",
    "Child",
    "Client",
    "Custody",
    "Delegated",
    "Delegation",
    "EntryFilter",
    "EntryInfo",
    "Finding",
    "Hold",
    "HoldInfo",
    "HoldState",
    "IfHeld",
    "Invalid",
    "Journal",
    "JournalLocked",
    "JournalUnreadable",
    "LedgerPosition",
    "LedgerUnavailable",
    "LedgerWentBack",
    "Movement",
    "NotCopyable",
    "OutcomeUnknown",
    "PeculiumError",
    "Price",
    "PriceList",
    "PriceUnknown",
    "Proof",
    "Reach",
    "Receipt",
    "Receiver",
    "Refused",
    "Resumed",
    "Statement",
    "Tls",
    "TokenConsumed",
    "TokenStep",
    "TreeOverrun",
    "Unavailable",
    "Usage",
    "UsageGroup",
    "UsageReport",
    "Verification",
    "Watched",
    "aio",
    "connect",
    "current",
    "errors",
    "usd",
    "use",
]
