"""May this caller ask this, was it asked before, and what does the state of the tree allow?

The rungs of the ladder that all kinds of operation share, in order of precedence: role, principal and
budget, the presented token, replay, consumed token, what the request would make, state, money.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from hmac import compare_digest
from typing import NamedTuple

from peculium_server.core import limits
from peculium_server.core.operations import (
    HOLD_OPERATIONS,
    PRODUCING,
    SYSTEM,
    Accept,
    Actor,
    ByHolder,
    ByRole,
    ByToken,
    Child,
    Delegate,
    Freeze,
    Grant,
    Kind,
    Operation,
    Recover,
    Reserve,
    Role,
)
from peculium_server.core.outcome import Outcome, tell
from peculium_server.core.refusals import Refusal, Refused, id_text, time_text
from peculium_server.core.reuse import Reuse, ReuseKind, reuse_of
from peculium_server.core.shape import uuid_problem
from peculium_server.core.state import (
    Budget,
    Consumption,
    Custody,
    Recorded,
    Tree,
    new,
)

ADMIN_KINDS = frozenset({Kind.GRANT, Kind.TOP_UP, Kind.WITHDRAW, Kind.FREEZE, Kind.UNFREEZE})
SYSTEM_KINDS = frozenset({Kind.LAPSE, Kind.EXPIRE, Kind.COLLECT})
SPENDING_KINDS = frozenset({Kind.RESERVE, Kind.SPEND, Kind.DELEGATE, Kind.FUND})
"""Refused while the tree's root has overrun."""
FREEZABLE_KINDS = SPENDING_KINDS | {Kind.ACCEPT, Kind.EXTEND, Kind.SETTLE}
"""Refused while the budget or an ancestor is frozen; of the settles, those that keep a hold open."""
EXPIRABLE_KINDS = FREEZABLE_KINDS | {Kind.RENEW}
"""Refused once the lease of the budget or of an ancestor has ended."""


_OPERATORS = (Role.AGENT, Role.ADMIN)


class Case(NamedTuple):
    """One operation with everything that decides about it."""

    tree: Tree
    actor: Actor
    at: int
    position: int


def check_role(operation: Operation, actor: Actor) -> Refused | None:
    """Roles: an agent operates on what it holds, an admin on everything, the ledger on time."""
    if isinstance(operation, Freeze) and actor.principal != SYSTEM.principal:
        # The ledger's own has another: nobody else takes the id of what the ledger would do.
        found = uuid_problem("operation_id", operation.operation_id)
        if found is not None:
            field, problem = found
            return Refused(Refusal.MALFORMED, {"field": field, "problem": problem})
    if operation.kind in SYSTEM_KINDS:
        needs = Role.SYSTEM
    elif isinstance(operation.authority, ByRole):
        needs = Role.ADMIN
    elif actor.role in _OPERATORS:
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


class Standing(NamedTuple):
    """The caller may operate; this is the token that the operation consumes, if any."""

    consumed: bytes | None


def stand(
    tree: Tree, operation: Operation, actor: Actor, budget: Budget | None, now: int
) -> Standing | Outcome | Refused:
    """The rungs from principal and budget to the consumed token."""
    consumption: Consumption | None = None
    reuse: Reuse | None = None
    consumed: bytes | None = None
    if budget is None:
        if not isinstance(operation, Grant):
            return _unknown(operation)
    elif isinstance(operation.authority, ByToken):
        consumed = operation.authority.token_id
        if not _is_live(tree, operation, actor, budget, consumed):
            consumption = tree.consumed[operation.budget_id, consumed]
            if consumption is None:
                return _unknown(operation, _bound(operation, budget, consumed, now))
            reuse = reuse_of(actor.principal, budget, consumption, now)
    elif isinstance(operation.authority, ByHolder):
        if not _holds(operation, actor, budget):
            return _unknown(operation)
        if budget.custody is Custody.PRINCIPAL and isinstance(operation, (Accept, Recover)):
            return Refused(
                Refusal.NOT_TOKEN_HELD,
                named(tree, budget) | {"holder": budget.holder or ""},
            )
        if isinstance(operation, Recover):
            consumed = budget.token
    elif isinstance(operation, Recover):
        consumed = budget.token
    recorded = tree.recorded[operation.operation_id]
    if recorded is not None:
        return _replay(recorded, operation, actor, reuse)
    if isinstance(operation.authority, ByHolder) and not isinstance(operation, Recover):
        refused = _check_age(operation.operation_id, now)
        if refused is not None:
            return refused
    if consumption is not None:
        return _consumed(operation, consumption, reuse)
    return new(Standing, (consumed,))


def _unknown(operation: Operation, reuse: Reuse | None = None) -> Refused:
    """One answer for a wrong secret, an unknown budget and another's; admins may know which."""
    reason = (
        Refusal.BUDGET_UNKNOWN
        if isinstance(operation.authority, ByRole)
        else Refusal.CAPABILITY_UNKNOWN
    )
    return Refused(reason, {"budget": id_text(operation.budget_id)}, reuse)


def _is_live(
    tree: Tree, operation: Operation, actor: Actor, budget: Budget, token_id: bytes
) -> bool:
    """Say whether the token is the live one of the hold or budget that the operation names.

    A budget's token that is bound to a principal is worth nothing in another's hands; a hold is
    settled by whoever has its token.
    """
    if isinstance(operation, HOLD_OPERATIONS):
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


def _bound(operation: Operation, budget: Budget, token_id: bytes, now: int) -> Reuse | None:
    """What it is a sign of that a token is not live for the caller: it may be, for whom it is bound to."""
    if isinstance(operation, HOLD_OPERATIONS) or budget.token is None:
        return None
    if not compare_digest(budget.token, token_id):
        return None
    return Reuse(ReuseKind.BOUND_TOKEN, now, budget.holder, budget.frozen, None)


def _holds(operation: Operation, actor: Actor, budget: Budget) -> bool:
    """Say whether the caller is the holder, and this is how the budget may be used."""
    by_name_alone = budget.custody is Custody.PRINCIPAL or isinstance(operation, Recover)
    return by_name_alone and budget.holder == actor.principal


def _replay(
    recorded: Recorded, operation: Operation, actor: Actor, reuse: Reuse | None
) -> Outcome | Refused:
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
            {"operation": id_text(operation.operation_id), "field": differs},
            reuse,
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
            "operation": id_text(operation_id),
            "age_seconds": str(age // limits.SECOND_US),
            "limit_seconds": str(limits.OPERATION_AGE_US_MAX // limits.SECOND_US),
        },
    )


def _consumed(operation: Operation, consumption: Consumption, reuse: Reuse | None) -> Refused:
    facts = {
        "budget": id_text(operation.budget_id),
        "consumed_by": id_text(consumption.operation_id),
        "consumed_at": time_text(consumption.at),
        "kind": consumption.kind.name,
    }
    if consumption.kind in (Kind.RECOVER, Kind.ACCEPT):
        facts["fenced_by"] = consumption.principal
    return Refused(Refusal.TOKEN_CONSUMED, facts, reuse)


def named(tree: Tree, budget: Budget) -> dict[str, str]:
    """Which budget, by id and by path. Told to those with authority over it only."""
    path = "/".join(level.name for level in reversed(tree.line(budget)))
    return {"budget": id_text(budget.budget_id), "path": path}


# -- What the request would make -----------------------------------------------------------------


def check_reused(tree: Tree, operation: Operation) -> Refused | None:
    """A token id to be produced was never seen in the budget or the request, ids and names are free."""
    said: set[bytes] = set()
    if isinstance(operation.authority, ByToken):
        said.add(operation.authority.token_id)
    for field, budget_id, token_id in _produced(operation):
        if token_id in said or _seen(tree, budget_id, token_id):
            return Refused(
                Refusal.TOKEN_ID_REUSED, {"budget": id_text(operation.budget_id), "field": field}
            )
        said.add(token_id)
    if isinstance(operation, Reserve):
        if tree.holds[operation.hold_id] is not None:
            return Refused(Refusal.ID_TAKEN, {"field": "hold_id", "id": id_text(operation.hold_id)})
    elif isinstance(operation, Delegate):
        return _check_new(tree, operation.budget_id, operation.children)
    elif isinstance(operation, Grant):
        return _check_new(tree, None, (operation,))
    return None


def _produced(operation: Operation) -> list[tuple[str, bytes, bytes]]:
    """Every token id that an operation would produce: the field that names it, the budget, the id."""
    budget_id = operation.budget_id
    produced = [
        (name, budget_id, token_id)
        for name in PRODUCING[operation.kind]
        if (token_id := getattr(operation, name)) is not None
    ]
    if isinstance(operation, Delegate):
        produced += [
            (f"children[{index}].token_id", child.budget_id, child.token_id)
            for index, child in enumerate(operation.children)
            if child.token_id is not None
        ]
    elif isinstance(operation, Recover):
        produced += [
            (f"holds[{index}].next_token_id", budget_id, rotation.next_token_id)
            for index, rotation in enumerate(operation.holds)
        ]
    return produced


def _seen(tree: Tree, budget_id: bytes, token_id: bytes) -> bool:
    """Say whether the budget ever had the token: live, in a hold, or consumed."""
    budget = tree.budgets[budget_id]
    if budget is None:
        return False
    key = budget_id, token_id
    return (
        (budget.token is not None and compare_digest(token_id, budget.token))
        or tree.consumed[key] is not None
        or tree.hold_tokens[key] is not None
    )


def _check_new(
    tree: Tree, parent_id: bytes | None, all_made: Sequence[Grant | Child]
) -> Refused | None:
    for made in all_made:
        if tree.budgets[made.budget_id] is not None:
            return Refused(Refusal.ID_TAKEN, {"field": "budget_id", "id": id_text(made.budget_id)})
    for made in all_made:
        if tree.names[parent_id, made.name] is not None:
            return Refused(Refusal.NAME_TAKEN, {"name": made.name})
    return None


# -- The state of the budget and of all its ancestors -----------------------------------------------


def check_state(case: Case, kind: Kind, budget: Budget) -> Refused | None:
    """The first that applies, of closed, expired, frozen and overrun, and which budget it is."""
    line = case.tree.line(budget)
    for level in line:
        if level.closed:
            return Refused(
                Refusal.BUDGET_CLOSED,
                named(case.tree, budget) | {"closed": id_text(level.budget_id)},
            )
    if kind in EXPIRABLE_KINDS:
        for level in line:
            if level.expired(case.at):
                assert level.lease_until is not None
                return Refused(
                    Refusal.BUDGET_EXPIRED,
                    named(case.tree, budget)
                    | {
                        "expired": id_text(level.budget_id),
                        "lease_expires_at": time_text(level.lease_until),
                    },
                )
    if kind in FREEZABLE_KINDS:
        if case.tree.restored:
            return Refused(
                Refusal.BUDGET_FROZEN,
                named(case.tree, budget)
                | {
                    "frozen": id_text(line[-1].budget_id),
                    "by": "restore",
                    "remedy": "have_an_operator_run_peculium_restored",
                },
            )
        for level in line:
            if level.frozen or level.disputes:
                return Refused(
                    Refusal.BUDGET_FROZEN,
                    named(case.tree, budget)
                    | {
                        "frozen": id_text(level.budget_id),
                        "by": "admin" if level.frozen else "dispute",
                    },
                )
    root = line[-1]
    if kind in SPENDING_KINDS and root.money.overrun:
        return Refused(
            Refusal.TREE_OVERRUN,
            named(case.tree, budget)
            | {
                "root": id_text(root.budget_id),
                "overrun": str(root.money.overrun),
            },
        )
    return None


def check_available(case: Case, budget: Budget, requested: int) -> Refused | None:
    """What is available bounds what is asked; live holds may free more."""
    money = budget.money
    if requested <= money.available:
        return None
    waiting_helps = requested <= money.available + money.held
    return Refused(
        Refusal.BUDGET_EXHAUSTED,
        named(case.tree, budget)
        | {
            "available": str(money.available),
            "held": str(money.held),
            "requested": str(requested),
            "remedy": "wait_for_holds" if waiting_helps else "top_up",
        },
    )
