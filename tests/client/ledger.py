"""A ledger in this process, on a real socket, whose connection a test can cut, hold up and repeat.

Its decisions are those of the server's pure core over a tree in memory, so tokens rotate, chains
hold and replays compare as they really do. What is made up here is only the storage, and the faults.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar, cast

import grpc
from google.protobuf.message import Message

from peculium.v1 import (
    admin_service_pb2 as admin,
    admin_service_pb2_grpc,
    audit_service_pb2 as audit,
    audit_service_pb2_grpc,
    ledger_service_pb2 as wire,
    ledger_service_pb2_grpc,
    types_pb2,
)
from peculium_server.core import sweeping
from peculium_server.core.batch import Request, decide_group
from peculium_server.core.footprint import Footprint
from peculium_server.core.operations import (
    SYSTEM,
    Actor,
    ByHolder,
    ByToken,
    Operation,
    Role,
)
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.core.state import Budget, Custody, Hold, Tree
from peculium_server.lanes.answers import Answer, Position, Unanswered, Unavailability
from peculium_server.rpc import responses, status
from peculium_server.rpc.requests import decode, decode_authority, decode_batched

PRINCIPAL = "dev"
INCARNATION = bytes(range(16))
NO_ANSWER = Answer(Unanswered(Unavailability.DATABASE_UNAVAILABLE, {}, 10), None)

_K = TypeVar("_K")
_V = TypeVar("_V")


class Known(dict[_K, _V | None]):
    """What is absent does not exist."""

    def __missing__(self, key: _K) -> None:
        return None


class WholeTree(Tree):
    """A tree of which everything is known."""

    def __init__(self, root_id: bytes) -> None:
        super().__init__(root_id)
        for name in ("budgets", "holds", "consumed", "hold_tokens", "recorded", "names"):
            setattr(self, name, Known())


@dataclass
class Fault:
    """What becomes of one Batch call."""

    done: bool
    """The operations are decided, before the call ends as follows."""
    code: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE
    """How it ends; None: with its answer."""
    until: threading.Event | None = None
    """It does not end before this is set, or the call is over."""
    unanswered: Callable[[int], bool] | None = None
    """Which operations, by index, get no answer although they may be decided."""
    reached: threading.Event = field(default_factory=threading.Event)
    """Set when the call has come as far as it does."""


class Ledger:
    """Trees in memory, and every Batch that was asked for."""

    def __init__(self) -> None:
        self.trees: dict[bytes, WholeTree] = {}
        self.faults: deque[Fault] = deque()
        self.verdict = threading.Event()
        """Cleared: a verification does not end before this is set, or the call is over."""
        self.verdict.set()
        self.batches: list[wire.BatchRequest] = []
        self.keys: list[str | None] = []
        self.principal = PRINCIPAL
        self.incarnation = INCARNATION
        self.position = 0
        self.ahead_us = 0
        """How far the ledger's clock is ahead of this machine's."""
        self.lock = threading.Lock()
        self.arrived = threading.Condition(self.lock)

    # --- faults ---

    def lose_answers(self, times: int = 1) -> None:
        """Decide, but do not answer."""
        self.faults.extend(Fault(done=True) for _ in range(times))

    def lose_requests(self, times: int = 1) -> None:
        """Neither decide nor answer."""
        self.faults.extend(Fault(done=False) for _ in range(times))

    def hold_up(self, *, done: bool = True) -> Fault:
        """Answer only once `until` is set."""
        fault = Fault(done=done, code=None, until=threading.Event())
        self.faults.append(fault)
        return fault

    def wait_for_batches(self, count: int) -> None:
        """Wait until so many requests have come, in all."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.batches) >= count, 10)

    # --- decisions ---

    def decide(self, messages: list[Operation | Refused], actor: Actor) -> list[Answer]:
        """Decide the operations of one request, and keep what they change."""
        with self.lock:
            group = [
                Request(operation, actor, index)
                for index, operation in enumerate(messages)
                if not isinstance(operation, Refused)
            ]
            trees: dict[bytes, Tree] = {}
            for request in group:
                self._load(request.operation, trees)
            now = self.now()
            answers, accepted = decide_group(trees, group, now, self.position)
            self.position += len(accepted)
            told = iter(answers)
            return [
                self._answer(message if isinstance(message, Refused) else next(told))
                for message in messages
            ]

    def answer(
        self, request: wire.BatchRequest, unanswered: Callable[[int], bool] | None = None
    ) -> wire.BatchResponse:
        """Decide a batch; some of it, by index, gets no answer all the same."""
        decoded = [decode_batched(operation) for operation in request.operations]
        answers = self.decide(decoded, Actor(self.principal, Role.AGENT))
        response = wire.BatchResponse()
        for index, answer in enumerate(answers):
            told = NO_ANSWER if unanswered is not None and unanswered(index) else answer
            responses.write_answer(told, response.results.add())
        return response

    def grant(self, request: admin.GrantRequest) -> None:
        """Make a root, without a connection."""
        [answer] = self.decide([decode(request)], Actor(self.principal, Role.ADMIN))
        assert isinstance(answer.result, Outcome), answer

    def now(self) -> int:
        """The ledger's clock."""
        return time.time_ns() // 1000 + self.ahead_us

    def standing(self) -> Position:
        """Where the ledger stands."""
        return Position(self.incarnation, 0, self.position)

    def backup(self) -> Callable[[], None]:
        """Keep what there is now; call what is returned to go back to it."""
        trees, position = copy.deepcopy(self.trees), self.position

        def restore() -> None:
            with self.lock:
                self.trees, self.position = trees, position

        return restore

    def last_use(self, budget: Budget) -> int | None:
        """When a token of a token-held budget was last consumed."""
        if budget.custody is Custody.PRINCIPAL:
            return None
        consumed = self.trees[budget.root_id].consumed
        uses = [use.at for key, use in consumed.items() if use and key[0] == budget.budget_id]
        return max(uses, default=None)

    def lapse(self, hold_id: bytes) -> None:
        """Let a hold's time be over."""
        [tree] = [tree for tree in self.trees.values() if tree.holds[hold_id] is not None]
        hold = tree.holds[hold_id]
        assert hold is not None
        lapse = sweeping.lapse(tree.root_id, hold.budget_id, hold_id)
        [answer] = self.decide([lapse], SYSTEM)
        assert isinstance(answer.result, Outcome), answer

    def _load(self, operation: Operation, trees: dict[bytes, Tree]) -> None:
        tree = self.trees.setdefault(operation.root_id, WholeTree(operation.root_id))
        trees[operation.root_id] = tree
        named = Footprint()
        named.add(operation)
        tree.pending = dict.fromkeys(named.subtrees, 0)
        tree.open_child = dict.fromkeys(named.subtrees)
        for budget_id in named.open_holds:
            tree.open_holds[budget_id] = tuple(self.holds(tree, budget_id))
        for parent_id, name in named.names:
            if parent_id is None:
                tree.names[None, name] = next(
                    (
                        root.root_id
                        for root in self.trees.values()
                        if (top := root.budgets[root.root_id]) is not None and top.name == name
                    ),
                    None,
                )

    @staticmethod
    def holds(tree: Tree, budget_id: bytes) -> Iterator[Hold]:
        """The holds of a budget that can still be settled."""
        for hold in sorted(tree.holds.values(), key=lambda hold: hold.hold_id if hold else b""):
            if hold is not None and hold.settleable and hold.budget_id == budget_id:
                yield hold

    def _answer(self, answer: Outcome | Refused) -> Answer:
        return Answer(answer, self.standing())

    # --- what a test looks at ---

    def budget(self, path: str) -> Budget:
        """A budget by its path."""
        found = self.find(path)
        assert found is not None, f"no budget {path}"
        return found

    def find(self, path: str) -> Budget | None:
        """A budget by its path, if there is one."""
        names = path.split("/")
        for tree in self.trees.values():
            for budget in tree.budgets.values():
                if budget is not None and self.names(budget) == names:
                    return budget
        return None

    def names(self, budget: Budget) -> list[str]:
        """The names of a budget's path."""
        tree = self.trees[budget.root_id]
        return [level.name for level in tree.line(budget)][::-1]

    def live_holds(self, path: str) -> list[Hold]:
        """The holds of a budget that can still be settled."""
        budget = self.budget(path)
        return list(self.holds(self.trees[budget.root_id], budget.budget_id))

    def recorded(self) -> int:
        """How many operations were accepted."""
        return sum(len(tree.recorded) for tree in self.trees.values())


class Services(
    ledger_service_pb2_grpc.LedgerServiceServicer,
    admin_service_pb2_grpc.AdminServiceServicer,
    audit_service_pb2_grpc.AuditServiceServicer,
):
    """The three services before a ledger in memory."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def Batch(self, request: wire.BatchRequest, context: Any) -> wire.BatchResponse:
        self._note(context)
        with self.ledger.lock:
            self.ledger.batches.append(request)
            self.ledger.arrived.notify_all()
            fault = self.ledger.faults.popleft() if self.ledger.faults else None
        response = wire.BatchResponse()
        if fault is None or fault.done:
            response = self.ledger.answer(request, fault.unanswered if fault else None)
        if fault is not None:
            fault.reached.set()
            if fault.until is not None:
                remaining = max(0.0, min(context.time_remaining(), 30.0))
                if not fault.until.wait(timeout=remaining):
                    context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the call is over")
            if fault.code is not None:
                context.abort(fault.code, "the test says so")
        return response

    def GetBudget(self, request: Any, context: Any) -> Any:
        self._note(context)
        if isinstance(request, audit.GetBudgetRequest):
            return self._get_for_audit(request, context)
        response = wire.LedgerServiceGetBudgetResponse()
        budget = self._authorised(request.budget, request.authority, context)
        self._write(budget, response.budget)
        responses.write_position(self.ledger.standing(), response.ledger)
        responses.write_use(self.ledger.last_use(budget), self.ledger.now(), response)
        return response

    def ListHolds(self, request: wire.ListHoldsRequest, context: Any) -> wire.ListHoldsResponse:
        budget = self._authorised(request.budget, request.authority, context)
        found = list(self.ledger.holds(self.ledger.trees[budget.root_id], budget.budget_id))
        start = int(request.page_token or "0")
        # Small pages, whatever is asked for: a client has to follow them.
        page = wire.ListHoldsResponse(next_page_token=str(start + 2) if found[start + 2 :] else "")
        for hold in found[start : start + 2]:
            responses.write_hold(hold, page.holds.add())
        responses.write_position(self.ledger.standing(), page.ledger)
        return page

    def _get_for_audit(
        self, request: audit.GetBudgetRequest, context: Any
    ) -> audit.GetBudgetResponse:
        response = audit.GetBudgetResponse()
        budget = self._found(request.budget)
        if budget is None:
            self._refuse(Refusal.BUDGET_UNKNOWN, {"budget": request.budget.path}, context)
        self._write(budget, response.budget)
        return response

    def ListBudgets(
        self, request: audit.ListBudgetsRequest, context: Any
    ) -> audit.ListBudgetsResponse:
        self._note(context)
        trees = self.ledger.trees.values()
        roots = [root for tree in trees if (root := tree.budgets[tree.root_id]) is not None]
        start = int(request.page_token or "0")
        page = audit.ListBudgetsResponse(
            next_page_token=str(start + 1) if roots[start + 1 :] else ""
        )
        for budget in roots[start : start + 1]:
            self._write(budget, page.budgets.add())
        return page

    def Verify(self, request: audit.VerifyRequest, context: Any) -> Iterator[audit.VerifyResponse]:
        yield audit.VerifyResponse(entries=1, trees=0)
        context.add_callback(self.ledger.verdict.set)
        self.ledger.verdict.wait(30.0)
        if request.HasField("tree") and self._found(request.tree) is None:
            self._refuse(Refusal.BUDGET_UNKNOWN, {"budget": request.tree.path}, context)
        yield audit.VerifyResponse(entries=2, trees=1, verdict=audit.Verdict(verified=True))

    def Grant(self, request: Any, context: Any) -> Any:
        return self._administer(request, admin.GrantResponse(), context)

    def TopUp(self, request: Any, context: Any) -> Any:
        return self._administer(request, admin.TopUpResponse(), context)

    def Withdraw(self, request: Any, context: Any) -> Any:
        return self._administer(request, admin.WithdrawResponse(), context)

    def Freeze(self, request: Any, context: Any) -> Any:
        return self._administer(request, admin.FreezeResponse(), context)

    def Unfreeze(self, request: Any, context: Any) -> Any:
        return self._administer(request, admin.UnfreezeResponse(), context)

    def Recover(self, request: Any, context: Any) -> Any:
        return self._administer(request, admin.AdminServiceRecoverResponse(), context)

    def Resolve(self, request: Any, context: Any) -> Any:
        return self._administer(request, admin.AdminServiceResolveResponse(), context)

    def _administer(self, request: Message, response: Any, context: Any) -> Any:
        self._note(context)
        fault = self.ledger.faults.popleft() if self.ledger.faults else None
        if fault is not None and not fault.done:
            context.abort(fault.code, "the test says so")
        [answer] = self.ledger.decide([decode(request)], Actor(self.ledger.principal, Role.ADMIN))
        if fault is not None:
            context.abort(fault.code, "the test says so")
        if isinstance(answer.result, Refused):
            self._refuse(answer.result.reason, answer.result.facts, context)
        assert isinstance(answer.result, Outcome)
        responses.write_outcome(answer.result, answer.position, response.outcome)
        return response

    def _authorised(
        self, named: types_pb2.BudgetRef, authority: types_pb2.Authority, context: Any
    ) -> Budget:
        budget = self._found(named)
        proof = decode_authority(authority)
        held = isinstance(proof, ByHolder) and budget and budget.holder == self.ledger.principal
        owned = isinstance(proof, ByToken) and budget and budget.token == proof.token_id
        if budget is None or not (held or owned):
            self._refuse(Refusal.CAPABILITY_UNKNOWN, {"budget": named.path}, context)
        return budget

    def _found(self, named: types_pb2.BudgetRef) -> Budget | None:
        if named.path:
            return self.ledger.find(named.path)
        tree = self.ledger.trees.get(named.root_id)
        return None if tree is None else tree.budgets[named.budget_id]

    def _write(self, budget: Budget, message: types_pb2.Budget) -> None:
        path = self.ledger.names(budget)
        levels = self.ledger.trees[budget.root_id].line(budget)
        state = max(level.state(self.ledger.now()) for level in levels)
        responses.write_budget(budget, path, state, message)

    def _note(self, context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        self.ledger.keys.append(metadata.get("authorization"))

    @staticmethod
    def _refuse(reason: Refusal, facts: dict[str, str], context: Any) -> NoReturn:
        context.abort_with_status(status.of_refused(Refused(reason, facts)))
        raise AssertionError("abort raises")


@dataclass(frozen=True)
class Serving:
    """A running ledger."""

    ledger: Ledger
    target: str


@contextmanager
def serving() -> Iterator[Serving]:
    """Run a ledger on a free port."""
    ledger = Ledger()
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=16), options=[("grpc.so_reuseport", 0)]
    )
    # The published type of a servicer is abstract; what is not overridden answers UNIMPLEMENTED.
    services = cast("Any", Services)(ledger)
    ledger_service_pb2_grpc.add_LedgerServiceServicer_to_server(services, server)
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(services, server)
    audit_service_pb2_grpc.add_AuditServiceServicer_to_server(services, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield Serving(ledger, f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()
