"""The ledger's rules: may this operation happen, and what does it do?

`decide` is a ladder (below the request's shape): principal and budget, the presented token, replay, consumed token,
what the request would make, the state of the budget and of all its ancestors, money. Each rule
function below has the last three rungs of its kind, in that order, one return per refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import UTC, datetime
from hmac import compare_digest
from typing import NamedTuple

from peculium_server.core import limits
from peculium_server.core.draft import AmountOverflow, Draft
from peculium_server.core.operations import (
    HOLD_KINDS,
    Accept,
    Actor,
    ByHolder,
    ByRole,
    ByToken,
    Child,
    Collect,
    Delegate,
    Expire,
    Extend,
    Freeze,
    Fund,
    Grant,
    Kind,
    Lapse,
    Operation,
    Recover,
    Release,
    Renew,
    Reserve,
    Resolve,
    Return,
    Revoke,
    Role,
    Rotation,
    Settle,
    Spend,
    TopUp,
    Unfreeze,
    Withdraw,
)
from peculium_server.core.outcome import Outcome, tell
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.core.shape import produced_tokens
from peculium_server.core.state import (
    Accepted,
    Balances,
    Budget,
    Consumption,
    Custody,
    Hold,
    HoldState,
    Recorded,
    Tree,
)

ADMIN_KINDS = frozenset({Kind.GRANT, Kind.TOP_UP, Kind.WITHDRAW, Kind.FREEZE, Kind.UNFREEZE})
SYSTEM_KINDS = frozenset({Kind.LAPSE, Kind.EXPIRE, Kind.COLLECT})
SPENDING_KINDS = frozenset({Kind.RESERVE, Kind.SPEND, Kind.DELEGATE, Kind.FUND})
"""Refused while the tree's root has overrun."""
FREEZABLE_KINDS = SPENDING_KINDS | {Kind.ACCEPT, Kind.EXTEND, Kind.SETTLE}
"""Refused while the budget or an ancestor is frozen; of the settles, those that keep a hold open."""
EXPIRABLE_KINDS = FREEZABLE_KINDS | {Kind.RENEW}
"""Refused once the lease of the budget or of an ancestor has ended."""


class _Case(NamedTuple):
    """One operation with everything that decides about it."""

    tree: Tree
    actor: Actor
    at: int
    position: int


def decide(
    tree: Tree, operation: Operation, actor: Actor, now: int, position: int
) -> Accepted | Outcome | Refused:
    """Decide one well-formed operation (see `shape`).

    Args:
        tree: What the operation's footprint names.
        operation: What is asked; a chained authority is resolved (see `batch`).
        actor: By whom.
        now: The database's clock, read after the tree.
        position: The operation's place in its lane, if it is accepted.

    Returns:
        `Accepted` with everything to save, the recorded `Outcome` of a replay, or `Refused`.
    """
    refused = _check_role(operation, actor)
    if refused is not None:
        return refused
    concerned = tree.budgets[operation.budget_id]
    at = now
    if concerned is not None:
        at = max(now, *(budget.last_at for budget in tree.line(concerned)))
    standing = _stand(tree, operation, actor, concerned, at)
    if not isinstance(standing, _Standing):
        return standing
    refused = _check_reused(tree, operation)
    if refused is not None:
        return refused
    case = _Case(tree, actor, at, position)
    try:
        if isinstance(operation, Grant):
            return _grant(case, operation)
        assert concerned is not None
        return _decide_known(case, operation, concerned, standing.consumed)
    except AmountOverflow as overflow:
        return Refused(
            Refusal.AMOUNT_OVERFLOW,
            {"budget": overflow.budget_id.hex(), "balance": overflow.balance},
        )


def _check_role(operation: Operation, actor: Actor) -> Refused | None:
    """Roles: an agent operates on what it holds, an admin on everything, the ledger on time."""
    if operation.kind in SYSTEM_KINDS:
        needs = Role.SYSTEM
    elif isinstance(operation.authority, ByRole):
        needs = Role.ADMIN
    elif actor.role in (Role.AGENT, Role.ADMIN):
        return None
    else:
        needs = Role.AGENT
    if actor.role is needs:
        return None
    return Refused(
        Refusal.PERMISSION_DENIED,
        {
            "principal": actor.principal,
            "role": actor.role.name.lower(),
            "needs": needs.name.lower(),
        },
    )


# -- Who asks, and was it asked before? ---------------------------------------------------------


class _Standing(NamedTuple):
    """The caller may operate; this is the token that the operation consumes, if any."""

    consumed: bytes | None


def _stand(
    tree: Tree, operation: Operation, actor: Actor, budget: Budget | None, now: int
) -> _Standing | Outcome | Refused:
    """The rungs from principal and budget to the consumed token."""
    consumption: Consumption | None = None
    consumed: bytes | None = None
    if budget is None:
        if not isinstance(operation, Grant):
            return _unknown(operation)
    elif isinstance(operation.authority, ByToken):
        consumed = operation.authority.token_id
        if not _is_live(tree, operation, actor, budget, consumed):
            consumption = tree.consumed[operation.budget_id, consumed]
            if consumption is None:
                return _unknown(operation)
    elif isinstance(operation.authority, ByHolder):
        if not _holds(operation, actor, budget):
            return _unknown(operation)
        if budget.custody is Custody.PRINCIPAL and isinstance(operation, Accept | Recover):
            return Refused(
                Refusal.NOT_TOKEN_HELD,
                {"budget": budget.budget_id.hex(), "holder": budget.holder or ""},
            )
        if isinstance(operation, Recover):
            consumed = budget.token
    elif isinstance(operation, Recover):
        consumed = budget.token
    recorded = tree.recorded[operation.operation_id]
    if recorded is not None:
        return _replay(recorded, operation, actor)
    if isinstance(operation.authority, ByHolder) and not isinstance(operation, Recover):
        refused = _check_age(operation.operation_id, now)
        if refused is not None:
            return refused
    if consumption is not None:
        return _consumed(operation, consumption)
    return _Standing(consumed)


def _unknown(operation: Operation) -> Refused:
    """One answer for a wrong secret, an unknown budget and another's; admins may know which."""
    reason = (
        Refusal.BUDGET_UNKNOWN
        if isinstance(operation.authority, ByRole)
        else Refusal.CAPABILITY_UNKNOWN
    )
    return Refused(reason, {"budget": operation.budget_id.hex()})


def _is_live(
    tree: Tree, operation: Operation, actor: Actor, budget: Budget, token_id: bytes
) -> bool:
    """Say whether the token is the live one of the hold or budget that the operation names.

    A budget's token that is bound to a principal is worth nothing in another's hands; a hold is
    settled by whoever has its token.
    """
    if operation.kind in HOLD_KINDS:
        assert isinstance(operation, Settle | Release | Extend)
        hold = tree.holds[operation.hold_id]
        return (
            hold is not None
            and hold.budget_id == operation.budget_id
            and hold.settleable
            and compare_digest(hold.token, token_id)
        )
    return (
        budget.token is not None
        and compare_digest(budget.token, token_id)
        and budget.holder in (None, actor.principal)
    )


def _holds(operation: Operation, actor: Actor, budget: Budget) -> bool:
    """Say whether the caller is the holder, and this is how the budget may be used."""
    by_name_alone = budget.custody is Custody.PRINCIPAL or isinstance(operation, Recover)
    return by_name_alone and budget.holder == actor.principal


def _replay(recorded: Recorded, operation: Operation, actor: Actor) -> Outcome | Refused:
    """The recorded outcome again, if the content is the same; else the first field that differs."""
    was = recorded.operation
    differs: str | None = None
    if was.kind is not operation.kind:
        differs = "kind"
    elif recorded.principal != actor.principal:
        differs = "principal"
    else:
        differs = next(_differences(was, operation), None)
    if differs is not None:
        return Refused(
            Refusal.OPERATION_ID_REUSED,
            {"operation": operation.operation_id.hex(), "field": differs},
        )
    return tell(was, recorded.entries, replayed=True)


NOT_COMPARED = frozenset({"dry_run", "trace_id"})
"""How an operation is asked, not what: a retry may have another trace."""


def _differences(was: Operation, asked: Operation) -> Iterator[str]:
    """The fields in which two operations of one kind differ, in the order of their definition."""
    for field in fields(was):
        name = field.name
        if name not in NOT_COMPARED and getattr(was, name) != getattr(asked, name):
            yield name


def _check_age(operation_id: bytes, now: int) -> Refused | None:
    """Without a token to fence it, a delayed duplicate is told by the time in its id (RFC 9562)."""
    made_at = int.from_bytes(operation_id[:6]) * 1000
    age = now - made_at
    if abs(age) <= limits.OPERATION_AGE_US_MAX:
        return None
    return Refused(
        Refusal.OPERATION_TOO_OLD,
        {
            "operation": operation_id.hex(),
            "age_seconds": str(age // limits.SECOND_US),
            "limit_seconds": str(limits.OPERATION_AGE_US_MAX // limits.SECOND_US),
        },
    )


def _consumed(operation: Operation, consumption: Consumption) -> Refused:
    facts = {
        "budget": operation.budget_id.hex(),
        "consumed_by": consumption.operation_id.hex(),
        "consumed_at": _time(consumption.at),
        "kind": consumption.kind.name,
    }
    if consumption.kind in (Kind.RECOVER, Kind.ACCEPT):
        facts["fenced_by"] = consumption.principal
    return Refused(Refusal.TOKEN_CONSUMED, facts)


def _time(at: int) -> str:
    """A time for people and machines: RFC 3339 with microseconds."""
    seconds, microseconds = divmod(at, limits.SECOND_US)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=microseconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# -- What the request would make -----------------------------------------------------------------


def _check_reused(tree: Tree, operation: Operation) -> Refused | None:
    """A token id to be produced was never seen in the budget, ids and names are free."""
    if not isinstance(operation, Grant | Delegate):
        for field, token_id in produced_tokens(operation):
            if _seen(tree, (operation.budget_id, token_id)):
                return _token_reused(operation, field)
    elif isinstance(operation, Delegate) and operation.next_token_id is not None:
        key = operation.budget_id, operation.next_token_id
        if _seen(tree, key):
            return _token_reused(operation, "next_token_id")
    match operation:
        case Grant():
            return _check_new(tree, operation.budget_id, None, operation.name)
        case Delegate():
            for child in operation.children:
                refused = _check_new(tree, child.budget_id, operation.budget_id, child.name)
                if refused is not None:
                    return refused
        case Reserve() if tree.holds[operation.hold_id] is not None:
            return Refused(Refusal.ID_TAKEN, {"field": "hold_id", "id": operation.hold_id.hex()})
        case _:
            pass
    return None


def _seen(tree: Tree, key: tuple[bytes, bytes]) -> bool:
    """Say whether the budget ever had the token: live, in a hold, or consumed."""
    budget_id, token_id = key
    return (
        token_id == tree.budget(budget_id).token
        or tree.consumed[key] is not None
        or tree.hold_tokens[key] is not None
    )


def _token_reused(operation: Operation, field: str) -> Refused:
    return Refused(Refusal.TOKEN_ID_REUSED, {"budget": operation.budget_id.hex(), "field": field})


def _check_new(tree: Tree, budget_id: bytes, parent_id: bytes | None, name: str) -> Refused | None:
    if tree.budgets[budget_id] is not None:
        return Refused(Refusal.ID_TAKEN, {"field": "budget_id", "id": budget_id.hex()})
    if tree.names[parent_id, name] is not None:
        return Refused(Refusal.NAME_TAKEN, {"name": name})
    return None


# -- The state of the budget and of all its ancestors -----------------------------------------------


def _check_state(case: _Case, kind: Kind, budget: Budget) -> Refused | None:
    """The first that applies, of closed, expired, frozen and overrun, and which budget it is."""
    line = list(case.tree.line(budget))
    here = budget.budget_id.hex()
    for level in line:
        if level.closed:
            return Refused(Refusal.BUDGET_CLOSED, {"budget": here, "closed": level.budget_id.hex()})
    if kind in EXPIRABLE_KINDS:
        for level in line:
            if level.expired(case.at):
                assert level.lease_until is not None
                return Refused(
                    Refusal.BUDGET_EXPIRED,
                    {
                        "budget": here,
                        "expired": level.budget_id.hex(),
                        "lease_expires_at": _time(level.lease_until),
                    },
                )
    if kind in FREEZABLE_KINDS:
        for level in line:
            if level.frozen or level.disputes:
                return Refused(
                    Refusal.BUDGET_FROZEN,
                    {
                        "budget": here,
                        "frozen": level.budget_id.hex(),
                        "by": "admin" if level.frozen else "dispute",
                    },
                )
    root = line[-1]
    if kind in SPENDING_KINDS and root.money.overrun:
        return Refused(
            Refusal.TREE_OVERRUN,
            {
                "budget": here,
                "root": root.budget_id.hex(),
                "overrun": str(root.money.overrun),
            },
        )
    return None


def _exhausted(budget: Budget, requested: int) -> Refused | None:
    """What is available bounds what is asked; live holds may free more."""
    money = budget.money
    if requested <= money.available:
        return None
    waiting_helps = requested <= money.available + money.held
    return Refused(
        Refusal.BUDGET_EXHAUSTED,
        {
            "budget": budget.budget_id.hex(),
            "available": str(money.available),
            "held": str(money.held),
            "requested": str(requested),
            "remedy": "wait_for_holds" if waiting_helps else "top_up",
        },
    )


# -- One rule for each kind -------------------------------------------------------------------------

_Decision = Accepted | Refused


def _decide_known(
    case: _Case, operation: Operation, budget: Budget, consumed: bytes | None
) -> _Decision:
    rule: Callable[..., _Decision] = _RULES[operation.kind]
    return rule(case, operation, budget, consumed)


def _grant(case: _Case, grant: Grant) -> Accepted:
    draft = Draft(case.tree, case.at)
    draft.put(
        Budget(
            root_id=grant.root_id,
            budget_id=grant.budget_id,
            ancestors=(),
            name=grant.name,
            unit=grant.unit,
            custody=Custody.PRINCIPAL if grant.token_id is None else Custody.TOKEN,
            holder=grant.holder,
            token=grant.token_id,
            overrun_factor=None,
            labels=grant.labels,
            created_at=case.at,
            money=Balances(granted=grant.amount, available=grant.amount),
        )
    )
    return draft.accept(grant, case.actor, case.position, amount=grant.amount, consumed=None)


def _top_up(case: _Case, top_up: TopUp, budget: Budget, consumed: bytes | None) -> _Decision:
    if not budget.is_root:
        return Refused(Refusal.ONLY_FOR_ROOTS, {"budget": budget.budget_id.hex()})
    draft = Draft(case.tree, case.at)
    draft.move(budget.budget_id, granted=top_up.amount)
    draft.inflow(budget.budget_id, top_up.amount)
    return draft.accept(top_up, case.actor, case.position, amount=top_up.amount, consumed=consumed)


def _withdraw(case: _Case, withdraw: Withdraw, budget: Budget, consumed: bytes | None) -> _Decision:
    if not budget.is_root:
        return Refused(Refusal.ONLY_FOR_ROOTS, {"budget": budget.budget_id.hex()})
    refused = _exhausted(budget, withdraw.amount)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    draft.move(budget.budget_id, granted=-withdraw.amount, available=-withdraw.amount)
    return draft.accept(
        withdraw, case.actor, case.position, amount=withdraw.amount, consumed=consumed
    )


def _reserve(case: _Case, reserve: Reserve, budget: Budget, consumed: bytes | None) -> _Decision:
    refused = _check_state(case, reserve.kind, budget) or _exhausted(budget, reserve.amount)
    if refused is not None:
        return refused
    hold = Hold(
        budget_id=budget.budget_id,
        hold_id=reserve.hold_id,
        token=reserve.hold_token_id,
        state=HoldState.LIVE,
        amount=reserve.amount,
        remaining=reserve.amount,
        booked=0,
        disputed=0,
        created_at=case.at,
        expires_at=case.at + reserve.ttl_us,
    )
    draft = Draft(case.tree, case.at)
    money = budget.money
    draft.put(
        budget._replace(
            money=money._replace(
                available=money.available - reserve.amount, held=money.held + reserve.amount
            ),
            token=reserve.next_token_id,
            holds_live=budget.holds_live + 1,
        )
    )
    draft.put_hold(hold)
    return draft.accept(
        reserve, case.actor, case.position, amount=reserve.amount, consumed=consumed, hold=hold
    )


def _settle(case: _Case, settle: Settle, budget: Budget, consumed: bytes | None) -> _Decision:
    hold = _known_hold(case, settle.hold_id)
    if settle.keep_open:
        refused = _check_state(case, settle.kind, budget)
        if refused is not None:
            return refused
        if hold.state is HoldState.LAPSED:
            return Refused(Refusal.HOLD_LAPSED, {"hold": hold.hold_id.hex()})
    actual = hold.remaining if settle.actual is None else settle.actual
    stays_open = settle.keep_open and actual <= hold.remaining
    draft = Draft(case.tree, case.at)
    if stays_open:
        assert settle.next_hold_token_id is not None
        hold = hold._replace(
            token=settle.next_hold_token_id,
            remaining=hold.remaining - actual,
            booked=hold.booked + actual,
        )
        draft.put_hold(hold)
        draft.move(budget.budget_id, held=-actual, spent=actual)
    else:
        hold = _book(draft, budget, hold, hold.booked + actual, _beyond_limit(budget, hold))
    return draft.accept(
        settle, case.actor, case.position, amount=actual, consumed=consumed, hold=hold
    )


def _release(case: _Case, release: Release, budget: Budget, consumed: bytes | None) -> _Decision:
    hold = _known_hold(case, release.hold_id)
    draft = Draft(case.tree, case.at)
    ended = _book(draft, budget, hold, hold.booked, None)
    if not hold.booked:
        ended = ended._replace(state=HoldState.RELEASED)
        draft.put_hold(ended)
    return draft.accept(
        release, case.actor, case.position, amount=hold.remaining, consumed=consumed, hold=ended
    )


def _extend(case: _Case, extend: Extend, budget: Budget, consumed: bytes | None) -> _Decision:
    hold = _known_hold(case, extend.hold_id)
    refused = _check_state(case, extend.kind, budget)
    if refused is not None:
        return refused
    if hold.state is HoldState.LAPSED:
        return Refused(Refusal.HOLD_LAPSED, {"hold": hold.hold_id.hex()})
    latest = hold.created_at + limits.HOLD_AGE_US_MAX
    hold = hold._replace(
        token=extend.next_hold_token_id, expires_at=min(case.at + extend.ttl_us, latest)
    )
    draft = Draft(case.tree, case.at)
    draft.put_hold(hold)
    return draft.accept(extend, case.actor, case.position, amount=0, consumed=consumed, hold=hold)


def _spend(case: _Case, spend: Spend, budget: Budget, consumed: bytes | None) -> _Decision:
    refused = _check_state(case, spend.kind, budget) or _exhausted(budget, spend.amount)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    draft.put(budget._replace(token=spend.next_token_id))
    draft.move(budget.budget_id, available=-spend.amount, spent=spend.amount)
    return draft.accept(spend, case.actor, case.position, amount=spend.amount, consumed=consumed)


def _delegate(case: _Case, delegate: Delegate, budget: Budget, consumed: bytes | None) -> _Decision:
    refused = _check_state(case, delegate.kind, budget)
    if refused is not None:
        return refused
    if len(budget.ancestors) + 2 > limits.DEPTH_MAX:
        return Refused(
            Refusal.TREE_TOO_DEEP,
            {"budget": budget.budget_id.hex(), "limit": str(limits.DEPTH_MAX)},
        )
    total = sum(child.amount for child in delegate.children)
    refused = _exhausted(budget, total)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    draft.put(budget._replace(token=delegate.next_token_id))
    draft.move(budget.budget_id, available=-total, delegated=total)
    for child in delegate.children:
        draft.put(_child(case, budget, child))
    return draft.accept(delegate, case.actor, case.position, amount=total, consumed=consumed)


def _child(case: _Case, parent: Budget, child: Child) -> Budget:
    """A new child. Its lease, and the latest end of it, are clipped to its parent's."""
    until = parent.lease_until
    latest = parent.lease_latest
    if child.lease_us is not None:
        until = _clip(case.at + child.lease_us, until)
        latest = _clip(case.at + (child.lease_latest_us or child.lease_us), latest)
    return Budget(
        root_id=parent.root_id,
        budget_id=child.budget_id,
        ancestors=(parent.budget_id, *parent.ancestors),
        name=child.name,
        unit=parent.unit,
        custody=Custody.PRINCIPAL if child.token_id is None else Custody.TOKEN,
        holder=child.holder,
        token=child.token_id,
        overrun_factor=child.overrun_factor,
        labels=child.labels,
        created_at=case.at,
        money=Balances(granted=child.amount, available=child.amount),
        lease_until=until,
        lease_latest=latest,
    )


def _clip(time: int, bound: int | None) -> int:
    return time if bound is None else min(time, bound)


def _accept(case: _Case, accept: Accept, budget: Budget, consumed: bytes | None) -> _Decision:
    refused = _check_state(case, accept.kind, budget)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    draft.put(budget._replace(token=accept.next_token_id, holder=case.actor.principal))
    return draft.accept(accept, case.actor, case.position, amount=0, consumed=consumed)


def _recover(case: _Case, recover: Recover, budget: Budget, consumed: bytes | None) -> _Decision:
    ended: list[tuple[bytes, Hold]] = []
    draft = Draft(case.tree, case.at)
    for rotation in recover.holds:
        rotated = _rotate(case, budget, rotation)
        if isinstance(rotated, Refused):
            return rotated
        ended.append((_known_hold(case, rotation.hold_id).token, rotated))
        draft.put_hold(rotated)
    changed = budget._replace(token=recover.next_token_id)
    if isinstance(recover.authority, ByRole):
        changed = changed._replace(
            holder=recover.holder,
            custody=Custody.PRINCIPAL if recover.next_token_id is None else Custody.TOKEN,
        )
    draft.put(changed)
    rotated_ids = draft.holds
    listed = sorted(
        (rotated_ids.get(hold.hold_id, hold) for hold in case.tree.open_holds[budget.budget_id]),
        key=lambda hold: hold.hold_id,
    )
    return draft.accept(
        recover,
        case.actor,
        case.position,
        amount=0,
        consumed=consumed,
        also_consumed=tuple(ended),
        holds=tuple(listed[: limits.ROTATIONS_MAX]),
        holds_truncated=len(listed) > limits.ROTATIONS_MAX,
    )


def _rotate(case: _Case, budget: Budget, rotation: Rotation) -> Hold | Refused:
    hold = _own_hold(case, budget, rotation.hold_id)
    if isinstance(hold, Refused):
        return hold
    if not hold.settleable:
        return _hold_ended(hold)
    return hold._replace(token=rotation.next_token_id)


def _fund(case: _Case, fund: Fund, budget: Budget, consumed: bytes | None) -> _Decision:
    descendant = _descendant(case, budget, fund.descendant_id)
    if isinstance(descendant, Refused):
        return descendant
    refused = _check_state(case, fund.kind, descendant) or _exhausted(budget, fund.amount)
    if refused is not None:
        return refused
    case = case._replace(at=max(case.at, *(level.last_at for level in case.tree.line(descendant))))
    draft = Draft(case.tree, case.at)
    draft.put(budget._replace(token=fund.next_token_id))
    if fund.amount:
        draft.move(budget.budget_id, available=-fund.amount, delegated=fund.amount)
        for level_id in descendant.ancestors[: descendant.ancestors.index(budget.budget_id)]:
            draft.move(level_id, granted=fund.amount, delegated=fund.amount)
        draft.move(descendant.budget_id, granted=fund.amount)
        draft.inflow(descendant.budget_id, fund.amount)
    if fund.lease_us is not None:
        funded = draft.budget(descendant.budget_id)
        parent = case.tree.budget(descendant.ancestors[0])
        until = _clip(case.at + fund.lease_us, parent.lease_until)
        latest = max(until, _clip(funded.lease_latest or until, parent.lease_latest))
        draft.put(funded._replace(lease_until=until, lease_latest=latest))
    return draft.accept(fund, case.actor, case.position, amount=fund.amount, consumed=consumed)


def _renew(case: _Case, renew: Renew, budget: Budget, consumed: bytes | None) -> _Decision:
    refused = _check_state(case, renew.kind, budget)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    changed = budget._replace(token=renew.next_token_id)
    if budget.lease_latest is not None:
        changed = changed._replace(lease_until=min(case.at + renew.lease_us, budget.lease_latest))
    draft.put(changed)
    return draft.accept(renew, case.actor, case.position, amount=0, consumed=consumed)


def _return(case: _Case, give: Return, budget: Budget, consumed: bytes | None) -> _Decision:
    parent_id = budget.parent_id
    if parent_id is None:
        return Refused(Refusal.NOT_FOR_ROOTS, {"budget": budget.budget_id.hex()})
    refused = _check_state(case, give.kind, budget)
    if refused is not None:
        return refused
    if give.amount is None:
        return _return_all(case, give, budget, consumed)
    refused = _exhausted(budget, give.amount)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    draft.put(budget._replace(token=give.next_token_id))
    draft.move(budget.budget_id, available=-give.amount, granted=-give.amount)
    draft.move(parent_id, delegated=-give.amount)
    draft.inflow(parent_id, give.amount)
    return draft.accept(
        give,
        case.actor,
        case.position,
        amount=give.amount,
        consumed=consumed,
        returned=give.amount,
    )


def _return_all(case: _Case, give: Return, budget: Budget, consumed: bytes | None) -> _Decision:
    if not give.cascade:
        if budget.holds_live:
            return Refused(
                Refusal.LIVE_HOLDS,
                {
                    "budget": budget.budget_id.hex(),
                    "holds_live": str(budget.holds_live),
                    "held": str(budget.money.held),
                },
            )
        child_id = _open_child(case.tree, budget)
        if child_id is not None:
            return Refused(
                Refusal.OPEN_CHILDREN,
                {"budget": budget.budget_id.hex(), "child": child_id.hex()},
            )
    return _close(case, give, budget, consumed, budget._replace(token=None))


def _revoke(case: _Case, revoke: Revoke, budget: Budget, consumed: bytes | None) -> _Decision:
    descendant = _descendant(case, budget, revoke.descendant_id)
    if isinstance(descendant, Refused):
        return descendant
    refused = _check_state(case, revoke.kind, descendant)
    if refused is not None:
        return refused
    return _close(
        case,
        revoke,
        descendant,
        consumed,
        descendant,
        concerned=budget._replace(token=revoke.next_token_id),
    )


def _expire(case: _Case, expire: Expire, budget: Budget, consumed: bytes | None) -> _Decision:
    refused = _check_state(case, expire.kind, budget)
    if refused is not None:
        return refused
    if not budget.expired(case.at):
        return _not_due(budget, budget.lease_until)
    return _close(case, expire, budget, consumed, budget)


def _close(
    case: _Case,
    operation: Return | Revoke | Expire,
    top: Budget,
    consumed: bytes | None,
    closing: Budget,
    concerned: Budget | None = None,
) -> Accepted:
    """Close the top of a subtree: nothing below can spend from now on, however large it is.

    What is available flows to the nearest open ancestor: the top's own and a bounded number of
    descendants' at once, the rest by Collect.
    """
    below = sorted(
        (budget for budget in case.tree.below(top.budget_id) if budget.money.available),
        key=lambda budget: budget.budget_id,
    )
    eager = below[: limits.EAGER_COLLECTIONS_MAX]
    at = max(
        case.at,
        *(level.last_at for level in case.tree.line(top)),
        *(level.last_at for budget in eager for level in case.tree.line(budget)),
    )
    draft = Draft(case.tree, at)
    if concerned is not None:
        draft.put(concerned)
    draft.put(closing._replace(closed=True))
    returned = draft.collect(top.budget_id)
    returned += sum(draft.collect(budget.budget_id) for budget in eager)
    pending = case.tree.pending[top.budget_id] + sum(
        budget.money.available for budget in below[limits.EAGER_COLLECTIONS_MAX :]
    )
    return draft.accept(
        operation,
        case.actor,
        case.position,
        amount=returned,
        consumed=consumed,
        returned=returned,
        pending=pending,
    )


def _collect(case: _Case, collect: Collect, budget: Budget, consumed: bytes | None) -> _Decision:
    if not any(level.closed for level in case.tree.line(budget)):
        return _not_due(budget, None)
    draft = Draft(case.tree, case.at)
    returned = draft.collect(budget.budget_id)
    return draft.accept(
        collect,
        case.actor,
        case.position,
        amount=returned,
        consumed=consumed,
        returned=returned,
    )


def _resolve(case: _Case, resolve: Resolve, budget: Budget, consumed: bytes | None) -> _Decision:
    hold = _own_hold(case, budget, resolve.hold_id)
    if isinstance(hold, Refused):
        return hold
    by_admin = isinstance(resolve.authority, ByRole)
    if not hold.settleable and not by_admin:
        return _hold_ended(hold)
    ended_token = hold.token if hold.settleable else None
    draft = Draft(case.tree, case.at)
    if not by_admin:
        budget = budget._replace(token=resolve.next_token_id)
        draft.put(budget)
    limit = None if by_admin else _beyond_limit(budget, hold)
    hold = _book(draft, budget, hold, resolve.actual, limit)
    also: tuple[tuple[bytes, Hold], ...] = ()
    if ended_token is not None:
        if consumed is None:
            consumed = ended_token
        else:
            also = ((ended_token, hold),)
    return draft.accept(
        resolve,
        case.actor,
        case.position,
        amount=resolve.actual,
        consumed=consumed,
        hold=hold,
        also_consumed=also,
    )


def _freeze(
    case: _Case, operation: Freeze | Unfreeze, budget: Budget, consumed: bytes | None
) -> _Decision:
    refused = _check_state(case, operation.kind, budget)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    draft.put(budget._replace(frozen=isinstance(operation, Freeze)))
    return draft.accept(operation, case.actor, case.position, amount=0, consumed=consumed)


def _lapse(case: _Case, lapse: Lapse, budget: Budget, consumed: bytes | None) -> _Decision:
    hold = _own_hold(case, budget, lapse.hold_id)
    if isinstance(hold, Refused):
        return hold
    if hold.state is not HoldState.LIVE:
        return _hold_ended(hold)
    if hold.expires_at > case.at:
        return _not_due(budget, hold.expires_at)
    hold = hold._replace(state=HoldState.LAPSED)
    draft = Draft(case.tree, case.at)
    draft.put(budget._replace(holds_live=budget.holds_live - 1))
    draft.move(budget.budget_id, held=-hold.remaining, forfeited=hold.remaining)
    draft.put_hold(hold)
    return draft.accept(
        lapse, case.actor, case.position, amount=hold.remaining, consumed=consumed, hold=hold
    )


_RULES: dict[Kind, Callable[..., _Decision]] = {
    Kind.TOP_UP: _top_up,
    Kind.WITHDRAW: _withdraw,
    Kind.RESERVE: _reserve,
    Kind.SETTLE: _settle,
    Kind.RELEASE: _release,
    Kind.EXTEND: _extend,
    Kind.SPEND: _spend,
    Kind.DELEGATE: _delegate,
    Kind.ACCEPT: _accept,
    Kind.RECOVER: _recover,
    Kind.FUND: _fund,
    Kind.RENEW: _renew,
    Kind.RETURN: _return,
    Kind.REVOKE: _revoke,
    Kind.RESOLVE: _resolve,
    Kind.FREEZE: _freeze,
    Kind.UNFREEZE: _freeze,
    Kind.LAPSE: _lapse,
    Kind.EXPIRE: _expire,
    Kind.COLLECT: _collect,
}


# -- Holds ------------------------------------------------------------------------------------------


def _known_hold(case: _Case, hold_id: bytes) -> Hold:
    """The hold, whose token was found live before."""
    hold = case.tree.holds[hold_id]
    assert hold is not None
    return hold


def _own_hold(case: _Case, budget: Budget, hold_id: bytes) -> Hold | Refused:
    hold = case.tree.holds[hold_id]
    if hold is None or hold.budget_id != budget.budget_id:
        return Refused(
            Refusal.HOLD_UNKNOWN, {"budget": budget.budget_id.hex(), "hold": hold_id.hex()}
        )
    return hold


def _hold_ended(hold: Hold) -> Refused:
    return Refused(Refusal.HOLD_ENDED, {"hold": hold.hold_id.hex(), "state": hold.state.name})


def _not_due(budget: Budget, due_at: int | None) -> Refused:
    facts = {"budget": budget.budget_id.hex()}
    if due_at is not None:
        facts["due_at"] = _time(due_at)
    return Refused(Refusal.NOT_DUE, facts)


def _beyond_limit(budget: Budget, hold: Hold) -> int | None:
    """What one hold may bill beyond its amount; a root has no limit: nobody else's money is at risk."""
    if budget.overrun_factor is None:
        return None
    return budget.overrun_factor * hold.amount


def _book(draft: Draft, budget: Budget, hold: Hold, total: int, limit: int | None) -> Hold:
    """End a hold: book `total` for its whole life, as far as the limit beyond its amount allows.

    What it had left and does not need flows back; what it needs beyond that flows out of the budget
    and its ancestors; what passes the limit is disputed: recorded, booked to nobody, the budget frozen.
    """
    beyond = max(0, total - hold.amount)
    disputed = 0 if limit is None else max(0, beyond - limit)
    booked = total - disputed
    spent = booked - hold.booked
    source = {"forfeited" if hold.state is HoldState.LAPSED else "held": -hold.remaining}
    draft.put(
        draft.budget(budget.budget_id)._replace(
            holds_live=budget.holds_live - (hold.state is HoldState.LIVE),
            disputes=budget.disputes - (hold.state is HoldState.DISPUTED) + (disputed > 0),
            disputed=budget.disputed - hold.disputed + disputed,
        )
    )
    draft.move(budget.budget_id, spent=spent, **source)
    freed = hold.remaining - spent
    if freed > 0:
        draft.inflow(budget.budget_id, freed)
    else:
        draft.outflow(budget.budget_id, -freed)
    ended = hold._replace(
        state=HoldState.DISPUTED if disputed else HoldState.SETTLED,
        remaining=0,
        booked=booked,
        disputed=disputed,
    )
    draft.put_hold(ended)
    return ended


# -- Descendants ------------------------------------------------------------------------------------


def _descendant(case: _Case, budget: Budget, descendant_id: bytes) -> Budget | Refused:
    descendant = case.tree.budgets[descendant_id]
    if descendant is None or budget.budget_id not in descendant.ancestors:
        return Refused(
            Refusal.DESCENDANT_UNKNOWN,
            {"budget": budget.budget_id.hex(), "descendant": descendant_id.hex()},
        )
    return descendant


def _open_child(tree: Tree, budget: Budget) -> bytes | None:
    for other in tree.below(budget.budget_id):
        if other.parent_id == budget.budget_id and not other.closed:
            return other.budget_id
    return tree.open_child[budget.budget_id]
