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
from peculium._sync_alerts import Alerts, Webhooks
from peculium._sync_audit import Audit
from peculium._sync_keys import Keys
from peculium.alerts import Alert, AlertKind, AlertRule, Delivery, DeliveryState, Webhook
from peculium.apikeys import ApiKey, KeyAct, KeyInfo, KeyState, NewKey, Role
from peculium.audit import (
    BudgetFilter,
    Delegation,
    EntryFilter,
    Movement,
    Reach,
    RefusalCount,
    SecurityEvent,
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
    "Alert",
    "AlertKind",
    "AlertRule",
    "Alerts",
    "ApiKey",
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
    "Delivery",
    "DeliveryState",
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
    "KeyAct",
    "KeyInfo",
    "KeyState",
    "Keys",
    "LedgerPosition",
    "LedgerUnavailable",
    "LedgerWentBack",
    "Movement",
    "NewKey",
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
    "RefusalCount",
    "Refused",
    "Resumed",
    "Role",
    "SecurityEvent",
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
    "Webhook",
    "Webhooks",
    "aio",
    "connect",
    "current",
    "errors",
    "usd",
    "use",
]
