"""What can go wrong, as a tree with three branches.

    PeculiumError
    ├── Refused                     the ledger said no; nothing has changed
    │   ├── CapabilityUnknown       a wrong secret, an unknown budget, or another's
    │   ├── BudgetUnknown
    │   ├── NotTokenHeld            the budget is held by its principal
    │   ├── OperationTooOld         sent too late, or by a clock that is off
    │   ├── TokenConsumed           .consumed_by .consumed_at .fenced_by
    │   ├── DescendantUnknown
    │   ├── HoldUnknown
    │   ├── NameTaken               .name
    │   ├── NotForRoots
    │   ├── OnlyForRoots
    │   ├── BudgetClosed
    │   ├── BudgetExpired
    │   ├── BudgetFrozen            .by
    │   ├── TreeOverrun             .overrun
    │   ├── HoldEnded
    │   ├── HoldLapsed
    │   ├── NotDue
    │   ├── TreeTooDeep
    │   ├── LiveHolds               .holds_live .held
    │   ├── OpenChildren            .child
    │   ├── BudgetExhausted         .available .held .requested
    │   ├── AmountOverflow
    │   ├── BatchRefused
    │   ├── BudgetChanged           it is not as it was when it was looked at
    │   ├── NotSealed               no checkpoint seals the entry yet
    │   ├── KeyUnknown
    │   ├── KeyEnded                .revoked_by
    │   ├── AlertUnknown
    │   ├── WebhookUnknown
    │   ├── TooMany                 alert rules or webhooks; .limit
    │   ├── WebhooksOff             the server has no key to make their secrets of
    │   └── BudgetHeld              .used_at .holds_live
    ├── Invalid                     the caller's mistake, whoever noticed it; nothing has changed
    │   ├── Malformed               .field .problem
    │   ├── TooLarge
    │   ├── Unauthenticated
    │   ├── PermissionDenied
    │   ├── OperationIdReused
    │   ├── TokenIdReused
    │   ├── IdTaken
    │   ├── NotSupported            this ledger does not do that
    │   ├── CapabilityMoved         the handle's authority is not there any more
    │   ├── NotCopyable             (a TypeError, too)
    │   ├── PriceUnknown            (a LookupError, too)
    │   ├── InsecureCredentials     an API key would travel in clear text
    │   ├── NoCurrentBudget         (a LookupError, too)
    │   ├── JournalLocked
    │   └── JournalUnreadable
    └── Unavailable                 no answer that holds: no permission to spend
        ├── LedgerUnavailable       nothing was done
        ├── DeadlineExceeded        nothing was done: the time ran out first
        ├── OutcomeUnknown          it may have been done
        └── LedgerWentBack          it forgot what it acknowledged; .lane .seen .told

Every error has `budget` (path or id), `operation_id`, `remedy` and `facts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, ClassVar, Self


class PeculiumError(Exception):
    """Everything that this package raises on purpose."""

    advice: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        budget: str | None = None,
        operation_id: str | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.budget = budget
        """The budget concerned: its path if known here, otherwise its id."""
        self.operation_id = operation_id
        """The id of the operation, as the ledger's entries and logs name it."""
        self.facts: Mapping[str, str] = MappingProxyType(dict(facts or {}))
        """What the ledger said beside the reason."""

    @property
    def remedy(self) -> str:
        """What would help, for example "wait_for_holds" or "top_up"; empty if nothing is known."""
        return self.facts.get("remedy", self.advice)

    def __str__(self) -> str:
        details = {"budget": self.budget, "operation": self.operation_id}
        shown = ", ".join(
            f"{name} {value}"
            for name, value in details.items()
            if value and value not in self.message
        )
        return f"{self.message} [{shown}]" if shown else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        state = (self.message, self.budget, self.operation_id, dict(self.facts))
        return _rebuilt, (type(self), *state)

    @classmethod
    def _new(
        cls, message: str, budget: str | None, operation_id: str | None, facts: Mapping[str, str]
    ) -> Self:
        return cls(message, budget=budget, operation_id=operation_id, facts=facts)

    def concerning(self, budget: str | None, operation_id: str | None) -> Self:
        """The same error, told of one budget and operation."""
        return self._new(
            self.message, budget or self.budget, operation_id or self.operation_id, self.facts
        )

    def _number(self, name: str) -> int:
        text = self.facts.get(name, "")
        return int(text) if text.lstrip("-").isdecimal() else 0


def _rebuilt(
    cls: type[PeculiumError],
    message: str,
    budget: str | None,
    operation_id: str | None,
    facts: Mapping[str, str],
) -> PeculiumError:
    return cls._new(message, budget, operation_id, facts)


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


# --- refused ---


class Refused(PeculiumError):
    """The ledger said no. Nothing has changed, and no token was consumed."""

    reason: ClassVar[str] = ""
    """The name of the refusal on the wire."""


class CapabilityUnknown(Refused):
    """A wrong secret, an unknown budget, or another's budget: one answer for all three."""

    reason = "CAPABILITY_UNKNOWN"
    advice = "check the capability, the path and the credentials"


class BudgetUnknown(Refused):
    """There is no such budget."""

    reason = "BUDGET_UNKNOWN"
    advice = "check the path"


class NotTokenHeld(Refused):
    """The budget is held by its principal and has no token: open it by its path."""

    reason = "NOT_TOKEN_HELD"
    advice = "open it by its path"


class OperationTooOld(Refused):
    """The operation was made too long ago, or by a clock that is off."""

    reason = "OPERATION_TOO_OLD"
    advice = "compare this machine's clock with the ledger's, which is its database's"

    @property
    def age_seconds(self) -> int:
        """How old the operation is by the ledger's clock; below zero if it was made by one ahead of it."""
        return self._number("age_seconds")

    @property
    def limit_seconds(self) -> int:
        """How old it may be."""
        return self._number("limit_seconds")


class TokenConsumed(Refused):
    """The token was consumed by another operation: this handle is not the owner any more."""

    reason = "TOKEN_CONSUMED"
    advice = "whoever consumed it owns the budget; recover it if it should be yours"

    @property
    def consumed_by(self) -> str:
        """The id of the operation that consumed it."""
        return self.facts.get("consumed_by", "")

    @property
    def consumed_at(self) -> datetime | None:
        """When, by the ledger's clock."""
        return _time(self.facts.get("consumed_at", ""))

    @property
    def fenced_by(self) -> str | None:
        """The principal that recovered the budget, if that is how it was lost."""
        return self.facts.get("fenced_by")


class DescendantUnknown(Refused):
    """There is no such budget below this one."""

    reason = "DESCENDANT_UNKNOWN"


class HoldUnknown(Refused):
    """The budget has no such hold."""

    reason = "HOLD_UNKNOWN"


class NameTaken(Refused):
    """A sibling has or had the name."""

    reason = "NAME_TAKEN"
    advice = "choose another name"

    @property
    def name(self) -> str:
        """The name."""
        return self.facts.get("name", "")


class NotForRoots(Refused):
    """A root has no parent to return to."""

    reason = "NOT_FOR_ROOTS"
    advice = "an admin can withdraw"


class OnlyForRoots(Refused):
    """Money enters and leaves the ledger at roots only."""

    reason = "ONLY_FOR_ROOTS"
    advice = "fund it or give it back instead"


class BudgetClosed(Refused):
    """The budget, or one above it, was returned, revoked or expired, for good."""

    reason = "BUDGET_CLOSED"


class BudgetExpired(Refused):
    """The lease of the budget, or of one above it, has ended."""

    reason = "BUDGET_EXPIRED"


class BudgetFrozen(Refused):
    """The budget, or one above it, is frozen by an admin or by a dispute, or the ledger by a restore."""

    reason = "BUDGET_FROZEN"
    advice = "an admin can unfreeze it, or resolve the dispute"

    @property
    def by(self) -> str:
        """What froze it: "admin", "dispute" or "restore"."""
        return self.facts.get("by", "")


class TreeOverrun(Refused):
    """The tree's root was billed beyond what it had."""

    reason = "TREE_OVERRUN"
    advice = "top_up"

    @property
    def overrun(self) -> int:
        """By how much, in the tree's unit; a top-up of at least that helps."""
        return self._number("overrun")


class HoldEnded(Refused):
    """The hold was settled or released before; only an admin may resolve it now."""

    reason = "HOLD_ENDED"


class HoldLapsed(Refused):
    """The hold's time is over: it can be settled or released, but not prolonged."""

    reason = "HOLD_LAPSED"


class NotDue(Refused):
    """The lease or the hold's time is not over yet."""

    reason = "NOT_DUE"


class TreeTooDeep(Refused):
    """The tree would become deeper than the ledger allows."""

    reason = "TREE_TOO_DEEP"


class LiveHolds(Refused):
    """The budget has live holds, so that it cannot be given back whole."""

    reason = "LIVE_HOLDS"
    advice = "end them, or cascade"

    @property
    def holds_live(self) -> int:
        """How many."""
        return self._number("holds_live")

    @property
    def held(self) -> int:
        """How much is in them, in the tree's unit."""
        return self._number("held")


class OpenChildren(Refused):
    """The budget has an open child, so that it cannot be given back whole."""

    reason = "OPEN_CHILDREN"
    advice = "give the child back first, or cascade"

    @property
    def child(self) -> str:
        """The id of one of them."""
        return self.facts.get("child", "")


class BudgetExhausted(Refused):
    """Less is available than was asked for."""

    reason = "BUDGET_EXHAUSTED"

    @property
    def available(self) -> int:
        """What is free, in the tree's unit."""
        return self._number("available")

    @property
    def held(self) -> int:
        """What is in live holds and may come free, in the tree's unit."""
        return self._number("held")

    @property
    def requested(self) -> int:
        """What was asked for, in the tree's unit."""
        return self._number("requested")


class AmountOverflow(Refused):
    """A balance would pass 2^62."""

    reason = "AMOUNT_OVERFLOW"


class BatchRefused(Refused):
    """Another operation of the atomic batch was refused."""

    reason = "BATCH_REFUSED"


class BudgetChanged(Refused):
    """The budget is not as it was when it was looked at."""

    reason = "BUDGET_CHANGED"
    advice = "look again"


class NotSealed(Refused):
    """No checkpoint seals the entry yet."""

    reason = "NOT_SEALED"
    advice = "ask again after the next checkpoint"

    @property
    def sealed_seq(self) -> int:
        """The budget's last entry that is sealed; 0 if none is."""
        return self._number("sealed_seq")


class KeyUnknown(Refused):
    """There is no such API key."""

    reason = "KEY_UNKNOWN"


class KeyEnded(Refused):
    """The API key was revoked, or has expired."""

    reason = "KEY_ENDED"
    advice = "make a new key"

    @property
    def revoked_by(self) -> str | None:
        """Who has revoked it; None if it has expired."""
        return self.facts.get("revoked_by")


class AlertUnknown(Refused):
    """There is no such alert rule, or no such alert at the webhook."""

    reason = "ALERT_UNKNOWN"


class WebhookUnknown(Refused):
    """There is no such webhook, or it was deleted."""

    reason = "WEBHOOK_UNKNOWN"


class TooMany(Refused):
    """There are as many alert rules or webhooks as there may be."""

    reason = "TOO_MANY"
    advice = "delete some that are not needed"

    @property
    def limit(self) -> int:
        """How many there may be."""
        return self._number("limit")


class WebhooksOff(Refused):
    """The server has no key to make webhooks' secrets of."""

    reason = "WEBHOOKS_OFF"
    advice = "have its operator set webhook_key_file"


class BudgetHeld(Refused):
    """Somebody else holds the budget, and it was to be claimed only if nobody does."""

    advice = "leave the job to whoever works on it; or claim it with FENCE"

    @property
    def used_at(self) -> datetime | None:
        """When its token was last used, by the ledger's clock."""
        return _time(self.facts.get("used_at", ""))

    @property
    def holds_live(self) -> int:
        """How many of its holds are live."""
        return self._number("holds_live")


# --- invalid ---


class Invalid(PeculiumError):
    """The caller's mistake, noticed here or by the ledger. Nothing has changed."""

    reason: ClassVar[str] = ""
    """The name of the refusal on the wire, if the ledger can notice it."""


class Malformed(Invalid, ValueError):
    """An argument is missing, has the wrong form or range, or contradicts another one."""

    reason = "MALFORMED"

    @property
    def field(self) -> str:
        """Which one."""
        return self.facts.get("field", "")

    @property
    def problem(self) -> str:
        """What is wrong with it."""
        return self.facts.get("problem", "")


class TooLarge(Invalid, ValueError):
    """More than one request may carry."""

    reason = "TOO_LARGE"


class Unauthenticated(Invalid):
    """No credentials, or credentials that nobody has."""

    reason = "UNAUTHENTICATED"
    advice = "pass the api_key of a principal that the ledger knows"


class PermissionDenied(Invalid):
    """The caller's role or key may not do this."""

    reason = "PERMISSION_DENIED"


class OperationIdReused(Invalid):
    """The operation id was recorded with other content."""

    reason = "OPERATION_ID_REUSED"


class TokenIdReused(Invalid):
    """A token to be produced was seen before."""

    reason = "TOKEN_ID_REUSED"
    advice = "a receiver's token id serves once: take a new receiver"


class IdTaken(Invalid):
    """An id was used before: a budget's or hold's, or a rule's or webhook's with other content."""

    reason = "ID_TAKEN"


class NotSupported(Invalid):
    """This ledger does not do that."""


class CapabilityMoved(Invalid):
    """The authority is not in this handle any more: it was handed over, used up or left behind.

    Raised before anything is sent. The message names where that happened.
    """


class NotCopyable(Invalid, TypeError):
    """Authority to spend exists once: it can be moved, but not copied or pickled."""

    advice = "a BudgetRef has no authority and can be copied; a Capability can be handed over"


class PriceUnknown(Invalid, LookupError):
    """No price is known for what is to be paid. It is never taken to be zero."""


class InsecureCredentials(Invalid):
    """An API key would travel in clear text beyond this machine."""

    advice = "use TLS, or allow it explicitly"


class NoCurrentBudget(Invalid, LookupError):
    """No budget is in use in this context."""

    advice = "enter `with peculium.use(budget)` first"


class JournalLocked(Invalid):
    """Another process, or another client of this one, has the journal."""

    advice = "one journal for each client; end the process that has it"


class JournalUnreadable(Invalid):
    """The journal's key is another one, the file was changed, or others may read it."""

    advice = "check the key and the file's owner and mode; recover budgets by their holder's word"


# --- unavailable ---


class Unavailable(PeculiumError):
    """There was no answer from the ledger that holds. No answer is no permission to spend."""

    advice = "try again later"


class LedgerUnavailable(Unavailable):
    """The ledger could not be reached or did not take the operation. Nothing was done."""


class DeadlineExceeded(Unavailable):
    """The time ran out before the operation could be sent. Nothing was done."""


class OutcomeUnknown(Unavailable):
    """The operation may have been done: it was sent, and no answer came in time.

    The next verb on the same handle finds out first, by sending the same operation again. A hold
    that nobody waits for any more is released once it is found; a child budget whose capability
    nobody got is revoked.
    """

    advice = "the next verb on the same handle finds out what happened"


class LedgerWentBack(Unavailable):
    """The ledger knows less than it told before: it was restored to its past, or lags behind.

    What it acknowledged since may be lost, and the operation that noticed may have been done or not.
    The client asks it for nothing more: every later verb raises this, too. Trying again does not help.
    """

    advice = "have an operator find out which ledger is the right one, then make a new client"

    @property
    def lane(self) -> int:
        """The lane in which it was noticed."""
        return self._number("lane")

    @property
    def seen(self) -> int:
        """How many operations the lane was told to have, before the question was asked."""
        return self._number("seen")

    @property
    def told(self) -> int:
        """How many it was told to have in the answer."""
        return self._number("told")


def _leaves(branch: type[Refused | Invalid]) -> dict[str, type[Refused | Invalid]]:
    return {leaf.reason: leaf for leaf in branch.__subclasses__() if leaf.reason}


BY_REASON: Mapping[str, type[Refused | Invalid]] = MappingProxyType(
    {**_leaves(Refused), **_leaves(Invalid)}
)
"""The class of each reason, by its name on the wire without the prefix."""
