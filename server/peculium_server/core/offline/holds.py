"""That what a budget has held, forfeited, spent and disputed is what its holds say, call by call."""

from __future__ import annotations

from operator import sub
from typing import Any, Final, NamedTuple

from peculium_server.core.offline.rights import produce
from peculium_server.core.offline.rules import Broken, Step
from peculium_server.core.operations import Kind
from peculium_server.core.state import Effect, Hold, HoldState, new

_HOLD_KINDS: Final = frozenset(
    {Kind.RESERVE, Kind.SETTLE, Kind.RELEASE, Kind.EXTEND, Kind.RESOLVE, Kind.LAPSE}
)
"""They concern a hold."""
_SAYS_AMOUNT: Final = frozenset(
    {Kind.GRANT, Kind.TOP_UP, Kind.WITHDRAW, Kind.RESERVE, Kind.SPEND, Kind.FUND}
)
_RETURNING: Final = frozenset({Kind.RETURN, Kind.REVOKE, Kind.EXPIRE, Kind.COLLECT})


class _Share(NamedTuple):
    """What a hold is in the sums of its budget."""

    held: int
    forfeited: int
    spent: int
    disputed: int
    disputes: int
    live: int


_NONE: Final = _Share(0, 0, 0, 0, 0, 0)


def _moved(was: Hold | None, now: Hold) -> _Share:
    """What an operation on a hold does to the sums of its budget."""
    share = _share(now)
    return share if was is None else new(_Share, map(sub, share, _share(was)))


def _share(hold: Hold) -> _Share:
    _, _, _, state, _, remaining, booked, disputed, _, _ = hold
    live = state is HoldState.LIVE
    forfeited = remaining if state is HoldState.LAPSED else 0
    disputes = 1 if state is HoldState.DISPUTED else 0
    return new(
        _Share, (remaining if live else 0, forfeited, booked, disputed, disputes, 1 if live else 0)
    )


def check_holds(
    steps: list[Step], before: list[Effect | None], asked: dict[str, Any], holds: dict[bytes, Hold]
) -> None:
    """Check what an operation says of holds, and its amount, and take the holds over.

    Args:
        steps: Its entries.
        before: The effect of the entry before of each one's budget.
        asked: The request.
        holds: Those of the tree; the ones concerned are changed.
    """
    first = steps[0]
    kind, amount = first.entry.kind, first.entry.amount
    was: Hold | None = None
    hold = first.effect.hold
    if kind in _HOLD_KINDS:
        hold_id = asked.get("hold_id")
        if hold is None or hold.hold_id != hold_id:
            raise Broken("hold", "it does not say what became of the hold that it names")
        was = holds.get(hold.hold_id)
        _check_hold(first, was, hold, asked)
        token = _token_of(first, was, hold, asked)
        holds[hold.hold_id] = new(Hold, (*hold[:2], token, *hold[3:]))
    elif hold is not None:
        raise Broken("hold", "it concerns no hold")
    _check_amount(first, was, hold, asked)
    moved = _NONE if hold is None else _moved(was, hold)
    if kind is Kind.SPEND:
        moved = _NONE._replace(spent=amount)
    for index, step in enumerate(steps):
        _check_share(index, step, before[index], moved if index == 0 else _NONE)
    if len(steps) > 1:
        _check_more(steps, asked, holds)


def _check_hold(step: Step, was: Hold | None, hold: Hold, asked: dict[str, Any]) -> None:
    """A hold is made by a Reserve and never made anew; it keeps its amount and is within it."""
    entry = step.entry
    _, _, _, state, amount, remaining, booked, disputed, created_at, expires_at = hold
    if entry.kind is Kind.RESERVE:
        made = (
            HoldState.LIVE,
            asked.get("amount"),
            amount,
            0,
            0,
            entry.at,
            entry.at + asked.get("ttl_us", 0),
        )
        if was is not None or made != (
            state,
            amount,
            remaining,
            booked,
            disputed,
            created_at,
            expires_at,
        ):
            raise Broken("hold", "it is not the new hold that was asked for")
        return
    if was is None or was.budget_id != entry.budget_id:
        raise Broken("hold", "the budget never had the hold")
    if was.amount != amount or was.created_at != created_at:
        raise Broken("hold", "the hold is another than it was")
    settleable = state in (HoldState.LIVE, HoldState.LAPSED)
    if (
        remaining > amount
        or (remaining and not settleable)
        or (disputed > 0) is not (state is HoldState.DISPUTED)
        or (entry.kind is not Kind.EXTEND and expires_at != was.expires_at)
    ):
        raise Broken("hold", "the hold contradicts itself")
    if entry.kind is Kind.LAPSE:
        fine = (
            was.state is HoldState.LIVE and state is HoldState.LAPSED and remaining == was.remaining
        )
    elif entry.kind is Kind.EXTEND:
        fine = (
            was.state is HoldState.LIVE and state is HoldState.LIVE and remaining == was.remaining
        )
    elif entry.kind is Kind.SETTLE and settleable:
        fine = (
            asked.get("keep_open", False)
            and was.state is HoldState.LIVE
            and state is HoldState.LIVE
        )
        fine = fine and remaining + booked == was.remaining + was.booked
    else:
        fine = not settleable
    if not fine:
        raise Broken("hold", f"a {was.state.name} hold does not become so by a {entry.kind.name}")


def _token_of(step: Step, was: Hold | None, hold: Hold, asked: dict[str, Any]) -> bytes:
    """The hold's token after the operation."""
    if was is None:
        token: bytes | None = asked.get("hold_token_id")
    elif hold.state is HoldState.LIVE and step.entry.kind is not Kind.LAPSE:
        token = asked.get("next_hold_token_id")
    else:
        return was.token
    if token is None:
        raise Broken("token", "it has to produce the hold's next token")
    produce(step.budget, token)
    return token


def _check_amount(step: Step, was: Hold | None, hold: Hold | None, asked: dict[str, Any]) -> None:
    """The headline amount is what was asked for, and what was recorded of the hold."""
    kind, amount = step.entry.kind, step.entry.amount
    recorded = 0
    if kind in _SAYS_AMOUNT:
        expected = asked.get("amount")
    elif kind is Kind.DELEGATE:
        expected = sum(child.amount for child in asked.get("children", ()))
    elif kind in _RETURNING:
        expected = step.effect.returned
        if asked.get("amount", expected) != expected:
            raise Broken("amount", "what was returned is not what was asked for")
    elif was is not None and hold is not None:
        recorded = hold.booked + hold.disputed
        if kind is Kind.RESOLVE:
            expected = asked.get("actual")
        else:
            recorded -= was.booked
            expected = was.remaining if kind in (Kind.RELEASE, Kind.LAPSE) else 0
            if kind is Kind.SETTLE:
                expected = asked.get("actual", was.remaining)
        booking = kind in (Kind.SETTLE, Kind.RESOLVE)
        if recorded != (amount if booking else 0):
            raise Broken("amount", f"{recorded} were recorded of the hold")
    else:
        expected = 0
    if amount != expected:
        raise Broken("amount", f"the amount has to be {expected}")


def _check_share(index: int, step: Step, before: Effect | None, moved: _Share) -> None:
    """What the budget has held, forfeited, spent and disputed changes by what its hold does."""
    changes, effect = step.effect.changes, step.effect
    told = (
        changes.held,
        changes.forfeited,
        changes.spent,
        effect.disputed - (0 if before is None else before.disputed),
        effect.disputes - (0 if before is None else before.disputes),
        effect.holds_live - (0 if before is None else before.holds_live),
    )
    if told != moved:
        name = next(n for n, a, b in zip(_Share._fields, told, moved, strict=True) if a != b)
        raise Broken("hold", f"what is {name} does not change as its holds do", index)


def _check_more(steps: list[Step], asked: dict[str, Any], holds: dict[bytes, Hold]) -> None:
    """Further entries on the budget concerned: of a Recover the holds rotated, of a Resolve its hold."""
    concerned = steps[0].budget
    rotations = asked.get("holds", ())
    own = [(index, step) for index, step in enumerate(steps) if step.budget is concerned][1:]
    for index, step in own:
        hold = step.effect.hold
        if any(step.effect.changes):
            raise Broken("changes", "money moves in the first entry only", index)
        if steps[0].entry.kind is Kind.RECOVER:
            number = index - 1
            was = holds.get(rotations[number].hold_id) if number < len(rotations) else None
            if was is None or hold is None or hold._replace(token=was.token) != was:
                raise Broken("hold", "it does not say the hold that it rotates", index)
            token = rotations[number].next_token_id
            produce(concerned, token, index)
            holds[was.hold_id] = was._replace(token=token)
        elif hold is None or hold != steps[0].effect.hold:
            raise Broken("hold", "it does not say the hold that the operation ends", index)
    for index, step in enumerate(steps):
        if step.budget is not concerned and step.effect.hold is not None:
            raise Broken("hold", "it concerns no hold", index)
