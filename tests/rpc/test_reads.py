from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest

from peculium.v1 import audit_service_pb2 as audit, ledger_service_pb2 as ledger, types_pb2
from peculium.v1.admin_service_pb2_grpc import AdminServiceStub
from peculium.v1.audit_service_pb2_grpc import AuditServiceStub
from peculium.v1.ledger_service_pb2_grpc import LedgerServiceStub
from peculium_server.core.encoding import token_id
from peculium_server.core.operations import (
    Accept,
    ByHolder,
    ByRole,
    ByToken,
    Child,
    Delegate,
    Freeze,
    Grant,
    Release,
    Reserve,
    TopUp,
)
from peculium_server.keyfile import KeyFile
from tests.rpc.messages import message_of
from tests.rpc.wire import Stored, info_of, storing

HOLDER = types_pb2.Authority(holder=types_pb2.Holder())


def new_id() -> bytes:
    """A UUIDv7 of now."""
    rest = bytearray(secrets.token_bytes(10))
    rest[0] = 0x70 | rest[0] & 0x0F
    rest[2] = 0x80 | rest[2] & 0x3F
    return (time.time_ns() // 1_000_000).to_bytes(6) + bytes(rest)


def granted(name: str, **changes: Any) -> Grant:
    root_id = new_id()
    held: dict[str, Any] = {"holder": "dev"}
    return Grant(
        operation_id=new_id(),
        root_id=root_id,
        budget_id=root_id,
        authority=ByRole(),
        **{"name": name, "unit": "calls", "amount": 1_000, **held, **changes},
    )


def delegated(root: Grant, parent_id: bytes, *names: str) -> Delegate:
    return Delegate(
        operation_id=new_id(),
        root_id=root.root_id,
        budget_id=parent_id,
        authority=ByHolder(),
        children=tuple(
            Child(budget_id=new_id(), name=name, amount=1, holder="dev") for name in names
        ),
    )


def reserved(root: Grant) -> Reserve:
    return Reserve(
        operation_id=new_id(),
        root_id=root.root_id,
        budget_id=root.root_id,
        authority=ByHolder(),
        amount=1,
        ttl_us=60_000_000,
        hold_id=new_id(),
        hold_token_id=secrets.token_bytes(32),
    )


def by_ids(root: Grant) -> types_pb2.BudgetRef:
    return types_pb2.BudgetRef(root_id=root.root_id, budget_id=root.budget_id)


def by_path(path: str) -> types_pb2.BudgetRef:
    return types_pb2.BudgetRef(path=path)


async def refusal(call: Any) -> tuple[str, dict[str, str]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    info = info_of(caught.value)
    return info.reason, dict(info.metadata)


@pytest.fixture
async def stored(database: str) -> AsyncIterator[Stored]:
    async with storing(database) as running:
        yield running


async def make(stored: Stored, *operations: Any) -> None:
    for operation in operations:
        by_admin = isinstance(operation, Grant | Freeze)
        stub: Any = (AdminServiceStub if by_admin else LedgerServiceStub)(stored.channel)
        method = getattr(stub, operation.kind.name.title())
        await method(message_of(operation, None if by_admin else HOLDER))


async def test_a_holder_reads_its_budget_by_path_and_by_ids(stored: Stored) -> None:
    root = granted("acme")
    child = delegated(root, root.root_id, "research")
    await make(stored, root, child)
    stub = LedgerServiceStub(stored.channel)
    ids = types_pb2.BudgetRef(root_id=root.root_id, budget_id=child.children[0].budget_id)
    for reference in (by_path("acme/research"), ids):
        read = await stub.GetBudget(
            ledger.LedgerServiceGetBudgetRequest(budget=reference, authority=HOLDER)
        )
        assert read.budget.path == "acme/research"
        assert read.budget.parent_id == root.root_id
        assert read.budget.balances == types_pb2.Balances(granted=1, available=1)
        assert read.budget.state == types_pb2.BUDGET_STATE_OPEN
        assert read.ledger.incarnation == stored.store.incarnation
        assert read.ledger.lane == stored.store.lane_of(root.root_id)
        assert read.ledger.position == 2


async def test_a_budget_is_read_with_its_live_token_which_stays_live(stored: Stored) -> None:
    secret = secrets.token_bytes(32)
    root = granted("acme", holder=None, token_id=token_id(secret))
    await make(stored, root)
    stub = LedgerServiceStub(stored.channel)
    request = ledger.LedgerServiceGetBudgetRequest(
        budget=by_path("acme"), authority=types_pb2.Authority(secret=secret)
    )
    for _ in range(2):
        assert (await stub.GetBudget(request)).budget.budget_id == root.budget_id


async def test_a_read_tells_when_a_token_was_last_used(stored: Stored) -> None:
    secret, next_secret = secrets.token_bytes(32), secrets.token_bytes(32)
    root = granted("acme", token_id=token_id(secret))
    await make(stored, root)
    stub = LedgerServiceStub(stored.channel)
    request = ledger.LedgerServiceGetBudgetRequest(budget=by_path("acme"), authority=HOLDER)
    fresh = await stub.GetBudget(request)
    assert not fresh.HasField("token_used_at")
    top_up = TopUp(
        operation_id=new_id(),
        root_id=root.root_id,
        budget_id=root.root_id,
        authority=ByRole(),
        amount=1,
    )
    accept = Accept(
        operation_id=new_id(),
        root_id=root.root_id,
        budget_id=root.root_id,
        authority=ByToken(token_id(secret)),
        next_token_id=token_id(next_secret),
    )
    accepted = await stub.Accept(message_of(accept, types_pb2.Authority(secret=secret)))
    await AdminServiceStub(stored.channel).TopUp(message_of(top_up, None))
    used = await stub.GetBudget(request)
    assert used.token_used_at == accepted.outcome.at
    assert used.budget.seq == 3
    assert used.at.ToNanoseconds() >= used.token_used_at.ToNanoseconds()
    again = replace(
        accept,
        operation_id=new_id(),
        authority=ByToken(token_id(next_secret)),
        next_token_id=secrets.token_bytes(32),
    )
    accepted = await stub.Accept(message_of(again, types_pb2.Authority(secret=next_secret)))
    assert (await stub.GetBudget(request)).token_used_at == accepted.outcome.at


async def test_of_a_principals_budget_no_use_of_a_token_is_told(stored: Stored) -> None:
    root, secret = granted("acme"), secrets.token_bytes(32)
    reserve = replace(reserved(root), hold_token_id=token_id(secret))
    await make(stored, root, reserve)
    stub = LedgerServiceStub(stored.channel)
    release = Release(
        operation_id=new_id(),
        root_id=root.root_id,
        budget_id=root.root_id,
        authority=ByToken(token_id(secret)),
        hold_id=reserve.hold_id,
    )
    await stub.Release(message_of(release, types_pb2.Authority(secret=secret)))
    request = ledger.LedgerServiceGetBudgetRequest(budget=by_path("acme"), authority=HOLDER)
    read = await stub.GetBudget(request)
    assert not read.HasField("token_used_at")
    assert read.HasField("at")


async def test_who_has_no_authority_learns_nothing(database: str, tmp_path: Path) -> None:
    keys = {"admin": "admin", "agent": "mallory", "auditor": "auditor"}
    file = tmp_path / "keys.toml"
    file.write_text(
        "".join(
            f'[[keys]]\nprincipal = "{name}"\nrole = "{role}"\n'
            f'sha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
            for role, name in keys.items()
        )
    )
    secret = secrets.token_bytes(32)
    held = granted("held", holder="alice")
    bound = granted("bound", holder="alice", token_id=token_id(secret))
    async with storing(database, KeyFile.load(file)) as stored:
        admin = (("authorization", "Bearer admin"),)
        for root in (held, bound):
            await AdminServiceStub(stored.channel).Grant(message_of(root, None), metadata=admin)
        mallory = (("authorization", "Bearer mallory"),)
        by_secret = types_pb2.Authority(secret=secret)
        by_wrong = types_pb2.Authority(secret=secrets.token_bytes(32))
        stub = LedgerServiceStub(stored.channel)
        for reference, proof in (
            (by_path("held"), HOLDER),
            (by_path("bound"), by_secret),
            (by_path("bound"), by_wrong),
            (by_path("held"), by_secret),
            (by_path("nothing"), HOLDER),
            (by_path("bound/nothing"), HOLDER),
            (by_path("con\x00trol"), HOLDER),
            (by_path("x" * 5_000), HOLDER),
            (types_pb2.BudgetRef(root_id=new_id(), budget_id=new_id()), HOLDER),
            (by_ids(held), HOLDER),
        ):
            for call, request in (
                (stub.GetBudget, ledger.LedgerServiceGetBudgetRequest),
                (stub.ListHolds, ledger.ListHoldsRequest),
            ):
                made: Any = request(budget=reference, authority=proof)
                asked: Any = call
                reason, facts = await refusal(asked(made, metadata=mallory))
                assert reason == "CAPABILITY_UNKNOWN"
                assert facts.keys() == {"budget"}


async def test_a_read_that_names_no_budget_is_malformed(stored: Stored) -> None:
    stub = LedgerServiceStub(stored.channel)
    for reference in (
        types_pb2.BudgetRef(),
        types_pb2.BudgetRef(root_id=b"short", budget_id=new_id()),
        types_pb2.BudgetRef(root_id=new_id(), budget_id=b"short"),
        types_pb2.BudgetRef(root_id=new_id(), path="acme"),
    ):
        request = ledger.LedgerServiceGetBudgetRequest(budget=reference, authority=HOLDER)
        reason, facts = await refusal(stub.GetBudget(request))
        assert reason == "MALFORMED"
        assert facts["field"].startswith("budget")


async def test_a_read_cannot_be_chained(stored: Stored) -> None:
    request = ledger.LedgerServiceGetBudgetRequest(
        budget=by_path("acme"), authority=types_pb2.Authority(after=0)
    )
    reason, facts = await refusal(LedgerServiceStub(stored.channel).GetBudget(request))
    assert (reason, facts["field"]) == ("MALFORMED", "authority")


async def test_an_auditor_is_told_that_there_is_no_such_budget(stored: Stored) -> None:
    stub = AuditServiceStub(stored.channel)
    for reference in (
        by_path("nothing"),
        types_pb2.BudgetRef(root_id=new_id(), budget_id=new_id()),
    ):
        reason, _ = await refusal(stub.GetBudget(audit.GetBudgetRequest(budget=reference)))
        assert reason == "BUDGET_UNKNOWN"


async def test_a_budget_below_a_frozen_one_is_told_as_frozen(stored: Stored) -> None:
    root = granted("acme")
    child = delegated(root, root.root_id, "research")
    freeze = Freeze(
        operation_id=new_id(), root_id=root.root_id, budget_id=root.root_id, authority=ByRole()
    )
    await make(stored, root, child, freeze)
    stub = AuditServiceStub(stored.channel)
    read = await stub.GetBudget(audit.GetBudgetRequest(budget=by_path("acme/research")))
    assert read.budget.state == types_pb2.BUDGET_STATE_FROZEN
    listed = await stub.ListBudgets(audit.ListBudgetsRequest(below=by_path("acme")))
    assert {each.state for each in listed.budgets} == {types_pb2.BUDGET_STATE_FROZEN}


@pytest.mark.parametrize("page_size", [1, 2, 3, 1_000])
async def test_a_subtree_is_listed_whole_in_pages_with_paths(
    stored: Stored, page_size: int
) -> None:
    root = granted("acme")
    first = delegated(root, root.root_id, "a", "b")
    below = delegated(root, first.children[0].budget_id, "c")
    await make(stored, root, first, below, granted("other"))
    stub = AuditServiceStub(stored.channel)
    request = audit.ListBudgetsRequest(below=by_ids(root), page_size=page_size)
    paths = []
    while True:
        page = await stub.ListBudgets(request)
        assert len(page.budgets) <= page_size
        paths += [budget.path for budget in page.budgets]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert paths[0] == "acme"
    assert sorted(paths) == ["acme", "acme/a", "acme/a/c", "acme/b"]


@pytest.mark.parametrize("page_size", [1, 2, 1_000])
async def test_the_roots_are_listed_by_name(stored: Stored, page_size: int) -> None:
    names = ["zeta", "alpha", "mid"]
    await make(stored, *(granted(name) for name in names))
    request = audit.ListBudgetsRequest(page_size=page_size)
    listed = []
    while True:
        page = await AuditServiceStub(stored.channel).ListBudgets(request)
        listed += [budget.name for budget in page.budgets]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert listed == sorted(names)


async def test_holds_are_listed_in_pages(stored: Stored) -> None:
    root = granted("acme")
    holds = [reserved(root) for _ in range(5)]
    await make(stored, root, *holds)
    request = ledger.ListHoldsRequest(budget=by_path("acme"), authority=HOLDER, page_size=2)
    listed = []
    while True:
        page = await LedgerServiceStub(stored.channel).ListHolds(request)
        listed += [hold.hold_id for hold in page.holds]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert listed == sorted(hold.hold_id for hold in holds)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("tree", [False, True])
async def test_entries_are_listed_in_pages_and_in_order(
    stored: Stored, tree: bool, descending: bool
) -> None:
    root = granted("acme")
    child = delegated(root, root.root_id, "a", "b")
    await make(stored, root, child, *(reserved(root) for _ in range(3)))
    reach = audit.REACH_TREE if tree else audit.REACH_BUDGET
    request = audit.ListEntriesRequest(
        budget=by_path("acme"), reach=reach, descending=descending, page_size=2
    )
    listed = []
    while True:
        page = await AuditServiceStub(stored.channel).ListEntries(request)
        listed += [(entry.position, entry.part, entry.seq) for entry in page.entries]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    own = [(1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 0, 4), (5, 0, 5)]
    of_children = [(2, 1, 1), (2, 2, 1)] if tree else []
    if not descending:
        assert listed == sorted(own + of_children)
    else:
        assert [position for position, _, _ in listed] == sorted(
            (position for position, _, _ in own + of_children), reverse=True
        )
        assert sorted(listed) == sorted(own + of_children)


async def test_a_page_too_large_for_a_message_is_cut_at_an_operation(stored: Stored) -> None:
    labels = tuple((f"key{number:02}", "v" * 200) for number in range(16))
    root = granted("acme")
    wide = [
        Delegate(
            operation_id=new_id(),
            root_id=root.root_id,
            budget_id=root.root_id,
            authority=ByHolder(),
            children=tuple(
                Child(
                    budget_id=new_id(),
                    name=f"{batch}-{number}",
                    amount=1,
                    holder="dev",
                    labels=labels,
                )
                for number in range(200)
            ),
        )
        for batch in range(5)
    ]
    await make(stored, root, *wide)
    stub = AuditServiceStub(stored.channel)
    entries = audit.ListEntriesRequest(
        budget=by_path("acme"), reach=audit.REACH_TREE, page_size=1_000
    )
    parts: list[tuple[int, int]] = []
    pages = 0
    while True:
        page = await stub.ListEntries(entries)
        pages += 1
        parts += [(entry.position, entry.part) for entry in page.entries]
        if not page.next_page_token:
            break
        entries.page_token = page.next_page_token
    assert pages > 1
    assert parts == [(1, 0), *((2 + batch, part) for batch in range(5) for part in range(201))]
    budgets = audit.ListBudgetsRequest(below=by_path("acme"), page_size=1_000)
    names = []
    while True:
        listed = await stub.ListBudgets(budgets)
        names += [budget.name for budget in listed.budgets]
        if not listed.next_page_token:
            break
        budgets.page_token = listed.next_page_token
    assert len(names) == len(set(names)) == 1_001


async def test_a_page_token_of_another_list_is_malformed(stored: Stored) -> None:
    root = granted("acme")
    await make(stored, root, reserved(root), reserved(root), granted("other"))
    stub = AuditServiceStub(stored.channel)
    page = await stub.ListEntries(audit.ListEntriesRequest(budget=by_path("acme"), page_size=1))
    for request in (
        audit.ListEntriesRequest(budget=by_path("other"), page_token=page.next_page_token),
        audit.ListEntriesRequest(
            budget=by_path("acme"), reach=audit.REACH_TREE, page_token=page.next_page_token
        ),
        audit.ListEntriesRequest(
            budget=by_path("acme"), descending=True, page_token=page.next_page_token
        ),
    ):
        reason, facts = await refusal(stub.ListEntries(request))
        assert (reason, facts["field"]) == ("MALFORMED", "page_token")


async def test_a_ledger_verifies_and_says_how_far_it_is(stored: Stored) -> None:
    roots = [granted(f"root-{number}") for number in range(3)]
    await make(stored, *roots)
    await asyncio.gather(*(make(stored, reserved(root)) for root in roots for _ in range(10)))
    stub = AuditServiceStub(stored.channel)
    told = [answer async for answer in stub.Verify(audit.VerifyRequest())]
    assert told[-1].verdict.verified
    assert (told[-1].entries, told[-1].trees) == (33, 3)
    assert not any(answer.HasField("verdict") for answer in told[:-1])
    one = [answer async for answer in stub.Verify(audit.VerifyRequest(tree=by_path("root-1")))]
    assert (one[-1].verdict.verified, one[-1].entries, one[-1].trees) == (True, 11, 1)


async def test_verifications_leave_connections_for_others(stored: Stored) -> None:
    await make(stored, granted("acme"))
    stub = AuditServiceStub(stored.channel)
    begun = [stub.Verify(audit.VerifyRequest()) for _ in range(10)]

    async def verdict(call: Any) -> bool:
        told = [answer async for answer in call]
        return bool(told[-1].verdict.verified)

    verifying = asyncio.gather(*(verdict(call) for call in begun))
    read = await stub.GetBudget(audit.GetBudgetRequest(budget=by_path("acme")))
    assert read.budget.name == "acme"
    assert await verifying == [True] * 10


async def test_a_tampered_row_is_found_and_named(stored: Stored, database: str) -> None:
    good, bad = granted("good"), granted("bad")
    await make(stored, good, bad, reserved(bad))
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "UPDATE budgets SET granted = granted + 1, available = available + 1"
            " WHERE root_id = %s",
            [uuid.UUID(bytes=bad.root_id)],
        )
    stub = AuditServiceStub(stored.channel)
    told = [answer async for answer in stub.Verify(audit.VerifyRequest())]
    assert not told[-1].verdict.verified
    [finding] = told[-1].verdict.findings
    assert finding.root_id == bad.root_id
    assert finding.budget_id == bad.budget_id
    assert finding.seq == 0
    assert finding.rule == "fold"


async def test_verifying_what_is_not_there_is_refused(stored: Stored) -> None:
    async def verify() -> None:
        call = AuditServiceStub(stored.channel).Verify(audit.VerifyRequest(tree=by_path("nothing")))
        async for _ in call:
            pass

    reason, _ = await refusal(verify())
    assert reason == "BUDGET_UNKNOWN"
