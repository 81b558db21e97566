"""One principal who spends from roots by name, through any writer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peculium_server.core.batch import Request, decide_group
from peculium_server.core.footprint import Footprint
from peculium_server.core.operations import ByHolder, Grant, Operation, Spend
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refused
from peculium_server.core.state import Accepted
from peculium_server.store.lane import LaneWriter, Loaded
from peculium_server.store.store import Store
from tests.core.ledger import ADMIN, AGENT, Ledger

Watch = Callable[[Loaded], None]


class Spender:
    """Counts how often its operations were decided."""

    def __init__(self) -> None:
        self.ids = Ledger()
        self.decisions = 0

    def ask(self, root: Grant, amount: int = 1) -> Spend:
        return Spend(
            operation_id=self.ids.id(),
            root_id=root.root_id,
            budget_id=root.root_id,
            authority=ByHolder(),
            amount=amount,
        )

    async def grant(self, store: Store, amount: int = 1_000, *, lane: int | None = None) -> Grant:
        """Make a root, in a lane if that is given."""
        grant = self.ids.ask_grant(amount, holder=AGENT.principal, by_token=False)
        while lane is not None and store.lane_of(grant.root_id) != lane:
            grant = self.ids.ask_grant(amount, holder=AGENT.principal, by_token=False)
        await self.do(store.writer(store.lane_of(grant.root_id)), grant)
        return grant

    async def spend(self, writer: LaneWriter, root: Grant, amount: int = 1) -> Outcome:
        """Spend, which has to be accepted."""
        answer = await self.do(writer, self.ask(root, amount))
        assert isinstance(answer, Outcome), answer.message
        return answer

    async def do(
        self,
        writer: LaneWriter,
        operation: Operation,
        *,
        deadline: float | None = None,
        watch: Watch | None = None,
        sent: Callable[[], None] = lambda: None,
    ) -> Outcome | Refused:
        """Do one operation; `watch` sees what was loaded, before each decision."""
        footprint = Footprint()
        footprint.add(operation)
        answers: list[Outcome | Refused] = []

        def decide(loaded: Loaded) -> Sequence[Accepted]:
            self.decisions += 1
            if watch is not None:
                watch(loaded)
            actor = ADMIN if isinstance(operation, Grant) else AGENT
            request = Request(operation, actor, 0)
            # By the clock that made the ids: what a holder asks for must not be old.
            answers[:], accepted = decide_group(
                loaded.trees, [request], self.ids.now, loaded.position
            )
            return accepted

        await writer.run({operation.root_id: footprint}, decide, deadline, sent)
        [answer] = answers
        return answer


async def spent(store: Store, root: Grant) -> int:
    """What the store says was spent from a root."""
    [budget] = await store.budget(root.root_id, root.root_id)
    return budget.money.spent
