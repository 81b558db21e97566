"""Why an operation is refused: one enum in order of precedence, and the value that carries it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from peculium_server.core.limits import SECOND_US

if TYPE_CHECKING:
    from peculium_server.core.reuse import Reuse


class Refusal(IntEnum):
    """Reasons in order of precedence: if several apply, the lowest number is the answer.

    Numbers are those of the wire's `RefusalReason` and are never reused.
    """

    MALFORMED = 1
    TOO_LARGE = 2
    UNAUTHENTICATED = 3
    PERMISSION_DENIED = 4
    CAPABILITY_UNKNOWN = 5
    BUDGET_UNKNOWN = 6
    NOT_TOKEN_HELD = 7
    OPERATION_ID_REUSED = 8
    OPERATION_TOO_OLD = 9
    TOKEN_CONSUMED = 10
    TOKEN_ID_REUSED = 11
    DESCENDANT_UNKNOWN = 12
    HOLD_UNKNOWN = 13
    ID_TAKEN = 14
    NAME_TAKEN = 15
    NOT_FOR_ROOTS = 16
    ONLY_FOR_ROOTS = 17
    BUDGET_CLOSED = 18
    BUDGET_EXPIRED = 19
    BUDGET_FROZEN = 20
    TREE_OVERRUN = 21
    HOLD_ENDED = 22
    HOLD_LAPSED = 23
    NOT_DUE = 24
    TREE_TOO_DEEP = 25
    LIVE_HOLDS = 26
    OPEN_CHILDREN = 27
    BUDGET_EXHAUSTED = 28
    AMOUNT_OVERFLOW = 29
    BATCH_REFUSED = 30
    BUDGET_CHANGED = 31
    NOT_SEALED = 32
    KEY_UNKNOWN = 33
    KEY_ENDED = 34
    ALERT_UNKNOWN = 35
    WEBHOOK_UNKNOWN = 36
    TOO_MANY = 37
    WEBHOOKS_OFF = 38


class Rule(NamedTuple):
    """What is to be said about a reason, once, for the wire, the docs and people."""

    transient: bool
    """The same request could later succeed."""
    sentence: str
    """What happened and what to do, for people."""


RULES: dict[Refusal, Rule] = {
    Refusal.MALFORMED: Rule(
        transient=False, sentence="A field of the request is not as it has to be."
    ),
    Refusal.TOO_LARGE: Rule(
        transient=False, sentence="The request carries more than one request may."
    ),
    Refusal.UNAUTHENTICATED: Rule(transient=False, sentence="Credentials are missing or unknown."),
    Refusal.PERMISSION_DENIED: Rule(
        transient=False, sentence="The caller's role or key may not do this."
    ),
    Refusal.CAPABILITY_UNKNOWN: Rule(
        transient=False,
        sentence="No such capability: a wrong secret, an unknown budget, or another's.",
    ),
    Refusal.BUDGET_UNKNOWN: Rule(transient=False, sentence="There is no such budget."),
    Refusal.NOT_TOKEN_HELD: Rule(
        transient=False,
        sentence="The budget is held by its principal and has no token; use it by name.",
    ),
    Refusal.OPERATION_ID_REUSED: Rule(
        transient=False,
        sentence="The operation id was recorded with other content; make a new id for a new operation.",
    ),
    Refusal.OPERATION_TOO_OLD: Rule(
        transient=False,
        sentence="The operation was made too long ago, or by a clock that is off; make a new one.",
    ),
    Refusal.TOKEN_CONSUMED: Rule(
        transient=False,
        sentence="The token was consumed by an earlier operation; only the latest token is live.",
    ),
    Refusal.TOKEN_ID_REUSED: Rule(
        transient=False, sentence="A token to be produced was seen before; make a new secret."
    ),
    Refusal.DESCENDANT_UNKNOWN: Rule(
        transient=False, sentence="There is no such budget below this one."
    ),
    Refusal.HOLD_UNKNOWN: Rule(transient=False, sentence="The budget has no such hold."),
    Refusal.ID_TAKEN: Rule(transient=False, sentence="The id was used before; make a new one."),
    Refusal.NAME_TAKEN: Rule(
        transient=False, sentence="A sibling has or had this name; choose another."
    ),
    Refusal.NOT_FOR_ROOTS: Rule(
        transient=False, sentence="A root has no parent to return to; withdraw from it."
    ),
    Refusal.ONLY_FOR_ROOTS: Rule(
        transient=False, sentence="Money enters and leaves the ledger at roots only."
    ),
    Refusal.BUDGET_CLOSED: Rule(
        transient=False, sentence="The budget, or one above it, is closed."
    ),
    Refusal.BUDGET_EXPIRED: Rule(
        transient=False, sentence="The lease of the budget, or of one above it, has ended."
    ),
    Refusal.BUDGET_FROZEN: Rule(
        transient=True,
        sentence="The budget, one above it, or the whole ledger is frozen; an admin can say it may go on.",
    ),
    Refusal.TREE_OVERRUN: Rule(
        transient=True,
        sentence="The tree was billed beyond what it had; top the root up by at least its overrun.",
    ),
    Refusal.HOLD_ENDED: Rule(
        transient=False,
        sentence="The hold was settled or released; only an admin may resolve it now.",
    ),
    Refusal.HOLD_LAPSED: Rule(
        transient=False, sentence="The hold's time is over; it can be settled or released."
    ),
    Refusal.NOT_DUE: Rule(transient=True, sentence="Its time is not over yet."),
    Refusal.TREE_TOO_DEEP: Rule(transient=False, sentence="The tree would become too deep."),
    Refusal.LIVE_HOLDS: Rule(transient=True, sentence="Holds are live; end them, or cascade."),
    Refusal.OPEN_CHILDREN: Rule(
        transient=True, sentence="A child is open; return it first, or cascade."
    ),
    Refusal.BUDGET_EXHAUSTED: Rule(
        transient=True, sentence="Less is available than was asked for."
    ),
    Refusal.AMOUNT_OVERFLOW: Rule(transient=False, sentence="A balance would pass 2^62."),
    Refusal.BATCH_REFUSED: Rule(
        transient=True, sentence="Another operation of the atomic batch was refused."
    ),
    Refusal.BUDGET_CHANGED: Rule(
        transient=False,
        sentence="The budget has changed since it was looked at; look again.",
    ),
    Refusal.NOT_SEALED: Rule(
        transient=True, sentence="No checkpoint seals the entry yet; the next one may."
    ),
    Refusal.KEY_UNKNOWN: Rule(transient=False, sentence="There is no such API key."),
    Refusal.KEY_ENDED: Rule(
        transient=False, sentence="The API key was revoked or has expired; make a new one."
    ),
    Refusal.ALERT_UNKNOWN: Rule(
        transient=False, sentence="There is no such alert rule, or no such alert there."
    ),
    Refusal.WEBHOOK_UNKNOWN: Rule(
        transient=False, sentence="There is no such webhook, or it was deleted."
    ),
    Refusal.TOO_MANY: Rule(
        transient=True, sentence="There are as many as there may be; delete some first."
    ),
    Refusal.WEBHOOKS_OFF: Rule(
        transient=True,
        sentence="The server has no key to make webhooks' secrets of; its operator can give it one.",
    ),
}


@dataclass(frozen=True, slots=True)
class Refused:
    """A refusal and its facts. It has changed nothing."""

    reason: Refusal
    facts: dict[str, str]
    reuse: Reuse | None = None
    """What it is a sign of, beside what the caller is told."""

    @property
    def message(self) -> str:
        """The reason's sentence, with every fact behind it."""
        facts = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        sentence = RULES[self.reason].sentence
        return f"{sentence} ({facts})" if facts else sentence


def id_text(id_: bytes) -> str:
    """An id for people and machines: RFC 9562 text."""
    return str(UUID(bytes=id_))


def time_text(at: int) -> str:
    """A time for people and machines: RFC 3339 with microseconds."""
    seconds, microseconds = divmod(at, SECOND_US)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=microseconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
