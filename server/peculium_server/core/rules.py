"""The ledger's rules: may this operation happen, and what does it do?

`decide` is a ladder (below the request's shape): principal and budget, the presented token, replay, consumed token,
what the request would make, the state of the budget and of all its ancestors, money. Each rule
function below has the last three rungs of its kind, in that order, one return per refusal.
"""

from __future__ import annotations

from collections.abc import Callable

from peculium_server.core import limits
from peculium_server.core.admission import (
    Case,
    Standing,
    check_available,
    check_reused,
    check_role,
    check_state,
    named,
    stand,
)
from peculium_server.core.draft import AmountOverflow, Draft
from peculium_server.core.operations import (
    Accept,
    Actor,
    ByRole,
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
    Rotation,
    Settle,
    Spend,
    TopUp,
    Unfreeze,
    Withdraw,
)
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused, id_text, time_text
from peculium_server.core.state import (
    Accepted,
    Balances,
    Budget,
    Custody,
    Hold,
    HoldState,
    Tree,
    new,
)


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
    refused = check_role(operation, actor)
    if refused is not None:
        return refused
    concerned = tree.budgets[operation.budget_id]
    at = now if concerned is None else _moment(tree, operation, concerned, now)
    standing = stand(tree, operation, actor, concerned, at)
    if not isinstance(standing, Standing):
        return standing
    refused = check_reused(tree, operation)
    if refused is not None:
        return refused
    case = Case(tree, actor, at, position)
    try:
        if isinstance(operation, Grant):
            return _grant(case, operation)
        assert concerned is not None
        return _decide_known(case, operation, concerned, standing.consumed)
    except AmountOverflow as overflow:
        return Refused(
            Refusal.AMOUNT_OVERFLOW,
            {"budget": id_text(overflow.budget_id), "balance": overflow.balance},
        )


def _moment(tree: Tree, operation: Operation, concerned: Budget, now: int) -> int:
    """When it is decided: now, but never before the last entry of a budget that it may write.

    Known before the first rung, so that an auditor who decides again at this time decides the same.
    """
    at = max([now, *[level.last_at for level in tree.line(concerned)]])
    if operation.kind not in _WRITING_BELOW:
        return at
    below: list[Budget] = []
    match operation:
        case Fund() | Revoke():
            descendant = tree.budgets[operation.descendant_id]
            if descendant is not None:
                below.append(descendant)
                if isinstance(operation, Revoke):
                    below += _eager(tree, descendant)
        case Return(amount=None) | Expire():
            below += _eager(tree, concerned)
        case _:
            pass
    return max([at, *(level.last_at for budget in below for level in tree.line(budget))])


_WRITING_BELOW = frozenset({Kind.FUND, Kind.REVOKE, Kind.RETURN, Kind.EXPIRE})


# -- One rule for each kind -------------------------------------------------------------------------

_Decision = Accepted | Refused


def _decide_known(
    case: Case, operation: Operation, budget: Budget, consumed: bytes | None
) -> _Decision:
    rule: Callable[..., _Decision] = _RULES[operation.kind]
    return rule(case, operation, budget, consumed)


def _grant(case: Case, grant: Grant) -> Accepted:
    draft = Draft(case.tree, case.at)
    draft.add(
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


def _top_up(case: Case, top_up: TopUp, budget: Budget, consumed: bytes | None) -> _Decision:
    if not budget.is_root:
        return Refused(Refusal.ONLY_FOR_ROOTS, named(case.tree, budget))
    draft = Draft(case.tree, case.at)
    draft.touch(budget.budget_id).granted += top_up.amount
    draft.inflow(budget.budget_id, top_up.amount)
    return draft.accept(top_up, case.actor, case.position, amount=top_up.amount, consumed=consumed)


def _withdraw(case: Case, withdraw: Withdraw, budget: Budget, consumed: bytes | None) -> _Decision:
    if not budget.is_root:
        return Refused(Refusal.ONLY_FOR_ROOTS, named(case.tree, budget))
    refused = check_available(case, budget, withdraw.amount)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    root = draft.touch(budget.budget_id)
    root.granted -= withdraw.amount
    root.available -= withdraw.amount
    return draft.accept(
        withdraw, case.actor, case.position, amount=withdraw.amount, consumed=consumed
    )


def _reserve(case: Case, reserve: Reserve, budget: Budget, consumed: bytes | None) -> _Decision:
    refused = check_state(case, reserve.kind, budget) or check_available(
        case, budget, reserve.amount
    )
    if refused is not None:
        return refused
    amount = reserve.amount
    hold = Hold(
        budget_id=budget.budget_id,
        hold_id=reserve.hold_id,
        token=reserve.hold_token_id,
        state=HoldState.LIVE,
        amount=amount,
        remaining=amount,
        booked=0,
        disputed=0,
        created_at=case.at,
        expires_at=case.at + reserve.ttl_us,
    )
    draft = Draft(case.tree, case.at)
    reserving = draft.touch(budget.budget_id)
    reserving.available -= amount
    reserving.held += amount
    reserving.token = reserve.next_token_id
    reserving.holds_live += 1
    draft.put_hold(hold)
    return draft.accept(
        reserve, case.actor, case.position, amount=amount, consumed=consumed, hold=hold
    )


def _settle(case: Case, settle: Settle, budget: Budget, consumed: bytes | None) -> _Decision:
    hold = _known_hold(case, settle.hold_id)
    if settle.keep_open:
        refused = check_state(case, settle.kind, budget)
        if refused is not None:
            return refused
        if hold.state is HoldState.LAPSED:
            return Refused(Refusal.HOLD_LAPSED, {"hold": id_text(hold.hold_id)})
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
        settling = draft.touch(budget.budget_id)
        settling.held -= actual
        settling.spent += actual
    else:
        hold = _book(draft, budget, hold, hold.booked + actual, _beyond_limit(budget, hold))
    return draft.accept(
        settle, case.actor, case.position, amount=actual, consumed=consumed, hold=hold
    )


def _release(case: Case, release: Release, budget: Budget, consumed: bytes | None) -> _Decision:
    hold = _known_hold(case, release.hold_id)
    draft = Draft(case.tree, case.at)
    ended = _book(draft, budget, hold, hold.booked, None)
    if not hold.booked:
        ended = ended._replace(state=HoldState.RELEASED)
        draft.put_hold(ended)
    return draft.accept(
        release, case.actor, case.position, amount=hold.remaining, consumed=consumed, hold=ended
    )


def _extend(case: Case, extend: Extend, budget: Budget, consumed: bytes | None) -> _Decision:
    hold = _known_hold(case, extend.hold_id)
    refused = check_state(case, extend.kind, budget)
    if refused is not None:
        return refused
    if hold.state is HoldState.LAPSED:
        return Refused(Refusal.HOLD_LAPSED, {"hold": id_text(hold.hold_id)})
    latest = hold.created_at + limits.HOLD_AGE_US_MAX
    hold = hold._replace(
        token=extend.next_hold_token_id, expires_at=min(case.at + extend.ttl_us, latest)
    )
    draft = Draft(case.tree, case.at)
    draft.put_hold(hold)
    return draft.accept(extend, case.actor, case.position, amount=0, consumed=consumed, hold=hold)


def _spend(case: Case, spend: Spend, budget: Budget, consumed: bytes | None) -> _Decision:
    refused = check_state(case, spend.kind, budget) or check_available(case, budget, spend.amount)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    spending = draft.touch(budget.budget_id)
    spending.token = spend.next_token_id
    spending.available -= spend.amount
    spending.spent += spend.amount
    return draft.accept(spend, case.actor, case.position, amount=spend.amount, consumed=consumed)


def _delegate(case: Case, delegate: Delegate, budget: Budget, consumed: bytes | None) -> _Decision:
    refused = check_state(case, delegate.kind, budget)
    if refused is not None:
        return refused
    if len(budget.ancestors) + 2 > limits.DEPTH_MAX:
        return Refused(
            Refusal.TREE_TOO_DEEP,
            named(case.tree, budget) | {"limit": str(limits.DEPTH_MAX)},
        )
    total = sum(child.amount for child in delegate.children)
    refused = check_available(case, budget, total)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    delegating = draft.touch(budget.budget_id)
    delegating.token = delegate.next_token_id
    delegating.available -= total
    delegating.delegated += total
    for child in delegate.children:
        draft.add(_child(case, budget, child))
    return draft.accept(delegate, case.actor, case.position, amount=total, consumed=consumed)


def _child(case: Case, parent: Budget, child: Child) -> Budget:
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


def _accept(case: Case, accept: Accept, budget: Budget, consumed: bytes | None) -> _Decision:
    refused = check_state(case, accept.kind, budget)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    accepting = draft.touch(budget.budget_id)
    accepting.token = accept.next_token_id
    accepting.holder = case.actor.principal
    return draft.accept(accept, case.actor, case.position, amount=0, consumed=consumed)


def _recover(case: Case, recover: Recover, budget: Budget, consumed: bytes | None) -> _Decision:
    rotated: list[tuple[Hold, Rotation]] = []
    for rotation in recover.holds:
        hold = _own_hold(case, budget, rotation.hold_id)
        if isinstance(hold, Refused):
            return hold
        rotated.append((hold, rotation))
    for hold, _ in rotated:
        if not hold.settleable:
            return _hold_ended(hold)
    if recover.if_seq not in (None, budget.seq):
        return Refused(
            Refusal.BUDGET_CHANGED,
            named(case.tree, budget) | {"if_seq": str(recover.if_seq), "seq": str(budget.seq)},
        )
    draft = Draft(case.tree, case.at)
    ended: list[tuple[bytes, Hold]] = []
    for hold, rotation in rotated:
        changed_hold = hold._replace(token=rotation.next_token_id)
        ended.append((hold.token, changed_hold))
        draft.put_hold(changed_hold)
    recovered = draft.touch(budget.budget_id)
    recovered.token = recover.next_token_id
    if isinstance(recover.authority, ByRole):
        recovered.holder = recover.holder
        recovered.custody = Custody.PRINCIPAL if recover.next_token_id is None else Custody.TOKEN
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


def _fund(case: Case, fund: Fund, budget: Budget, consumed: bytes | None) -> _Decision:
    descendant = _descendant(case, budget, fund.descendant_id)
    if isinstance(descendant, Refused):
        return descendant
    refused = check_state(case, fund.kind, descendant) or check_available(case, budget, fund.amount)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    funding = draft.touch(budget.budget_id)
    funding.token = fund.next_token_id
    if fund.amount:
        funding.available -= fund.amount
        funding.delegated += fund.amount
        for level_id in descendant.ancestors[: descendant.ancestors.index(budget.budget_id)]:
            level = draft.touch(level_id)
            level.granted += fund.amount
            level.delegated += fund.amount
        draft.touch(descendant.budget_id).granted += fund.amount
        draft.inflow(descendant.budget_id, fund.amount)
    if fund.lease_us is not None:
        funded = draft.touch(descendant.budget_id)
        parent = case.tree.budget(descendant.ancestors[0])
        until = _clip(case.at + fund.lease_us, parent.lease_until)
        latest = _clip(funded.lease_latest or until, parent.lease_latest)
        funded.lease_until = until
        funded.lease_latest = max(until, latest)
    return draft.accept(fund, case.actor, case.position, amount=fund.amount, consumed=consumed)


def _renew(case: Case, renew: Renew, budget: Budget, consumed: bytes | None) -> _Decision:
    refused = check_state(case, renew.kind, budget)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    renewed = draft.touch(budget.budget_id)
    renewed.token = renew.next_token_id
    if budget.lease_latest is not None:
        renewed.lease_until = min(case.at + renew.lease_us, budget.lease_latest)
    return draft.accept(renew, case.actor, case.position, amount=0, consumed=consumed)


def _return(case: Case, give: Return, budget: Budget, consumed: bytes | None) -> _Decision:
    parent_id = budget.parent_id
    if parent_id is None:
        return Refused(Refusal.NOT_FOR_ROOTS, named(case.tree, budget))
    refused = check_state(case, give.kind, budget)
    if refused is not None:
        return refused
    if give.amount is None:
        return _return_all(case, give, budget, consumed)
    refused = check_available(case, budget, give.amount)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    giving = draft.touch(budget.budget_id)
    giving.token = give.next_token_id
    giving.available -= give.amount
    giving.granted -= give.amount
    draft.touch(parent_id).delegated -= give.amount
    draft.inflow(parent_id, give.amount)
    return draft.accept(
        give,
        case.actor,
        case.position,
        amount=give.amount,
        consumed=consumed,
        returned=give.amount,
    )


def _return_all(case: Case, give: Return, budget: Budget, consumed: bytes | None) -> _Decision:
    if not give.cascade:
        if budget.holds_live:
            return Refused(
                Refusal.LIVE_HOLDS,
                named(case.tree, budget)
                | {
                    "holds_live": str(budget.holds_live),
                    "held": str(budget.money.held),
                },
            )
        child_id = _open_child(case.tree, budget)
        if child_id is not None:
            return Refused(
                Refusal.OPEN_CHILDREN,
                named(case.tree, budget) | {"child": id_text(child_id)},
            )
    draft = Draft(case.tree, case.at)
    draft.touch(budget.budget_id).token = None
    return _close(case, give, budget, consumed, draft)


def _revoke(case: Case, revoke: Revoke, budget: Budget, consumed: bytes | None) -> _Decision:
    descendant = _descendant(case, budget, revoke.descendant_id)
    if isinstance(descendant, Refused):
        return descendant
    refused = check_state(case, revoke.kind, descendant)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    draft.touch(budget.budget_id).token = revoke.next_token_id
    return _close(case, revoke, descendant, consumed, draft)


def _expire(case: Case, expire: Expire, budget: Budget, consumed: bytes | None) -> _Decision:
    # Below a closed level too: a lease that could never end would be found due for ever.
    if budget.closed:
        return Refused(
            Refusal.BUDGET_CLOSED,
            named(case.tree, budget) | {"closed": id_text(budget.budget_id)},
        )
    if not budget.expired(case.at):
        return _not_due(budget, budget.lease_until)
    return _close(case, expire, budget, consumed, Draft(case.tree, case.at))


def _close(
    case: Case,
    operation: Return | Revoke | Expire,
    top: Budget,
    consumed: bytes | None,
    draft: Draft,
) -> Accepted:
    """Close the top of a subtree: nothing below can spend from now on, however large it is.

    What is available flows to the nearest open ancestor: the top's own and a bounded number of
    descendants' at once, the rest by Collect.
    """
    eager = _eager(case.tree, top)
    pending = case.tree.pending[top.budget_id]
    pending += sum(budget.money.available for budget in case.tree.below(top.budget_id))
    pending -= sum(budget.money.available for budget in eager)
    draft.touch(top.budget_id).closed = True
    returned = draft.collect(top.budget_id)
    returned += sum(draft.collect(budget.budget_id) for budget in eager)
    return draft.accept(
        operation,
        case.actor,
        case.position,
        amount=returned,
        consumed=consumed,
        returned=returned,
        pending=pending,
    )


def _eager(tree: Tree, top: Budget) -> list[Budget]:
    """The descendants that are emptied with the closing itself."""
    below = (budget for budget in tree.below(top.budget_id) if budget.money.available)
    return sorted(below, key=lambda budget: budget.budget_id)[: limits.EAGER_COLLECTIONS_MAX]


def _collect(case: Case, collect: Collect, budget: Budget, consumed: bytes | None) -> _Decision:
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


def _resolve(case: Case, resolve: Resolve, budget: Budget, consumed: bytes | None) -> _Decision:
    hold = _own_hold(case, budget, resolve.hold_id)
    if isinstance(hold, Refused):
        return hold
    by_admin = isinstance(resolve.authority, ByRole)
    if not hold.settleable and not by_admin:
        return _hold_ended(hold)
    ended_token = hold.token if hold.settleable else None
    draft = Draft(case.tree, case.at)
    if not by_admin:
        draft.touch(budget.budget_id).token = resolve.next_token_id
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
    case: Case, operation: Freeze | Unfreeze, budget: Budget, consumed: bytes | None
) -> _Decision:
    refused = check_state(case, operation.kind, budget)
    if refused is not None:
        return refused
    draft = Draft(case.tree, case.at)
    draft.touch(budget.budget_id).frozen = isinstance(operation, Freeze)
    return draft.accept(operation, case.actor, case.position, amount=0, consumed=consumed)


def _lapse(case: Case, lapse: Lapse, budget: Budget, consumed: bytes | None) -> _Decision:
    hold = _own_hold(case, budget, lapse.hold_id)
    if isinstance(hold, Refused):
        return hold
    if hold.state is not HoldState.LIVE:
        return _hold_ended(hold)
    if hold.expires_at > case.at:
        return _not_due(budget, hold.expires_at)
    hold = hold._replace(state=HoldState.LAPSED)
    draft = Draft(case.tree, case.at)
    lapsing = draft.touch(budget.budget_id)
    lapsing.holds_live -= 1
    lapsing.held -= hold.remaining
    lapsing.forfeited += hold.remaining
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


def _known_hold(case: Case, hold_id: bytes) -> Hold:
    """The hold, whose token was found live before."""
    hold = case.tree.holds[hold_id]
    assert hold is not None
    return hold


def _own_hold(case: Case, budget: Budget, hold_id: bytes) -> Hold | Refused:
    hold = case.tree.holds[hold_id]
    if hold is None or hold.budget_id != budget.budget_id:
        return Refused(Refusal.HOLD_UNKNOWN, named(case.tree, budget) | {"hold": id_text(hold_id)})
    return hold


def _hold_ended(hold: Hold) -> Refused:
    return Refused(Refusal.HOLD_ENDED, {"hold": id_text(hold.hold_id), "state": hold.state.name})


def _not_due(budget: Budget, due_at: int | None) -> Refused:
    facts = {"budget": id_text(budget.budget_id)}
    if due_at is not None:
        facts["due_at"] = time_text(due_at)
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
    _, hold_id, token, state, amount, remaining, booked_before, disputed_before, *times = hold
    disputed = 0 if limit is None else max(0, total - amount - limit)
    booked = total - disputed
    spent = booked - booked_before
    booking = draft.touch(budget.budget_id)
    if state is HoldState.LAPSED:
        booking.forfeited -= remaining
    else:
        booking.held -= remaining
    booking.spent += spent
    booking.holds_live -= state is HoldState.LIVE
    booking.disputes += (disputed > 0) - (state is HoldState.DISPUTED)
    booking.disputed += disputed - disputed_before
    freed = remaining - spent
    if freed > 0:
        draft.inflow(budget.budget_id, freed)
    else:
        draft.outflow(budget.budget_id, -freed)
    ended_as = HoldState.DISPUTED if disputed else HoldState.SETTLED
    ended = new(
        Hold,
        (budget.budget_id, hold_id, token, ended_as, amount, 0, booked, disputed, *times),
    )
    draft.put_hold(ended)
    return ended


# -- Descendants ------------------------------------------------------------------------------------


def _descendant(case: Case, budget: Budget, descendant_id: bytes) -> Budget | Refused:
    descendant = case.tree.budgets[descendant_id]
    if descendant is None or budget.budget_id not in descendant.ancestors:
        return Refused(
            Refusal.DESCENDANT_UNKNOWN,
            named(case.tree, budget) | {"descendant": id_text(descendant_id)},
        )
    return descendant


def _open_child(tree: Tree, budget: Budget) -> bytes | None:
    for other in tree.below(budget.budget_id):
        if other.parent_id == budget.budget_id and not other.closed:
            return other.budget_id
    return tree.open_child[budget.budget_id]
