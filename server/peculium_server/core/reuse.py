"""A secret that a second principal shows: how the theft of a capability comes to light.

Each token has one owner at a time. So whoever shows the secret of a token that another principal has
consumed, or that is bound to another, has a secret that two of them know. It changes no answer: what is
told here is recorded beside it, and may freeze the budget.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from peculium_server.core.operations import (
    HOLD_OPERATIONS,
    SYSTEM,
    Actor,
    ByRole,
    Freeze,
    Kind,
    Role,
)
from peculium_server.core.refusals import id_text
from peculium_server.core.state import Budget, Consumption
from peculium_server.core.sweeping import system_id

GUARD = Actor(SYSTEM.principal, Role.ADMIN)
"""Whoever freezes what a stolen secret leads to: the ledger itself, by a name that no caller can have."""

_OF_HOLDS = frozenset(operation.kind for operation in HOLD_OPERATIONS)


class ReuseKind(IntEnum):
    """Whose secret was shown. Numbers are those of the wire and of the rows."""

    CONSUMED_TOKEN = 1
    """A budget's, which another principal had consumed."""
    CONSUMED_HOLD_TOKEN = 2
    """A hold's, which another principal had consumed."""
    BOUND_TOKEN = 3
    """The live one of a budget that is bound to another principal."""


class Reuse(NamedTuple):
    """A secret was shown by another than whose it is, or was."""

    kind: ReuseKind
    at: int
    """When it was noticed, by the database's clock."""
    holder: str | None
    """Whom the budget is bound to."""
    frozen: bool
    """The budget is, by itself."""
    consumption: Consumption | None
    """Of the token; None of a live one."""


def reuse_of(principal: str, budget: Budget, consumption: Consumption, at: int) -> Reuse | None:
    """What it is a sign of that a principal presents a token that was consumed; None: of nothing.

    Nobody's own token is: retries come from whoever consumed it. What a Recover or Resolve has ended was
    ended on somebody's word, who need not know the secret, so it is no sign that two of them know it:
    the owner from before is fenced, and no thief. But who recovers as the holder ends a token that was
    bound to that holder, and nobody else's.

    Args:
        principal: Who presents it.
        budget: Of the token.
        consumption: Who consumed it.
        at: The time of the decision.
    """
    by = consumption.principal
    if by == principal:
        return None
    kind = ReuseKind.CONSUMED_HOLD_TOKEN if _of_hold(consumption) else ReuseKind.CONSUMED_TOKEN
    if not consumption.shown and (kind is ReuseKind.CONSUMED_HOLD_TOKEN or by != budget.holder):
        return None
    return Reuse(kind, at, budget.holder, budget.frozen, consumption)


def _of_hold(consumption: Consumption) -> bool:
    """Say whether the token was a hold's: one that settled or released it, or went with its budget's."""
    kind = consumption.kind
    if consumption.shown:
        return kind in _OF_HOLDS
    return kind is Kind.RESOLVE or consumption.part > 0


def freezes(reuse: Reuse, window_us: int) -> bool:
    """Say whether it freezes the budget, where tokens do that for so long after they were consumed.

    A hold's token moves nothing that a freeze would stop, and a bound one is of no use to who has shown it.
    """
    consumption = reuse.consumption
    return (
        reuse.kind is ReuseKind.CONSUMED_TOKEN
        and consumption is not None
        and not reuse.frozen
        and reuse.at - consumption.at <= window_us
    )


def freeze(root_id: bytes, budget_id: bytes, consumption: Consumption) -> Freeze:
    """Freeze the budget of a token that was consumed.

    The id is made of the operation that consumed it, so that a token freezes its budget once, whoever
    presents it, how often, and to whichever server: who has unfrozen it has seen that.
    """
    consumed_by = consumption.operation_id
    return Freeze(
        operation_id=system_id(Kind.FREEZE, consumed_by),
        root_id=root_id,
        budget_id=budget_id,
        authority=ByRole(),
        reason=f"the token that operation {id_text(consumed_by)} consumed was shown by another principal",
    )
