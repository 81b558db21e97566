from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from peculium.v1 import audit_service_pb2, ledger_service_pb2, types_pb2
from peculium_server.core.operations import Kind
from peculium_server.core.outcome import ChildOutcome, Outcome
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.core.state import (
    Balances,
    Budget,
    BudgetState,
    Custody,
    Effect,
    Entry,
    Hold,
    HoldState,
)
from peculium_server.core.verify import Finding
from peculium_server.lanes.answers import Answer, Position, Unanswered, Unavailability
from peculium_server.rpc.responses import (
    write_answer,
    write_budget,
    write_entry,
    write_finding,
    write_outcome,
)

AT = 1_800_000_000_123_456
WIRE_AT = Timestamp(seconds=1_800_000_000, nanos=123_456_000)
ROOT, BUDGET, HOLD, OPERATION = (bytes([number]) * 16 for number in range(1, 5))
POSITION = Position(b"i" * 16, 3, 77)
WIRE_POSITION = types_pb2.LedgerPosition(incarnation=b"i" * 16, lane=3, position=77)
MONEY = Balances(100, 40, 20, 15, 10, 20, 5, 3)
WIRE_MONEY = types_pb2.Balances(
    granted=100,
    available=40,
    held=20,
    delegated=15,
    spent=10,
    forfeited=20,
    overrun=5,
    advanced=3,
)
A_HOLD = Hold(BUDGET, HOLD, b"t" * 32, HoldState.DISPUTED, 10, 4, 5, 6, AT, AT)
WIRE_HOLD = types_pb2.Hold(
    hold_id=HOLD,
    budget_id=BUDGET,
    state=types_pb2.HOLD_STATE_DISPUTED,
    amount=10,
    remaining=4,
    booked=5,
    disputed=6,
    created_at=WIRE_AT,
    expires_at=WIRE_AT,
)


def outcome(**changes: object) -> Outcome:
    plain = Outcome(
        operation_id=OPERATION,
        kind=Kind.RESERVE,
        replayed=False,
        dry_run=False,
        at=AT,
        budget_id=BUDGET,
        money=MONEY,
        state=BudgetState.OPEN,
        seq=9,
        lease_until=None,
        hold=None,
        children=(),
        returned=0,
        pending=0,
        holds=(),
        holds_truncated=False,
        descendant_id=None,
    )
    return plain._replace(**changes)  # type: ignore[arg-type]


def wire_outcome(**changes: object) -> types_pb2.Outcome:
    plain = types_pb2.Outcome(
        operation_id=OPERATION,
        kind=types_pb2.OPERATION_KIND_RESERVE,
        at=WIRE_AT,
        budget_id=BUDGET,
        balances=WIRE_MONEY,
        state=types_pb2.BUDGET_STATE_OPEN,
        seq=9,
        ledger=WIRE_POSITION,
    )
    plain.MergeFrom(types_pb2.Outcome(**changes))  # type: ignore[arg-type]
    return plain


def told(given: Outcome) -> types_pb2.Outcome:
    message = types_pb2.Outcome()
    write_outcome(given, POSITION, message)
    return message


def test_the_outcome_of_a_reserve_tells_budget_and_hold() -> None:
    assert told(outcome(hold=A_HOLD)) == wire_outcome(hold=WIRE_HOLD)


def test_a_replayed_and_a_dry_run_outcome_say_so() -> None:
    given = outcome(replayed=True, dry_run=True, lease_until=AT)
    assert told(given) == wire_outcome(replayed=True, dry_run=True, lease_expires_at=WIRE_AT)


def test_the_outcome_of_a_delegate_tells_its_children() -> None:
    given = outcome(
        kind=Kind.DELEGATE,
        children=(ChildOutcome(HOLD, 5, AT), ChildOutcome(ROOT, 0, None)),
    )
    assert told(given) == wire_outcome(
        kind=types_pb2.OPERATION_KIND_DELEGATE,
        children=[
            types_pb2.ChildOutcome(budget_id=HOLD, granted=5, lease_expires_at=WIRE_AT),
            types_pb2.ChildOutcome(budget_id=ROOT),
        ],
    )


def test_the_outcome_of_a_recover_lists_holds_and_that_of_a_revoke_what_came_back() -> None:
    given = outcome(kind=Kind.RECOVER, holds=(A_HOLD,), holds_truncated=True)
    assert told(given) == wire_outcome(
        kind=types_pb2.OPERATION_KIND_RECOVER, holds=[WIRE_HOLD], holds_truncated=True
    )
    given = outcome(kind=Kind.REVOKE, returned=7, pending=8, descendant_id=HOLD)
    assert told(given) == wire_outcome(
        kind=types_pb2.OPERATION_KIND_REVOKE, returned=7, pending=8, descendant_id=HOLD
    )


def test_balances_of_zero_are_told_nevertheless() -> None:
    message = told(outcome(money=Balances()))
    assert message.HasField("balances")
    assert message.balances == types_pb2.Balances()


def test_an_outcome_without_a_position_claims_none() -> None:
    message = types_pb2.Outcome()
    write_outcome(outcome(), None, message)
    assert not message.HasField("ledger")


def test_each_operation_of_a_batch_gets_its_own_kind_of_answer() -> None:
    refused = Refused(Refusal.BUDGET_EXHAUSTED, {"available": "30"})
    answers = [
        Answer(outcome(), POSITION),
        Answer(refused, POSITION),
        Answer(Unanswered(Unavailability.QUEUE_FULL, {"lane": "3"}, 100), None),
    ]
    response = ledger_service_pb2.BatchResponse()
    for answer in answers:
        write_answer(answer, response.results.add())
    happened, was_refused, unanswered = response.results
    assert happened.outcome == wire_outcome()
    assert was_refused.refused == types_pb2.Refused(
        reason=types_pb2.REFUSAL_REASON_BUDGET_EXHAUSTED,
        message=refused.message,
        metadata={"available": "30"},
        ledger=wire_outcome().ledger,
    )
    assert unanswered.unavailable.reason == types_pb2.UNAVAILABLE_REASON_QUEUE_FULL
    assert unanswered.unavailable.retry_delay.ToMilliseconds() == 100
    assert unanswered.unavailable.message


def test_a_budget_is_told_without_its_token() -> None:
    token = b"t" * 32
    budget = Budget(
        root_id=ROOT,
        budget_id=BUDGET,
        ancestors=(HOLD, ROOT),
        name="run-7",
        unit="usd_nanos",
        custody=Custody.TOKEN,
        holder="svc",
        token=token,
        overrun_factor=0,
        labels=(("team", "a"),),
        created_at=AT,
        money=MONEY,
        disputed=1,
        holds_live=2,
        lease_until=AT,
        lease_latest=AT,
        version=4,
        seq=5,
        head=b"h" * 32,
    )
    message = types_pb2.Budget()
    write_budget(budget, ("acme", "research", "run-7"), BudgetState.FROZEN, message)
    assert message == types_pb2.Budget(
        root_id=ROOT,
        budget_id=BUDGET,
        parent_id=HOLD,
        name="run-7",
        path="acme/research/run-7",
        unit="usd_nanos",
        custody=types_pb2.CUSTODY_TOKEN,
        holder="svc",
        state=types_pb2.BUDGET_STATE_FROZEN,
        balances=WIRE_MONEY,
        disputed=1,
        holds_live=2,
        overrun_factor=0,
        lease_expires_at=WIRE_AT,
        lease_latest_at=WIRE_AT,
        labels={"team": "a"},
        seq=5,
        version=4,
        created_at=WIRE_AT,
        head=b"h" * 32,
    )
    assert message.HasField("overrun_factor")
    assert token not in message.SerializeToString()


def test_a_root_has_no_parent_and_no_overrun_factor() -> None:
    root = Budget(
        root_id=ROOT,
        budget_id=ROOT,
        ancestors=(),
        name="acme",
        unit="calls",
        custody=Custody.PRINCIPAL,
        holder=None,
        token=None,
        overrun_factor=None,
        labels=(),
        created_at=AT,
        money=Balances(),
    )
    message = types_pb2.Budget()
    write_budget(root, ("acme",), BudgetState.OPEN, message)
    assert not message.HasField("overrun_factor")
    assert not message.HasField("lease_expires_at")
    assert not message.parent_id


def test_an_entry_is_told_as_it_is_recorded() -> None:
    changes = Balances(available=-10, held=10)
    entry = Entry(
        root_id=ROOT,
        budget_id=BUDGET,
        seq=5,
        position=77,
        part=1,
        parts=2,
        operation_id=OPERATION,
        kind=Kind.DELEGATE,
        at=AT,
        principal="svc",
        trace_id=b"r" * 16,
        consumed=b"c" * 32,
        amount=10,
        money=MONEY,
        effect=Effect(changes),
        request=None,
        effect_bytes=b"effect",
        digest=b"d" * 32,
        previous_hash=b"p" * 32,
        hash=b"h" * 32,
    )
    message = audit_service_pb2.Entry()
    write_entry(entry, 3, message)
    assert message == audit_service_pb2.Entry(
        root_id=ROOT,
        budget_id=BUDGET,
        seq=5,
        lane=3,
        position=77,
        part=1,
        parts=2,
        operation_id=OPERATION,
        kind=types_pb2.OPERATION_KIND_DELEGATE,
        at=WIRE_AT,
        actor="svc",
        trace_id=b"r" * 16,
        consumed=b"c" * 32,
        balances=WIRE_MONEY,
        changes=types_pb2.Balances(available=-10, held=10),
        effect=b"effect",
        digest=b"d" * 32,
        previous_hash=b"p" * 32,
        hash=b"h" * 32,
        amount=10,
    )


def test_a_finding_names_where_and_what() -> None:
    message = audit_service_pb2.Finding()
    write_finding(Finding(ROOT, BUDGET, 4, "chain", "the hash differs"), message)
    assert message == audit_service_pb2.Finding(
        root_id=ROOT, budget_id=BUDGET, seq=4, rule="chain", detail="the hash differs"
    )


def test_the_numbers_of_the_core_are_those_of_the_wire() -> None:
    for core, wire, prefix in (
        (Kind, types_pb2.OperationKind, "OPERATION_KIND_"),
        (BudgetState, types_pb2.BudgetState, "BUDGET_STATE_"),
        (HoldState, types_pb2.HoldState, "HOLD_STATE_"),
        (Custody, types_pb2.Custody, "CUSTODY_"),
    ):
        named = {f"{prefix}{member.name}": member.value for member in core}
        assert named | {f"{prefix}UNSPECIFIED": 0} == dict(wire.items())
