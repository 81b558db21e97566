"""That what a budget has held, forfeited, spent and disputed is what its holds say, call by call."""

from __future__ import annotations

from typing import Any, Final

from peculium_server.core.offline.rights import produce
from peculium_server.core.offline.rules import Broken, Step
from peculium_server.core.operations import Kind
from peculium_server.core.state import Hold, HoldState, new

_HOLD_KINDS: Final = frozenset(
    {Kind.RESERVE, Kind.SETTLE, Kind.RELEASE, Kind.EXTEND, Kind.RESOLVE, Kind.LAPSE}
)
"""They concern a hold."""
_SAYS_AMOUNT: Final = frozenset(
    {Kind.GRANT, Kind.TOP_UP, Kind.WITHDRAW, Kind.RESERVE, Kind.SPEND, Kind.FUND}
)
_RETURNING: Final = frozenset({Kind.RETURN, Kind.REVOKE, Kind.EXPIRE, Kind.COLLECT})


_LIVE: Final = HoldState.LIVE
_TOKEN: Final = Hold._fields.index("token")

_Share = tuple[int, int, int, int, int, int]
"""What a hold is in the sums of its budget, in the order of `_SUMS`."""
_SUMS: Final = ("held", "forfeited", "spent", "disputed", "disputes", "live")
_NONE: Final[_Share] = (0, 0, 0, 0, 0, 0)


def _moved(was: Hold | None, now: Hold) -> _Share:
    """What an operation on a hold does to the sums of its budget."""
    if was is None:
        return _share(now)
    held, forfeited, spent, disputed, disputes, live = _share(now)
    held_before, forfeited_before, spent_before, disputed_before, disputes_before, live_before = (
        _share(was)
    )
    return (
        held - held_before,
        forfeited - forfeited_before,
        spent - spent_before,
        disputed - disputed_before,
        disputes - disputes_before,
        live - live_before,
    )


def _share(hold: Hold) -> _Share:
    state, _, remaining, booked, disputed = hold[3:8]
    if state is _LIVE:
        return remaining, 0, booked, disputed, 0, 1
    if state is HoldState.LAPSED:
        return 0, remaining, booked, disputed, 0, 0
    return 0, 0, booked, disputed, 1 if state is HoldState.DISPUTED else 0, 0


def check_holds(steps: list[Step], asked: dict[str, Any], holds: dict[bytes, Hold]) -> None:
    """Check what an operation says of holds, and its amount, and take the holds over.

    Args:
        steps: Its entries.
        asked: The request.
        holds: Those of the tree; the ones concerned are changed.
    """
    first = steps[0]
    kind, amount = first.entry.kind, first.entry.amount
    was: Hold | None = None
    hold = first.effect.hold
    if kind in _HOLD_KINDS:
        hold_id: bytes = asked.get("hold_id", b"")
        if hold is None or hold.hold_id != hold_id:
            raise Broken("hold", "it does not say what became of the hold that it names")
        was = holds.get(hold_id)
        _check_hold(first, kind, was, hold, asked)
        token = _token_of(first, kind, was, hold, asked)
        kept = [*hold]
        kept[_TOKEN] = token
        holds[hold_id] = new(Hold, kept)
    elif hold is not None:
        raise Broken("hold", "it concerns no hold")
    _check_amount(first, kind, was, hold, asked)
    moved = _NONE if hold is None else _moved(was, hold)
    if kind is Kind.SPEND:
        moved = (0, 0, amount, 0, 0, 0)
    for index, step in enumerate(steps):
        _check_share(index, step, moved if index == 0 else _NONE)
    if len(steps) > 1:
        _check_more(steps, asked, holds)


def _check_hold(
    step: Step, kind: Kind, was: Hold | None, hold: Hold, asked: dict[str, Any]
) -> None:
    """A hold is made by a Reserve and never made anew; it keeps its amount and is within it."""
    entry = step.entry
    if kind is Kind.RESERVE:
        asked_amount, at = asked.get("amount"), entry.at
        expires_at = at + asked.get("ttl_us", 0)
        made = (_LIVE, asked_amount, asked_amount, 0, 0, at, expires_at)
        if was is not None or hold[3:] != made:
            raise Broken("hold", "it is not the new hold that was asked for")
        return
    if was is None or was.budget_id != entry.budget_id:
        raise Broken("hold", "the budget never had the hold")
    state, amount, remaining, booked, disputed, created_at, expires_at = hold[3:]
    if was.amount != amount or was.created_at != created_at:
        raise Broken("hold", "the hold is another than it was")
    settleable = hold.settleable
    if (
        remaining > amount
        or (remaining and not settleable)
        or (disputed > 0) is not (state is HoldState.DISPUTED)
        or (kind is not Kind.EXTEND and expires_at != was.expires_at)
    ):
        raise Broken("hold", "the hold contradicts itself")
    if kind is Kind.LAPSE:
        fine = (
            was.state is HoldState.LIVE and state is HoldState.LAPSED and remaining == was.remaining
        )
    elif kind is Kind.EXTEND:
        fine = (
            was.state is HoldState.LIVE and state is HoldState.LIVE and remaining == was.remaining
        )
    elif kind is Kind.SETTLE and settleable:
        fine = (
            asked.get("keep_open", False)
            and was.state is HoldState.LIVE
            and state is HoldState.LIVE
        )
        fine = fine and remaining + booked == was.remaining + was.booked
    else:
        fine = not settleable
    if not fine:
        raise Broken("hold", f"a {was.state.name} hold does not become so by a {kind.name}")


def _token_of(step: Step, kind: Kind, was: Hold | None, hold: Hold, asked: dict[str, Any]) -> bytes:
    """The hold's token after the operation."""
    if was is None:
        token: bytes | None = asked.get("hold_token_id")
    elif hold.state is _LIVE and kind is not Kind.LAPSE:
        token = asked.get("next_hold_token_id")
    else:
        return was.token
    if token is None:
        raise Broken("token", "it has to produce the hold's next token")
    produce(step.budget, token)
    return token


def _check_amount(
    step: Step, kind: Kind, was: Hold | None, hold: Hold | None, asked: dict[str, Any]
) -> None:
    """The headline amount is what was asked for, and what was recorded of the hold."""
    amount = step.entry.amount
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


def _check_share(index: int, step: Step, moved: _Share) -> None:
    """What the budget has held, forfeited, spent and disputed changes by what its hold does."""
    _, _, held, _, spent, forfeited, _, _ = step.changes[:]
    disputed, disputes, live = step.effect[1:4]
    if step.before is not None:
        disputed_before, disputes_before, live_before = step.before[1:4]
        disputed -= disputed_before
        disputes -= disputes_before
        live -= live_before
    told = held, forfeited, spent, disputed, disputes, live
    if told != moved:
        name = next(n for n, a, b in zip(_SUMS, told, moved, strict=True) if a != b)
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
