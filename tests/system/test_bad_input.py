"""Whatever is sent: an answer of the reference page, and not one row of the database changed."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import psycopg
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from peculium.v1 import (
    admin_service_pb2 as admin,
    audit_service_pb2 as audit,
    ledger_service_pb2 as ledger,
    types_pb2,
)
from peculium_server.sealer import Round, Sealer
from peculium_server.signing import SigningKey
from peculium_server.store.store import Store
from tests.server import RunningServer, StartServer
from tests.system.conftest import Shared
from tests.system.wire import (
    HOLDER,
    AioWire,
    Held,
    Told,
    Wire,
    grant_of,
    header,
    id_text,
    new_id,
    new_secret,
    reason_of,
    reserve_of,
    spend_of,
    token_id,
)
from tests.system.world import (
    ADMIN,
    AUDIT,
    KEY_METHODS,
    LEDGER,
    METHODS,
    World,
    accepted_requests,
    child_spec,
    dump,
    make_world,
    webhook_flags,
)

pytestmark = pytest.mark.timeout(240)

ABOUT_BUDGETS = [method for method in METHODS if method not in KEY_METHODS]
AMOUNT_MAX = 2**62 - 1
TEN_MIB = 10 * 1024 * 1024
INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Reference(NamedTuple):
    """What the reference page says of one reason."""

    code: str
    facts: set[str]


def _reference() -> dict[str, Reference]:
    page = Path(__file__).parents[2] / "docs" / "reference" / "refusals.md"
    text = page.read_text()
    codes = dict(re.findall(r"^\| \d+ \| \[(\w+)\]\(#\w+\) \| (\w+) \|", text, re.MULTILINE))
    examples = re.findall(r"^## (\w+)\n.*?```json\n(.*?)\n```", text, re.MULTILINE | re.DOTALL)
    return {
        reason: Reference(codes[reason], set(json.loads(example)))
        for reason, example in examples
        if reason in codes
    }


REFERENCE = _reference()
SOMETIMES = {"fenced_by"}
"""Facts that are told where they apply."""


@pytest.fixture(scope="module")
def world(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(shared.wire)
    key = SigningKey.make(tmp_path_factory.mktemp("keys") / "key.pem")
    assert asyncio.run(_seal(shared.database, key)) is Round.SEALED
    shared.wire.admin.Grant(grant_of("unsealed", 1, holder="dev"))
    return made


async def _seal(database: str, key: SigningKey) -> Round:
    store = await Store.open(database)
    try:
        return await Sealer(store, key, 0).round()
    finally:
        await store.close()


@pytest.fixture
def unchanged(shared: Shared, world: World) -> Iterator[None]:
    """No row of any table differs after the test, and the ledger verifies."""
    with psycopg.connect(shared.database) as connection:
        before = dump(connection)
        yield
        assert dump(connection) == before
    assert shared.wire.verified()
    assert not [line for line in shared.server.said if "failed, request" in line]


def _is_as_referenced(answer: Told) -> bool:
    """Whether a refusal has the code and the facts that the reference page promises."""
    expected = REFERENCE[answer.reason]
    return answer.code.name == expected.code and expected.facts - SOMETIMES <= set(answer.facts)


# --- every field of every request ---


class Mutation(NamedTuple):
    """A request with one field that is not as it has to be."""

    path: tuple[str, ...]
    request: Message
    absent: bool
    """The field is missing, which may be allowed."""


_NUMBERS = {
    FieldDescriptor.CPPTYPE_INT64: (-1, -(2**63), 2**62, 2**63 - 1),
    FieldDescriptor.CPPTYPE_INT32: (-1, -(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (2**32 - 1,),
}
_TEXTS = ("x" * 100_000, "a\0b", "a\x1bb", "\x85")
_ANY_TEXT = {"traceparent"}
"""A courtesy: what is wrong with it never fails an operation."""
_LEFT_ALONE = {"dry_run"}
"""What keeps an accepted operation from being recorded."""
_BY_NAME = {"path"}
"""Any text may be looked up; there is no such budget."""


def _mutations(whole: Message) -> Iterator[Mutation]:
    for path, field in _fields(whole):
        if path[-1] in _LEFT_ALONE:
            continue
        yield _mutated(whole, path, lambda parent, name: parent.ClearField(name), absent=True)
        for value in _wrong_values(field, _at(whole, path)):
            yield _mutated(
                whole, path, lambda parent, name, value=value: setattr(parent, name, value)
            )


def _fields(message: Message, above: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Every field that is set, with the way to it; labels and the like as a whole."""
    for field, value in message.ListFields():
        path = (*above, field.name)
        yield path, field
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        if isinstance(value, Message):
            yield from _fields(value, path)
        else:
            yield from _fields(value[0], (*path, "0"))


def _at(message: Any, path: Sequence[str]) -> Any:
    for step in path:
        message = message[int(step)] if step.isdigit() else getattr(message, step)
    return message


def _mutated(
    whole: Message, path: tuple[str, ...], mutate: Callable[..., None], *, absent: bool = False
) -> Mutation:
    request = type(whole)()
    request.CopyFrom(whole)
    mutate(_at(request, path[:-1]), path[-1])
    return Mutation(path, request, absent)


def _wrong_values(field: FieldDescriptor, value: Any) -> Sequence[Any]:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return (value[:-1], value + b"\0", bytes(65_536), bytes(len(value)))
        case FieldDescriptor.CPPTYPE_STRING:
            return _TEXTS
        case number:
            return _NUMBERS.get(number, ())


def _expected(mutation: Mutation, answer: bytes | Told) -> bool:
    """Whether an answer is right for what is wrong with the field."""
    looks_right = mutation.absent or _looks_right(_at(mutation.request, mutation.path))
    if isinstance(answer, bytes):
        return looks_right or mutation.path[-1] in _ANY_TEXT
    if not _is_as_referenced(answer):
        return False
    if looks_right or mutation.path[-1] in _BY_NAME:
        return True
    named = answer.facts.get("field", "")
    return answer.reason == "MALFORMED" and any(step in named for step in mutation.path)


def _looks_right(value: Any) -> bool:
    """Whether it is zeros of the right length: a well-formed id or token, which nobody has."""
    return isinstance(value, bytes) and not any(value) and len(value) in {16, 32}


@pytest.mark.parametrize("method", ABOUT_BUDGETS)
def test_a_field_that_is_not_as_it_has_to_be_is_refused_by_name(
    shared: Shared, world: World, unchanged: None, method: str
) -> None:
    request = accepted_requests(world)[method]
    assert isinstance(shared.wire.send(method, request), bytes)
    wrong: list[tuple[object, ...]] = []
    for mutation in _mutations(request):
        answer = shared.wire.send(method, mutation.request)
        if method.endswith("/Batch") and isinstance(answer, bytes):
            continue  # Each of its operations has an answer of its own; see below.
        if not _expected(mutation, answer):
            wrong.append((mutation.path, _short(mutation), answer))
        if isinstance(answer, Told) and "header" in request.DESCRIPTOR.fields_by_name:
            wrong += _differently_refused(shared.wire, method, mutation, answer)
    assert wrong == []


def _differently_refused(
    wire: Wire, method: str, mutation: Mutation, dry: Told
) -> list[tuple[object, ...]]:
    """What is refused dry is refused in earnest, alone and in a batch, for the same reason."""
    request: Any = mutation.request
    request.header.dry_run = False
    in_earnest = wire.send(method, request)
    wrong: list[tuple[object, ...]] = []
    if in_earnest != dry:
        wrong.append((mutation.path, _short(mutation), "in earnest", in_earnest, dry))
    if method.startswith(LEDGER):
        operation = ledger.Operation()
        getattr(operation, method.rpartition("/")[2].lower()).CopyFrom(request)
        [result] = wire.ledger.Batch(ledger.BatchRequest(operations=[operation])).results
        if reason_of(result.refused) != dry.reason or dict(result.refused.metadata) != dry.facts:
            wrong.append((mutation.path, _short(mutation), "in a batch", result, dry))
    return wrong


def _short(mutation: Mutation) -> object:
    return "absent" if mutation.absent else repr(_at(mutation.request, mutation.path))[:40]


# --- bytes that are no request ---


_BAD_TEXTS = {
    "CreateAlertRule": b"\x12\x04\x1a\x02\xff\xfe",  # budget.path
    "ListAlertRules": b"\x0a\x04\x1a\x02\xff\xfe",
    "CreateWebhook": b"\x12\x02\xff\xfe",  # url
    "ListDeliveries": b"\x22\x02\xff\xfe",  # page_token
    # They have no text: a field without an end.
    **dict.fromkeys(("DeleteAlertRule", "DeleteWebhook", "ListWebhooks"), b"\x0a\x04\x1a"),
    **dict.fromkeys(("ReplayDeliveries", "TestWebhook"), b"\x0a\x04\x1a"),
}


def _with_bad_text(method: str, data: bytes) -> bytes:
    """The request with a text in it that is not UTF-8: merged into what its first field has."""
    if method.removeprefix(ADMIN) in _BAD_TEXTS:
        return data + _BAD_TEXTS[method.removeprefix(ADMIN)]
    field = b"\x3a" if method.startswith((LEDGER, ADMIN)) else b"\x1a"  # traceparent, or path
    if method in {LEDGER + "GetBudget", LEDGER + "ListHolds"}:
        field = b"\x1a"
    if method == AUDIT + "ListCheckpoints":
        return data + b"\x12\x02\xff\xfe"  # It names no budget; this is its page token.
    if method == LEDGER + "Batch":
        return data + b"\x0a\x0a\x2a\x08\x0a\x06\x3a\x04ok\xff\xfe"
    return data + b"\x0a\x04" + field + b"\x02\xff\xfe"


@pytest.mark.parametrize("method", ABOUT_BUDGETS)
def test_bytes_that_are_no_request_are_refused_before_anything_is_read(
    shared: Shared, world: World, unchanged: None, method: str
) -> None:
    data = accepted_requests(world)[method].SerializeToString()
    for wrong in (
        b"\xff" * 10,
        data[:-1] or b"\x0a",
        b"\x0b" * 100_000,
        b"\x0a\xff\xff\xff\xff\x0f",
        _with_bad_text(method, data),
    ):
        answer = shared.wire.send(method, wrong)
        assert answer == Told(
            INVALID,
            "MALFORMED",
            {"field": "request", "problem": "is not a message of this method"},
        )
    # A field that no version of the protocol knows, with 10 MiB in it.
    oversized = shared.wire.send(method, data + b"\xc2\x3e\x80\x80\x80\x05" + bytes(TEN_MIB))
    assert isinstance(oversized, Told)
    assert oversized.code is grpc.StatusCode.RESOURCE_EXHAUSTED


EVERYTHING = {
    *(AUDIT + name for name in ("Export", "ListAlerts", "ListBudgets", "ListCheckpoints")),
    *(AUDIT + name for name in ("ListRefusals", "ListSecurityEvents", "Verify", "WatchEntries")),
    *(ADMIN + name for name in ("ListAlertRules", "ListDeliveries", "ListWebhooks")),
}
"""What needs no budget to be named."""


@pytest.mark.parametrize("method", ABOUT_BUDGETS)
def test_an_empty_request_is_refused_unless_it_asks_for_everything(
    shared: Shared, world: World, unchanged: None, method: str
) -> None:
    answer = shared.wire.send(method, b"")
    if method in EVERYTHING:
        assert isinstance(answer, bytes)
    else:
        assert isinstance(answer, Told)
        assert (answer.code, answer.reason) == (INVALID, "MALFORMED")


def test_a_method_that_nobody_has_is_unimplemented(shared: Shared) -> None:
    answer = shared.wire.send(LEDGER + "Steal", b"")
    assert isinstance(answer, Told)
    assert answer.code is grpc.StatusCode.UNIMPLEMENTED


# --- requests that are well-formed, and wrong ---

Case = Callable[[World], tuple[str, Message]]
CASES: list[tuple[str, str, Case]] = []
"""What is wrong, what the answer is, and the request."""


def case(reason: str) -> Callable[[Case], Case]:
    """Declare a request that is refused for this reason; the function's name says what is wrong."""

    def declare(build: Case) -> Case:
        CASES.append((build.__name__, reason, build))
        return build

    return declare


def _spend(budget: Held, amount: int = 1) -> tuple[str, Message]:
    return LEDGER + "Spend", spend_of(budget, amount)


def _delegate(budget: Held, *children: types_pb2.ChildSpec) -> tuple[str, ledger.DelegateRequest]:
    return LEDGER + "Delegate", ledger.DelegateRequest(
        header=budget.header(), next_token_id=token_id(new_secret()), children=children
    )


def _give_all_back(budget: Held) -> tuple[str, Message]:
    return LEDGER + "Return", ledger.ReturnRequest(header=budget.header(), all=True)


def _revoke(budget: Held, descendant_id: bytes) -> tuple[str, Message]:
    return LEDGER + "Revoke", ledger.RevokeRequest(
        header=budget.header(), next_token_id=token_id(new_secret()), descendant_id=descendant_id
    )


def _of(budget: Held) -> types_pb2.OperationHeader:
    return header(budget.root_id, budget.budget_id)


@case("CAPABILITY_UNKNOWN")
def a_wrong_secret(world: World) -> tuple[str, Message]:
    return _spend(Held(world.acme.root_id, world.acme.budget_id))


@case("CAPABILITY_UNKNOWN")
def another_trees_secret(world: World) -> tuple[str, Message]:
    return _spend(Held(world.acme.root_id, world.acme.budget_id, world.other.secret))


@case("CAPABILITY_UNKNOWN")
def an_unknown_budget(world: World) -> tuple[str, Message]:
    return _spend(Held(world.acme.root_id, new_id(), world.acme.secret))


@case("CAPABILITY_UNKNOWN")
def another_trees_budget(world: World) -> tuple[str, Message]:
    return _spend(Held(world.acme.root_id, world.other.budget_id, world.other.secret))


@case("CAPABILITY_UNKNOWN")
def a_secret_where_the_principal_holds(world: World) -> tuple[str, Message]:
    return _spend(Held(world.service, world.service))


@case("CAPABILITY_UNKNOWN")
def the_principal_where_a_token_holds(world: World) -> tuple[str, Message]:
    request = ledger.SpendRequest(
        header=header(world.acme.root_id, world.acme.budget_id, HOLDER), amount=1
    )
    return LEDGER + "Spend", request


@case("CAPABILITY_UNKNOWN")
def a_budgets_secret_where_a_holds_is_needed(world: World) -> tuple[str, Message]:
    return LEDGER + "Settle", ledger.SettleRequest(
        header=world.of_service(world.acme.proof), hold_id=world.live, actual=0
    )


@case("CAPABILITY_UNKNOWN")
def a_hold_that_there_is_not(world: World) -> tuple[str, Message]:
    return LEDGER + "Release", ledger.ReleaseRequest(header=world.of_hold(), hold_id=new_id())


@case("CAPABILITY_UNKNOWN")
def a_read_with_a_wrong_secret(world: World) -> tuple[str, Message]:
    return LEDGER + "GetBudget", ledger.LedgerServiceGetBudgetRequest(
        budget=types_pb2.BudgetRef(path="acme"), authority=types_pb2.Authority(secret=new_secret())
    )


@case("CAPABILITY_UNKNOWN")
def a_read_of_a_budget_that_there_is_not(world: World) -> tuple[str, Message]:
    return LEDGER + "ListHolds", ledger.ListHoldsRequest(
        budget=types_pb2.BudgetRef(path="acme/nothing"), authority=HOLDER
    )


@case("BUDGET_UNKNOWN")
def money_for_a_root_that_there_is_not(world: World) -> tuple[str, Message]:
    nowhere = new_id()
    return ADMIN + "TopUp", admin.TopUpRequest(header=header(nowhere, nowhere), amount=1)


@case("BUDGET_UNKNOWN")
def an_audit_of_a_budget_that_there_is_not(world: World) -> tuple[str, Message]:
    return AUDIT + "Verify", audit.VerifyRequest(tree=types_pb2.BudgetRef(path="nobody"))


@case("NOT_TOKEN_HELD")
def an_accept_where_the_principal_holds(world: World) -> tuple[str, Message]:
    return LEDGER + "Accept", ledger.AcceptRequest(
        header=world.of_service(), next_token_id=token_id(new_secret())
    )


@case("NOT_TOKEN_HELD")
def a_recovery_where_the_principal_holds(world: World) -> tuple[str, Message]:
    return LEDGER + "Recover", ledger.RecoverRequest(
        header=world.of_service(), next_token_id=token_id(new_secret())
    )


@case("OPERATION_ID_REUSED")
def an_operation_id_with_another_amount(world: World) -> tuple[str, Message]:
    request = ledger.SpendRequest()
    request.CopyFrom(world.spent)
    request.amount += 1
    return LEDGER + "Spend", request


@case("OPERATION_ID_REUSED")
def an_operation_id_of_another_kind(world: World) -> tuple[str, Message]:
    return LEDGER + "Reserve", reserve_of(world.acme, 1, world.spent.header.operation_id)


@case("OPERATION_TOO_OLD")
def an_operation_of_last_year(world: World) -> tuple[str, Message]:
    made = new_id()
    old = (int.from_bytes(made[:6]) - 365 * 86_400_000).to_bytes(6) + made[6:]
    return LEDGER + "Spend", ledger.SpendRequest(
        header=world.of_service(operation_id=old), amount=1
    )


@case("TOKEN_CONSUMED")
def a_token_used_twice(world: World) -> tuple[str, Message]:
    return _spend(world.acme_before)


@case("TOKEN_CONSUMED")
def a_hold_settled_twice(world: World) -> tuple[str, Message]:
    proof = types_pb2.Authority(secret=world.settled_secret)
    return LEDGER + "Settle", ledger.SettleRequest(
        header=world.of_service(proof), hold_id=world.settled, actual=1
    )


@case("TOKEN_ID_REUSED")
def a_next_token_that_was_consumed(world: World) -> tuple[str, Message]:
    request = spend_of(world.acme, 1)
    request.next_token_id = world.acme_before.token_id
    return LEDGER + "Spend", request


@case("TOKEN_ID_REUSED")
def a_next_token_that_is_presented(world: World) -> tuple[str, Message]:
    request = spend_of(world.acme, 1)
    request.next_token_id = world.acme.token_id
    return LEDGER + "Spend", request


@case("TOKEN_ID_REUSED")
def a_hold_with_the_budgets_next_token(world: World) -> tuple[str, Message]:
    request = reserve_of(world.acme, 1)
    request.hold_token_id = request.next_token_id
    return LEDGER + "Reserve", request


@case("TOKEN_ID_REUSED")
def two_children_with_one_token(world: World) -> tuple[str, Message]:
    first, second = child_spec("first", 1), child_spec("second", 1)
    second.token_id = first.token_id
    return _delegate(world.acme, first, second)


@case("DESCENDANT_UNKNOWN")
def a_revocation_of_nobody(world: World) -> tuple[str, Message]:
    return _revoke(world.acme, new_id())


@case("DESCENDANT_UNKNOWN")
def a_revocation_of_a_sibling(world: World) -> tuple[str, Message]:
    return _revoke(world.child, world.leased.budget_id)


@case("DESCENDANT_UNKNOWN")
def a_revocation_of_oneself(world: World) -> tuple[str, Message]:
    return _revoke(world.acme, world.acme.budget_id)


@case("DESCENDANT_UNKNOWN")
def money_for_the_parent(world: World) -> tuple[str, Message]:
    return LEDGER + "Fund", ledger.FundRequest(
        header=world.child.header(),
        next_token_id=token_id(new_secret()),
        descendant_id=world.acme.budget_id,
        amount=1,
    )


@case("HOLD_UNKNOWN")
def a_resolution_of_a_hold_that_there_is_not(world: World) -> tuple[str, Message]:
    return ADMIN + "Resolve", admin.AdminServiceResolveRequest(
        header=world.of_admin(), hold_id=new_id(), actual=1, reason="why"
    )


@case("HOLD_UNKNOWN")
def a_rotation_of_another_budgets_hold(world: World) -> tuple[str, Message]:
    rotation = types_pb2.HoldRotation(hold_id=world.live, next_token_id=token_id(new_secret()))
    return LEDGER + "Recover", ledger.RecoverRequest(
        header=header(world.owned.root_id, world.owned.budget_id, HOLDER),
        next_token_id=token_id(new_secret()),
        holds=[rotation],
    )


@case("BUDGET_CHANGED")
def a_recovery_of_what_was_used_since_it_was_seen(world: World) -> tuple[str, Message]:
    return LEDGER + "Recover", ledger.RecoverRequest(
        header=header(world.owned.root_id, world.owned.budget_id, HOLDER),
        next_token_id=token_id(new_secret()),
        if_seq=1_000_000,
    )


@case("NOT_SEALED")
def a_proof_of_what_no_checkpoint_seals(world: World) -> tuple[str, Message]:
    return AUDIT + "ProveEntry", audit.ProveEntryRequest(
        budget=types_pb2.BudgetRef(path="unsealed"), seq=1
    )


@case("MALFORMED")
def a_proof_of_an_entry_that_there_is_not(world: World) -> tuple[str, Message]:
    return AUDIT + "ProveEntry", audit.ProveEntryRequest(
        budget=types_pb2.BudgetRef(path="acme"), seq=-1
    )


@case("ALERT_UNKNOWN")
def the_end_of_a_rule_that_there_is_not(world: World) -> tuple[str, Message]:
    return ADMIN + "DeleteAlertRule", admin.DeleteAlertRuleRequest(rule_id=new_id())


@case("ALERT_UNKNOWN")
def a_replay_of_an_alert_that_was_never_sent(world: World) -> tuple[str, Message]:
    return ADMIN + "ReplayDeliveries", admin.ReplayDeliveriesRequest(
        webhook_id=world.webhook.webhook_id, alert_ids=[new_id()]
    )


@case("WEBHOOK_UNKNOWN")
def the_end_of_a_webhook_that_there_is_not(world: World) -> tuple[str, Message]:
    return ADMIN + "DeleteWebhook", admin.DeleteWebhookRequest(webhook_id=new_id())


@case("WEBHOOK_UNKNOWN")
def a_test_of_a_webhook_that_was_deleted(world: World) -> tuple[str, Message]:
    return ADMIN + "TestWebhook", admin.TestWebhookRequest(webhook_id=world.ended_webhook)


@case("ID_TAKEN")
def a_second_rule_with_one_id(world: World) -> tuple[str, Message]:
    other = admin.CreateAlertRuleRequest()
    other.CopyFrom(world.rule)
    other.basis_points += 1
    return ADMIN + "CreateAlertRule", other


@case("ID_TAKEN")
def a_second_webhook_with_one_id(world: World) -> tuple[str, Message]:
    other = admin.CreateWebhookRequest()
    other.CopyFrom(world.webhook)
    other.url += "/else"
    return ADMIN + "CreateWebhook", other


@case("MALFORMED")
def a_rule_with_two_thresholds(world: World) -> tuple[str, Message]:
    both = admin.CreateAlertRuleRequest()
    both.CopyFrom(world.rule)
    both.amount = 1
    return ADMIN + "CreateAlertRule", both


@case("MALFORMED")
def a_webhook_on_a_private_network(world: World) -> tuple[str, Message]:
    return ADMIN + "CreateWebhook", admin.CreateWebhookRequest(
        webhook_id=new_id(), url="https://10.0.0.1/"
    )


@case("TOO_LARGE")
def a_replay_of_too_many_alerts(world: World) -> tuple[str, Message]:
    return ADMIN + "ReplayDeliveries", admin.ReplayDeliveriesRequest(
        webhook_id=world.webhook.webhook_id, alert_ids=[new_id()] * 1_001
    )


@case("ID_TAKEN")
def a_second_hold_with_one_id(world: World) -> tuple[str, Message]:
    return LEDGER + "Reserve", ledger.ReserveRequest(
        header=world.of_service(),
        amount=1,
        hold_id=world.settled,
        hold_token_id=token_id(new_secret()),
    )


@case("ID_TAKEN")
def a_second_child_with_one_id(world: World) -> tuple[str, Message]:
    child = child_spec("new", 1)
    child.budget_id = world.leased.budget_id
    return _delegate(world.acme, child)


@case("ID_TAKEN")
def a_second_root_with_one_id(world: World) -> tuple[str, Message]:
    request = grant_of("new", 1, holder="dev")
    request.header.root_id = request.header.budget_id = world.acme.root_id
    return ADMIN + "Grant", request


@case("NAME_TAKEN")
def a_second_root_of_one_name(world: World) -> tuple[str, Message]:
    return ADMIN + "Grant", grant_of("acme", 1, holder="dev")


@case("NAME_TAKEN")
def a_second_sibling_of_one_name(world: World) -> tuple[str, Message]:
    return _delegate(world.acme, child_spec("child", 1))


@case("NAME_TAKEN")
def the_name_of_a_sibling_that_was_closed(world: World) -> tuple[str, Message]:
    return _delegate(world.acme, child_spec("closed", 1))


@case("NOT_FOR_ROOTS")
def a_return_from_a_root(world: World) -> tuple[str, Message]:
    return _give_all_back(world.acme)


@case("ONLY_FOR_ROOTS")
def a_top_up_of_a_child(world: World) -> tuple[str, Message]:
    return ADMIN + "TopUp", admin.TopUpRequest(header=_of(world.child), amount=1)


@case("ONLY_FOR_ROOTS")
def a_withdrawal_from_a_child(world: World) -> tuple[str, Message]:
    return ADMIN + "Withdraw", admin.WithdrawRequest(header=_of(world.child), amount=1)


@case("BUDGET_CLOSED")
def spending_below_a_closed_budget(world: World) -> tuple[str, Message]:
    return _spend(world.revoked)


@case("BUDGET_EXPIRED")
def spending_after_the_lease(world: World) -> tuple[str, Message]:
    return _spend(world.expired)


@case("BUDGET_EXPIRED")
def a_renewal_after_the_lease(world: World) -> tuple[str, Message]:
    request = ledger.RenewRequest(
        header=world.expired.header(), next_token_id=token_id(new_secret())
    )
    request.lease.seconds = 60
    return LEDGER + "Renew", request


@case("BUDGET_FROZEN")
def spending_from_a_frozen_budget(world: World) -> tuple[str, Message]:
    return _spend(world.frozen)


@case("TREE_OVERRUN")
def spending_from_an_overrun_tree(world: World) -> tuple[str, Message]:
    return _spend(world.overrun)


@case("HOLD_ENDED")
def a_resolution_of_a_settled_hold(world: World) -> tuple[str, Message]:
    return LEDGER + "Resolve", ledger.ResolveRequest(
        header=world.of_service(), hold_id=world.settled, actual=1, reason="why"
    )


@case("TREE_TOO_DEEP")
def a_seventeenth_level(world: World) -> tuple[str, Message]:
    return _delegate(world.deepest, child_spec("deeper", 1))


@case("LIVE_HOLDS")
def a_return_with_a_live_hold(world: World) -> tuple[str, Message]:
    return _give_all_back(world.child)


@case("OPEN_CHILDREN")
def a_return_with_an_open_child(world: World) -> tuple[str, Message]:
    """As deep as it may be, each level but the last has a child and no hold."""
    return _give_all_back(world.parent)


@case("BUDGET_EXHAUSTED")
def a_child_larger_than_its_parent(world: World) -> tuple[str, Message]:
    return _delegate(world.child, child_spec("new", 90))


@case("BUDGET_EXHAUSTED")
def children_larger_than_any_number(world: World) -> tuple[str, Message]:
    return _delegate(world.acme, *(child_spec(f"new-{n}", AMOUNT_MAX) for n in range(200)))


@case("BUDGET_EXHAUSTED")
def a_spending_of_everything_there_can_be(world: World) -> tuple[str, Message]:
    return _spend(world.acme, AMOUNT_MAX)


@case("BUDGET_EXHAUSTED")
def a_reservation_of_everything_there_can_be(world: World) -> tuple[str, Message]:
    return LEDGER + "Reserve", reserve_of(world.acme, AMOUNT_MAX)


@case("BUDGET_EXHAUSTED")
def a_withdrawal_of_more_than_there_is(world: World) -> tuple[str, Message]:
    return ADMIN + "Withdraw", admin.WithdrawRequest(header=_of(world.acme), amount=AMOUNT_MAX)


@case("AMOUNT_OVERFLOW")
def a_top_up_beyond_every_balance(world: World) -> tuple[str, Message]:
    return ADMIN + "TopUp", admin.TopUpRequest(header=_of(world.acme), amount=AMOUNT_MAX)


@case("TOO_LARGE")
def a_million_children(world: World) -> tuple[str, Message]:
    method, request = _delegate(world.acme)
    request.MergeFromString(b"\x1a\x00" * 1_000_000)
    return method, request


@case("TOO_LARGE")
def one_child_too_many(world: World) -> tuple[str, Message]:
    return _delegate(world.acme, *(child_spec(f"new-{n}", 1) for n in range(257)))


@case("TOO_LARGE")
def one_label_too_many(world: World) -> tuple[str, Message]:
    request = spend_of(world.acme, 1)
    request.header.labels.update({f"label-{n}": "" for n in range(17)})
    return LEDGER + "Spend", request


@case("TOO_LARGE")
def one_label_of_a_child_too_many(world: World) -> tuple[str, Message]:
    child = child_spec("new", 1)
    child.labels.update({f"label-{n}": "" for n in range(17)})
    return _delegate(world.acme, child)


@case("TOO_LARGE")
def one_operation_too_many(world: World) -> tuple[str, Message]:
    operation = ledger.Operation(spend=spend_of(world.acme, 1))
    return LEDGER + "Batch", ledger.BatchRequest(operations=[operation] * 257)


@case("TOO_LARGE")
def one_rotation_too_many(world: World) -> tuple[str, Message]:
    rotations = [
        types_pb2.HoldRotation(hold_id=new_id(), next_token_id=token_id(new_secret()))
        for _ in range(257)
    ]
    return LEDGER + "Recover", ledger.RecoverRequest(
        header=header(world.owned.root_id, world.owned.budget_id, HOLDER),
        next_token_id=token_id(new_secret()),
        holds=rotations,
    )


@case("MALFORMED")
def a_label_without_a_key(world: World) -> tuple[str, Message]:
    request = spend_of(world.acme, 1)
    request.header.labels[""] = "value"
    return LEDGER + "Spend", request


@case("MALFORMED")
def a_label_as_long_as_a_book(world: World) -> tuple[str, Message]:
    request = spend_of(world.acme, 1)
    request.header.labels["run"] = "x" * 100_000
    return LEDGER + "Spend", request


@case("MALFORMED")
def a_batch_of_nothing(world: World) -> tuple[str, Message]:
    return LEDGER + "Batch", ledger.BatchRequest()


@case("MALFORMED")
def a_following_operation_that_is_alone(world: World) -> tuple[str, Message]:
    request = spend_of(world.acme, 1)
    request.header.authority.after = 0
    return LEDGER + "Spend", request


@case("MALFORMED")
def a_proof_that_no_version_knows(world: World) -> tuple[str, Message]:
    request = spend_of(world.acme, 1)
    request.header.authority.ParseFromString(b"\x4a\x04none")
    return LEDGER + "Spend", request


@case("MALFORMED")
def an_admin_with_a_secret(world: World) -> tuple[str, Message]:
    request = admin.FreezeRequest(header=world.acme.header())
    return ADMIN + "Freeze", request


@case("MALFORMED")
def a_root_that_nobody_holds(world: World) -> tuple[str, Message]:
    return ADMIN + "Grant", grant_of("new", 1)


@case("MALFORMED")
def two_children_of_one_name(world: World) -> tuple[str, Message]:
    return _delegate(world.acme, child_spec("twin", 1), child_spec("twin", 1))


@case("MALFORMED")
def a_name_with_a_slash(world: World) -> tuple[str, Message]:
    return _delegate(world.acme, child_spec("a/b", 1))


@case("MALFORMED")
def an_operation_id_that_is_no_uuid7(world: World) -> tuple[str, Message]:
    return LEDGER + "Spend", spend_of(world.acme, 1, bytes(range(16)))


@case("MALFORMED")
def a_return_of_everything_that_is_none(world: World) -> tuple[str, Message]:
    return LEDGER + "Return", ledger.ReturnRequest(header=world.child.header(), all=False)


@case("MALFORMED")
def a_page_token_of_another_list(world: World) -> tuple[str, Message]:
    return AUDIT + "ListBudgets", audit.ListBudgetsRequest(page_token="bm90IG9uZQ")


@case("MALFORMED")
def a_budget_named_twice_over(world: World) -> tuple[str, Message]:
    both = types_pb2.BudgetRef(path="acme", root_id=world.acme.root_id)
    return AUDIT + "GetBudget", audit.GetBudgetRequest(budget=both)


@pytest.mark.parametrize(
    ("reason", "build"), [pytest.param(reason, build, id=name) for name, reason, build in CASES]
)
def test_what_the_rules_forbid_is_refused_as_the_reference_says(
    shared: Shared, world: World, unchanged: None, reason: str, build: Case
) -> None:
    method, request = build(world)
    answer = shared.wire.send(method, request)
    assert isinstance(answer, Told)
    assert answer.reason == reason
    assert _is_as_referenced(answer)
    assert shared.wire.send(method, request) == answer


def test_there_is_a_case_for_every_reason_of_the_reference() -> None:
    # The first two are refused before the request is looked at; the others come with lapsing of
    # holds, the ledger's own operations, atomic batches, API keys, many rules and a server without a key
    # for webhooks, which have tests of their own.
    elsewhere = {"UNAUTHENTICATED", "PERMISSION_DENIED", "HOLD_LAPSED", "NOT_DUE", "BATCH_REFUSED"}
    elsewhere |= {"KEY_UNKNOWN", "KEY_ENDED", "TOO_MANY", "WEBHOOKS_OFF"}
    assert {reason for _, reason, _ in CASES} | elsewhere == set(REFERENCE)


# --- batches ---


def test_what_is_wrong_with_one_operation_of_a_batch_is_told_of_it_alone(
    shared: Shared, world: World, unchanged: None
) -> None:
    unknown = ledger.Operation()
    unknown.MergeFromString(b"\x9a\x06\x00")
    forward = spend_of(world.acme, 1)
    forward.header.authority.after = 3
    fine = spend_of(world.acme, 1)
    fine.header.dry_run = True
    operations = [
        unknown,
        ledger.Operation(spend=spend_of(world.acme, -1)),
        ledger.Operation(spend=forward),
        ledger.Operation(spend=fine),
    ]
    results = shared.wire.ledger.Batch(ledger.BatchRequest(operations=operations)).results
    assert [reason_of(result.refused) for result in results[:3]] == ["MALFORMED"] * 3
    assert [result.refused.metadata["field"] for result in results[:3]] == [
        "operation",
        "amount",
        "authority.after",
    ]
    assert results[3].outcome.dry_run


def test_an_atomic_batch_with_one_operation_that_is_refused_does_nothing_at_all(
    shared: Shared, world: World, unchanged: None
) -> None:
    operations = [
        ledger.Operation(spend=spend_of(world.acme, 1)),
        ledger.Operation(spend=spend_of(world.other, 10**9)),
    ]
    results = shared.wire.ledger.Batch(
        ledger.BatchRequest(operations=operations, atomic=True, operation_id=new_id())
    ).results
    assert [reason_of(result.refused) for result in results] == [
        "BATCH_REFUSED",
        "BUDGET_EXHAUSTED",
    ]
    assert dict(results[0].refused.metadata) == {"index": "1", "reason": "BUDGET_EXHAUSTED"}


@pytest.mark.parametrize(
    ("batch_id", "second", "index", "field"),
    [
        (b"", ledger.Operation(), 1, "operation"),
        (b"", None, 0, "batch.operation_id"),
        (bytes(16), None, 0, "batch.operation_id"),
    ],
    ids=["an operation that is none", "no id", "an id that is no UUIDv7"],
)
def test_an_atomic_batch_that_is_malformed_says_where(
    shared: Shared,
    world: World,
    unchanged: None,
    batch_id: bytes,
    second: ledger.Operation | None,
    index: int,
    field: str,
) -> None:
    fine = ledger.Operation(spend=spend_of(world.acme, 1))
    operations = [fine, second or ledger.Operation(spend=spend_of(world.other, 1))]
    results = shared.wire.ledger.Batch(
        ledger.BatchRequest(operations=operations, atomic=True, operation_id=batch_id)
    ).results
    assert results[index].refused.metadata["field"] == field
    assert reason_of(results[1 - index].refused) == "BATCH_REFUSED"


# --- calls that nobody waits for ---


@pytest.mark.parametrize("timeout", [-1.0, 0.0, 1e-9])
def test_a_call_whose_deadline_has_passed_does_nothing(
    shared: Shared, world: World, unchanged: None, timeout: float
) -> None:
    answer = shared.wire.send(LEDGER + "Spend", spend_of(world.acme, 1), timeout)
    assert isinstance(answer, Told)
    assert answer.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def somebody_waits_behind(blocker: psycopg.AsyncConnection) -> None:
    waits = (
        "SELECT EXISTS (SELECT FROM pg_locks"
        " WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid)))"
    )
    while await (await blocker.execute(waits)).fetchone() != (True,):
        pass


async def test_calls_that_were_given_up_before_they_were_decided_do_nothing(
    running_server: RunningServer, database: str
) -> None:
    grant = grant_of("acme", 100, holder="dev")
    with Wire(running_server.address) as wire:
        wire.admin.Grant(grant)

    def spend() -> ledger.SpendRequest:
        root_id = grant.header.root_id
        return ledger.SpendRequest(header=header(root_id, root_id, HOLDER), amount=1)

    async with AioWire(running_server.address) as connection:
        first, late, cancelled = spend(), spend(), spend()
        blocker = await psycopg.AsyncConnection.connect(database)
        async with blocker:
            await blocker.execute("LOCK TABLE entries IN ACCESS EXCLUSIVE MODE")
            waiting = connection.ledger.Spend(first, timeout=30)
            # Calls may overtake each other: the others are sent when this one is being saved.
            await somebody_waits_behind(blocker)
            given_up = connection.ledger.Spend(cancelled, timeout=30)
            with pytest.raises(grpc.aio.AioRpcError) as over:
                await connection.ledger.Spend(late, timeout=0.5)
            assert over.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
            await blocker.rollback()
        await waiting
    with Wire(running_server.address) as wire:
        recorded = [id_text(entry.operation_id) for entry in wire.entries(grant.header.root_id)]
        assert recorded == [
            id_text(grant.header.operation_id),
            id_text(first.header.operation_id),
        ]
        assert wire.verified()


# --- anything at all ---


def test_no_mutation_of_valid_bytes_is_the_servers_failure(
    start_server: StartServer, served_database: str, tmp_path: Path
) -> None:
    server = start_server("--database-url", served_database, *webhook_flags(tmp_path))
    with Wire(server.address) as wire:
        _no_mutation_is_the_servers_failure(wire)


def _no_mutation_is_the_servers_failure(wire: Wire) -> None:
    chance = random.Random(2606)  # noqa: S311 - repeatable, not secret
    requests = [
        (method, bytearray(request.SerializeToString()))
        for method, request in accepted_requests(make_world(wire)).items()
    ]
    codes = set()
    for _ in range(3_000):
        method, data = chance.choice(requests)
        mutated = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(mutated) or 1)
            match chance.randrange(3):
                case 0:
                    mutated[place : place + 1] = chance.randbytes(1)
                case 1:
                    del mutated[place : place + chance.randint(1, 8)]
                case _:
                    mutated[place:place] = chance.randbytes(chance.randint(1, 8))
        answer = wire.send(method, bytes(mutated))
        codes.add(answer.code if isinstance(answer, Told) else grpc.StatusCode.OK)
    assert not codes & {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
    assert wire.verified()
