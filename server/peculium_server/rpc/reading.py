"""Reads: which budget is meant, may the caller see it, and what is to be told of it."""

from __future__ import annotations

from collections.abc import Sequence
from hmac import compare_digest
from typing import Final, NamedTuple

from peculium.v1 import types_pb2
from peculium_server.core.limits import DEPTH_MAX, ID_BYTES, NAME_BYTES_MAX
from peculium_server.core.operations import ByHolder, ByToken
from peculium_server.core.refusals import Refusal, Refused, id_text
from peculium_server.core.shape import NOT_TOLD, has_secret
from peculium_server.core.state import Budget, BudgetState, Custody
from peculium_server.lanes.answers import Position
from peculium_server.rpc import scope
from peculium_server.rpc.calls import CallRefused, actor
from peculium_server.rpc.requests import decode_authority
from peculium_server.store.store import Found, Store

_PATH_BYTES_MAX: Final = DEPTH_MAX * (NAME_BYTES_MAX + 1)


class Line(NamedTuple):
    """A budget with all that a reader needs of its ancestors."""

    budget: Budget
    path: tuple[str, ...]
    """Names from the root downwards."""
    state: BudgetState
    """What it allows, its ancestors considered."""
    at: int
    """The ledger's time of the read."""


class Reader:
    """Reads budgets for callers who may see them."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def for_authority(
        self, reference: types_pb2.BudgetRef, authority: types_pb2.Authority
    ) -> tuple[Line, Position]:
        """The budget that the caller has authority over, by its live token or as its holder.

        Raises:
            CallRefused: CAPABILITY_UNKNOWN, whether the secret is wrong, or the budget unknown or
                another's; MALFORMED.
        """
        proof = decode_authority(authority)
        if isinstance(proof, Refused):
            raise CallRefused(proof)
        if not isinstance(proof, ByToken | ByHolder):
            raise CallRefused.malformed("authority", "must be a secret or the holder")
        read = await self._read(reference)
        if read is None or not _authorised(proof, read[0].budget, actor().principal):
            raise CallRefused(Refused(Refusal.CAPABILITY_UNKNOWN, {"budget": _said(reference)}))
        return read

    async def for_auditor(self, reference: types_pb2.BudgetRef) -> tuple[Line, Position]:
        """The budget, for a caller who may see all of them.

        Raises:
            CallRefused: BUDGET_UNKNOWN or MALFORMED.
        """
        read = await self._read(reference)
        if read is None:
            raise CallRefused(Refused(Refusal.BUDGET_UNKNOWN, {"budget": _said(reference)}))
        return read

    async def for_auditor_or_all(
        self, reference: types_pb2.BudgetRef | None
    ) -> tuple[Line, Position] | None:
        """The budget; where none is named, None for a caller who may see all trees.

        Raises:
            CallRefused: PERMISSION_DENIED: the caller is limited to some trees, and named none of them;
                BUDGET_UNKNOWN or MALFORMED.
        """
        if reference is None:
            scope.check_all_roots()
            return None
        return await self.for_auditor(reference)

    async def last_use(self, budget: Budget) -> int | None:
        """When a token of a token-held budget was last consumed, as of now or later than it was read.

        Whoever finds that there was none, and that the budget has no more entries than were read before,
        knows that nobody has used it.
        """
        if budget.custody is Custody.PRINCIPAL:
            return None
        return await self._store.last_use(budget.root_id, budget.budget_id)

    async def lines(self, budgets: Sequence[Budget]) -> list[Line]:
        """The lines of budgets that were read from one tree, or of roots."""
        if not budgets:
            return []
        root_id = budgets[0].root_id
        known = {budget.budget_id: budget for budget in budgets}
        missing = {above for budget in budgets for above in budget.ancestors} - known.keys()
        if missing:
            above = await self._store.budgets(root_id, sorted(missing))
            known |= {each.budget_id: each for each in above}
        standing = await self._store.standing(self._store.lane_of(root_id))
        return [
            line_of((budget, *(known[ancestor] for ancestor in budget.ancestors)), standing.now)
            for budget in budgets
        ]

    async def ancestry(self, budget: Budget) -> tuple[Budget, ...]:
        """A budget that was read, and its ancestors, upwards."""
        return await self._store.budget(budget.root_id, budget.budget_id)

    async def _read(self, reference: types_pb2.BudgetRef) -> tuple[Line, Position] | None:
        found = await self._find(reference)
        if found is None:
            return None
        ancestry = await self._store.budget(found.root_id, found.budget_id)
        if not ancestry:
            return None
        lane = self._store.lane_of(found.root_id)
        standing = await self._store.standing(lane)
        position = Position(self._store.incarnation, lane, standing.position)
        return line_of(ancestry, standing.now), position

    async def _find(self, reference: types_pb2.BudgetRef) -> Found | None:
        path = reference.path
        if not path:
            for field in ("root_id", "budget_id"):
                if len(getattr(reference, field)) != ID_BYTES:
                    raise CallRefused.malformed(
                        f"budget.{field}", f"must be {ID_BYTES} bytes, or give a path"
                    )
            scope.check_root(reference.root_id, id_text(reference.root_id))
            return Found(reference.root_id, reference.budget_id)
        if reference.root_id or reference.budget_id:
            raise CallRefused.malformed(
                "budget", "must be named by its ids or by its path, not by both"
            )
        if has_secret(path):
            # Whoever is told that there is no such budget is told which, and may log it.
            raise CallRefused.malformed("budget.path", NOT_TOLD)
        # No name has such characters, and the database would not take them for text.
        findable = len(path.encode()) <= _PATH_BYTES_MAX and min(path) >= " "
        if scope.roots() is not None:
            name = path.partition("/")[0]
            root = await self._store.find(name) if findable else None
            scope.check_root(
                None if root is None else root.root_id, _said(reference).partition("/")[0]
            )
        return await self._store.find(path) if findable else None


def _authorised(proof: ByToken | ByHolder, budget: Budget, principal: str) -> bool:
    if isinstance(proof, ByHolder):
        return budget.holder == principal
    return (
        budget.token is not None
        and compare_digest(budget.token, proof.token_id)
        and budget.holder in (None, principal)
    )


def line_of(ancestry: Sequence[Budget], now: int) -> Line:
    """A budget with what is to be told of its ancestors, at a time; it comes first, the root last."""
    path = tuple(budget.name for budget in reversed(ancestry))
    # The numbers of the states ascend with their strictness.
    return Line(ancestry[0], path, max(budget.state(now) for budget in ancestry), now)


def _said(reference: types_pb2.BudgetRef) -> str:
    """The budget as the caller has named it, in so far as it can be one."""
    if reference.path:
        return reference.path.encode()[:_PATH_BYTES_MAX].decode(errors="ignore")
    return id_text(reference.budget_id)
