"""By what right: whose authority an operation names, and that every token is used linearly.

A budget that is held by token has one live token, a hold one until it ends. An operation consumes the
ones that it needs, each of which has to be the live one, and produces the next, which its budget has
never seen.
"""

from __future__ import annotations

from typing import Any, Final

from peculium_server.core.admission import ADMIN_KINDS, SYSTEM_KINDS
from peculium_server.core.encoding import BY_HOLDER, BY_ROLE, BY_TOKEN
from peculium_server.core.offline.fold import Folded
from peculium_server.core.offline.rules import Broken, Step
from peculium_server.core.operations import HOLD_OPERATIONS, SYSTEM, Kind
from peculium_server.core.state import Custody, Entry, Hold

_BY_HOLD: Final = frozenset(operation.kind for operation in HOLD_OPERATIONS)
"""Their token is the hold's."""
_NOT_BY_AGENTS: Final = ADMIN_KINDS | SYSTEM_KINDS
_BY_ROLE: Final = _NOT_BY_AGENTS | {Kind.RECOVER, Kind.RESOLVE}
"""The last two are by an admin too."""


def check_rights(steps: list[Step], asked: dict[str, Any], holds: dict[bytes, Hold]) -> None:
    """Check authority and tokens of an operation, and go on to its budget's next token."""
    first = steps[0]
    entry, budget = first.entry, first.budget
    kind, by = entry.kind, asked["authority"]
    _check_authority(entry, kind, budget, by)
    rotates = kind is Kind.RECOVER or (by == BY_TOKEN and kind not in _BY_HOLD)
    needed = _needed(kind, budget, by, asked, holds, rotates=rotates)
    if len(steps) == 1:
        consumed = entry.consumed
        if (needed != [consumed]) if consumed is not None else needed:
            raise Broken("token", _NOT_LIVE)
    else:
        _check_consumed(steps, budget, needed)
    if rotates:
        _rotate(entry, budget, asked, by)
    elif asked.get("next_token_id") is not None:
        raise Broken("token", "it may not produce a token")


def _check_consumed(steps: list[Step], budget: Folded, needed: list[bytes]) -> None:
    """Each of the first entries of the budget concerned consumes what is needed; no other one anything."""
    own = [step.entry.consumed for step in steps if step.budget is budget]
    told = [token for token in own if token is not None]
    if told != needed:
        index = next(
            (at for at, pair in enumerate(zip(told, needed, strict=False)) if pair[0] != pair[1]),
            min(len(told), len(needed), len(own) - 1),
        )
        raise Broken("token", _NOT_LIVE, index)
    for index, step in enumerate(steps):
        if step.budget is not budget and step.entry.consumed is not None:
            raise Broken("token", "only the budget concerned is operated on by token", index)


_NOT_LIVE: Final = "the token that it consumed is not the live one"


def _rotate(entry: Entry, budget: Folded, asked: dict[str, Any], by: int) -> None:
    """Go on to the budget's next token."""
    following = asked.get("next_token_id")
    if following is not None:
        produce(budget, following)
    elif by == BY_TOKEN and not (entry.kind is Kind.RETURN and asked.get("amount") is None):
        raise Broken("token", "it has to produce the next token")
    budget.token = following
    if entry.kind is Kind.ACCEPT:
        budget.holder = entry.principal
    elif by == BY_ROLE:
        budget.holder = asked.get("holder")
        budget.custody = Custody.PRINCIPAL if following is None else Custody.TOKEN


def produce(budget: Folded, token: bytes, part: int = 0) -> None:
    """Give a budget or one of its holds a token, which it has never seen."""
    if token in budget.seen:
        raise Broken("token", "the token that it produces was the budget's before", part)
    budget.seen.add(token)


def _check_authority(entry: Entry, kind: Kind, budget: Folded, by: int) -> None:
    if by == BY_ROLE:
        allowed = kind in _BY_ROLE
        if kind in SYSTEM_KINDS and entry.principal != SYSTEM.principal:
            allowed = False
    elif kind in _NOT_BY_AGENTS:
        allowed = False
    elif by == BY_HOLDER:
        allowed = budget.holder == entry.principal and kind not in _BY_HOLD
    else:
        allowed = kind in _BY_HOLD or budget.holder in (None, entry.principal)
    if not allowed:
        raise Broken("authority", f"{entry.principal} has no authority for it")


def _needed(
    kind: Kind,
    budget: Folded,
    by: int,
    asked: dict[str, Any],
    holds: dict[bytes, Hold],
    *,
    rotates: bool,
) -> list[bytes]:
    """The tokens that the operation has to consume, in the order of its entries."""
    needed: list[bytes] = []
    if rotates:
        if budget.token is not None:
            needed.append(budget.token)
        elif by == BY_TOKEN:
            raise Broken("token", "the budget has no live token")
    if kind in _BY_HOLD or kind is Kind.RESOLVE:
        hold = holds.get(asked.get("hold_id", b""))
        if hold is not None and hold.settleable:
            needed.append(hold.token)
        elif kind in _BY_HOLD:
            raise Broken("token", "the hold has no live token")
    for rotation in asked.get("holds", ()):
        hold = holds.get(rotation.hold_id)
        if hold is None or not hold.settleable:
            raise Broken("token", "a hold that it rotates has no live token")
        needed.append(hold.token)
    return needed
