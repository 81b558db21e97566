"""Every method, by every role, with a key for all roots, for the right one, and for another one."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from peculium._ids import id_text, new_id
from peculium.apikeys import ApiKey
from peculium.v1 import (
    admin_service_pb2 as admin,
    audit_service_pb2 as audit,
    ledger_service_pb2 as ledger,
    types_pb2,
)
from peculium_server.core.operations import Role
from peculium_server.rpc.permissions import ROWS, Names
from peculium_server.sealer import Round, Sealer
from peculium_server.signing import SigningKey
from peculium_server.store.store import Store
from tests.forked import Forked
from tests.postgres import Server as PostgresServer
from tests.server import RunningServer, starting
from tests.system.wire import Told, Wire
from tests.system.world import (
    ADMIN,
    AUDIT,
    LEDGER,
    World,
    accepted_requests,
    make_world,
    webhook_flags,
)

pytestmark = pytest.mark.timeout(240)

OWNER = "the key of dev"
PRINCIPAL = "dev"
ROLES = {
    Role.AGENT: admin.ROLE_AGENT,
    Role.ADMIN: admin.ROLE_ADMIN,
    Role.AUDITOR: admin.ROLE_AUDITOR,
}
SCOPES = ("all", "inside", "outside")
DENIED = grpc.StatusCode.PERMISSION_DENIED
ONE = "a key for this root"
ALL = "a key for all roots"


@dataclass
class Scoped:
    """A server with one of everything, and keys of `dev` for each role and some roots."""

    server: RunningServer
    world: World
    keys: dict[tuple[Role, str], str]
    requests: dict[str, Message]

    def wire(self, role: Role, scope: str) -> Wire:
        return Wire(self.server.address, self.keys[role, scope])


@pytest.fixture(scope="module")
def scoped(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scoped]:
    directory = tmp_path_factory.mktemp("scoped")
    file = directory / "keys.toml"
    digest = hashlib.sha256(OWNER.encode()).hexdigest()
    file.write_text(f'[[keys]]\nprincipal = "{PRINCIPAL}"\nrole = "admin"\nsha256 = "{digest}"\n')
    with (
        postgres.fresh_database(postgres.migrated_template()) as database,
        starting(directory, Forked) as start,
    ):
        flags = ("--database-url", database, "--keys-file", str(file))
        server = start(*flags, *webhook_flags(directory))
        with Wire(server.address, OWNER) as wire:
            world = make_world(wire)
            roots = {
                "all": [],
                "inside": [world.acme.root_id, world.service],
                "outside": [world.other.root_id],
            }
            keys = {
                (role, scope): made(wire, role, roots[scope]) for role in ROLES for scope in SCOPES
            }
        # Of an export, and a proof, checkpoints are a part.
        signing = SigningKey.make(directory / "key.pem")
        assert asyncio.run(sealed(database, signing)) is Round.SEALED
        yield Scoped(server, world, keys, accepted_requests(world))


async def sealed(database: str, key: SigningKey) -> Round:
    store = await Store.open(database)
    try:
        return await Sealer(store, key, 0).round()
    finally:
        await store.close()


def made(wire: Wire, role: Role, roots: list[bytes]) -> str:
    key = ApiKey.new()
    wire.admin.CreateKey(
        admin.CreateKeyRequest(
            operation_id=new_id(),
            key_id=key.key_id,
            principal=PRINCIPAL,
            roles=[ROLES[role]],
            all_roots=not roots,
            root_ids=roots,
            digest=key.digest,
        )
    )
    return key.reveal()


def expected(method: str, role: Role, scope: str) -> dict[str, str] | None:
    """The facts of the refusal; None: it is answered."""
    row = ROWS[method]
    if role not in row.roles:
        needs = " or ".join(role.name.lower() for role in row.roles)
        return {"principal": PRINCIPAL, "role": role.name.lower(), "needs": needs}
    if scope == "all" or row.names is Names.NONE:
        return None
    if row.names is Names.ALL:
        return {"principal": PRINCIPAL, "needs": ALL}
    if scope == "inside" or row.names is Names.OPERATIONS:
        return None
    return {"principal": PRINCIPAL, "needs": ONE}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("role", ROLES)
def test_every_method_holds_every_role_to_its_roots(scoped: Scoped, role: Role, scope: str) -> None:
    wrong: list[tuple[str, bytes | Told, dict[str, str] | None]] = []
    with scoped.wire(role, scope) as wire:
        for method in ROWS:
            # What is about no budget is not well-formed, and would be refused as that after this.
            answer = wire.send(method, scoped.requests.get(method, b""))
            wanted = expected(method, role, scope)
            if isinstance(answer, Told) and answer.code is DENIED:
                facts = dict(answer.facts)
                facts.pop("root", None)
                if facts != wanted:
                    wrong.append((method, answer, wanted))
            elif wanted is not None or (method in scoped.requests and isinstance(answer, Told)):
                wrong.append((method, answer, wanted))
    assert wrong == []


@pytest.mark.parametrize("atomic", [False, True])
def test_of_a_batch_each_operation_on_another_root_is_refused(scoped: Scoped, atomic: bool) -> None:
    dry = scoped.requests[LEDGER + "Spend"]
    assert isinstance(dry, ledger.SpendRequest)
    own = ledger.Operation(spend=dry)
    foreign = ledger.Operation()
    foreign.CopyFrom(own)
    foreign.spend.header.root_id = foreign.spend.header.budget_id = scoped.world.other.root_id
    request = ledger.BatchRequest(operations=[own, foreign], atomic=atomic)
    if atomic:
        request.operation_id = new_id()
        for operation in request.operations:
            operation.spend.header.operation_id = new_id()
    with scoped.wire(Role.AGENT, "inside") as wire:
        first, second = wire.ledger.Batch(request).results
    assert second.refused.reason == types_pb2.REFUSAL_REASON_PERMISSION_DENIED
    assert second.refused.metadata["root"] == id_text(scoped.world.other.root_id)
    if atomic:
        assert first.refused.reason == types_pb2.REFUSAL_REASON_BATCH_REFUSED
    else:
        assert first.HasField("outcome")


READS: list[tuple[str, Any, str]] = [
    (AUDIT + "GetBudget", audit.GetBudgetRequest, "budget"),
    (AUDIT + "ListBudgets", audit.ListBudgetsRequest, "below"),
    (AUDIT + "WatchEntries", audit.WatchEntriesRequest, "budget"),
    (AUDIT + "ListRefusals", audit.ListRefusalsRequest, "budget"),
    (AUDIT + "ListSecurityEvents", audit.ListSecurityEventsRequest, "budget"),
    (AUDIT + "Export", audit.ExportRequest, "tree"),
    (AUDIT + "Verify", audit.VerifyRequest, "tree"),
]


@pytest.mark.parametrize(("method", "request_type", "field"), READS)
def test_another_tree_is_refused_in_the_same_words_whether_it_exists_or_not(
    scoped: Scoped, method: str, request_type: Any, field: str
) -> None:
    answers = []
    with scoped.wire(Role.AUDITOR, "outside") as wire:
        for path in ("acme", "acme/child", "acme/none", "nowhere", "nowhere/child", "\x01"):
            request = request_type(**{field: types_pb2.BudgetRef(path=path)})
            answer = wire.send(method, request)
            assert isinstance(answer, Told)
            assert answer.facts.pop("root") == path.partition("/")[0]
            answers.append(answer)
        for root_id in (scoped.world.acme.root_id, new_id()):
            named = types_pb2.BudgetRef(root_id=root_id, budget_id=new_id())
            answer = wire.send(method, request_type(**{field: named}))
            assert isinstance(answer, Told)
            assert answer.facts.pop("root") == id_text(root_id)
            answers.append(answer)
    told = Told(DENIED, "PERMISSION_DENIED", {"principal": PRINCIPAL, "needs": ONE})
    assert answers == [told] * len(answers)


def test_within_its_own_tree_a_budget_that_there_is_not_is_told_so(scoped: Scoped) -> None:
    with scoped.wire(Role.AUDITOR, "inside") as wire:
        named = types_pb2.BudgetRef(path="acme/none")
        answer = wire.send(AUDIT + "GetBudget", audit.GetBudgetRequest(budget=named))
    assert isinstance(answer, Told)
    assert answer.reason == "BUDGET_UNKNOWN"


@pytest.mark.parametrize("scope", SCOPES)
def test_the_whole_ledger_is_for_those_without_limits(scoped: Scoped, scope: str) -> None:
    methods = [method for method, row in ROWS.items() if row.names is Names.BUDGET_OR_ALL]
    assert {AUDIT + "WatchEntries", AUDIT + "Verify", AUDIT + "Export"} < set(methods)
    for method in methods:
        with scoped.wire(ROWS[method].roles[0], scope) as wire:
            answer = wire.send(method, b"")
        if scope == "all":
            assert isinstance(answer, bytes), method
        else:
            facts = {"principal": PRINCIPAL, "needs": ALL}
            assert answer == Told(DENIED, "PERMISSION_DENIED", facts), method


def test_a_list_of_roots_has_ones_own_only_page_after_page(scoped: Scoped) -> None:
    world = scoped.world
    with Wire(scoped.server.address, OWNER) as wire:
        everything = names(wire)
    assert {"acme", "other", "service"} < set(everything)
    with scoped.wire(Role.AUDITOR, "inside") as wire:
        assert names(wire) == ["acme", "service"]
        selected = audit.BudgetFilter(holder="dev")
        assert names(wire, filter=selected) == ["service"]
    with scoped.wire(Role.AUDITOR, "outside") as wire:
        assert names(wire) == ["other"]
    assert world.other.root_id


def names(wire: Wire, **fields: Any) -> list[str]:
    """The names of all roots, from pages of one each."""
    found: list[str] = []
    request = audit.ListBudgetsRequest(page_size=1, **fields)
    while True:
        page = wire.audit.ListBudgets(request)
        found += [budget.name for budget in page.budgets]
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


def test_an_export_tells_of_no_other_tree(scoped: Scoped) -> None:
    request = audit.ExportRequest(tree=types_pb2.BudgetRef(path="acme"))
    with scoped.wire(Role.AUDITOR, "inside") as wire:
        pieces = list(wire.audit.Export(request))
    told = b"".join(piece.SerializeToString() for piece in pieces)
    assert scoped.world.acme.root_id in told
    assert scoped.world.other.root_id not in told
    assert pieces[-1].trailer.checkpoints == 0
    assert pieces[-1].trailer.entries > 0
    with scoped.wire(Role.AUDITOR, "all") as wire:
        *_, last = wire.audit.Export(request)
    assert last.trailer.checkpoints == 1


def test_an_admin_of_some_roots_makes_neither_roots_nor_keys(scoped: Scoped) -> None:
    with scoped.wire(Role.ADMIN, "inside") as wire:
        for method in ("Grant", "CreateKey", "ListKeys", "RotateKey", "RevokeKey"):
            answer = wire.send(ADMIN + method, b"")
            assert answer == Told(
                DENIED, "PERMISSION_DENIED", {"principal": PRINCIPAL, "needs": ALL}
            )
