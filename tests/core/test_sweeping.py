"""What the ledger does by itself: ids that are derived, so that twice is once."""

from __future__ import annotations

import hashlib
import secrets

import pytest

from peculium_server.core.operations import SYSTEM, Kind, Operation
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal
from peculium_server.core.shape import check_shape
from peculium_server.core.state import Balances, HoldState
from peculium_server.core.sweeping import collect, expire, lapse, system_id
from tests.core.ledger import HOUR, MINUTE, Ledger

SUBJECT = bytes.fromhex("0193a1b2c3d4700080000000000000ab")


def test_a_system_id_is_sha256_of_the_kind_and_what_it_acts_on_in_the_form_of_a_uuid8() -> None:
    for kind in (Kind.LAPSE, Kind.EXPIRE, Kind.COLLECT):
        digest = hashlib.sha256(b"peculium.system.v1\x00" + bytes([kind]) + SUBJECT).digest()
        made = system_id(kind, SUBJECT)
        assert made[:6] == SUBJECT[:6]
        assert made[6] >> 4 == 8
        assert made[8] >> 6 == 2
        assert made[7] == digest[1]
        assert made[9:] == digest[3:10]
        assert (made[6] & 0x0F, made[8] & 0x3F) == (digest[0] & 0x0F, digest[2] & 0x3F)


def test_system_ids_of_other_kinds_and_subjects_are_others() -> None:
    subjects = [SUBJECT[:6] + secrets.token_bytes(10) for _ in range(100)]
    kinds = (Kind.LAPSE, Kind.EXPIRE, Kind.COLLECT)
    assert len({system_id(kind, subject) for kind in kinds for subject in subjects}) == 300


def test_system_ids_are_in_order_of_the_time_in_their_subjects_ids() -> None:
    ledger = Ledger()
    subjects = []
    for _ in range(20):
        ledger.pass_time(1_000)
        subjects.append(ledger.id())
    ids = [system_id(Kind.LAPSE, subject) for subject in subjects]
    assert ids == sorted(ids)


def test_whatever_the_ledger_does_twice_is_a_replay() -> None:
    ledger = Ledger(eager=0)
    root = ledger.grant(1_000)
    leased = root.child(100, lease_us=HOUR)
    below = leased.child(40)
    hold = leased.hold(10)
    ledger.pass_time(HOUR)
    for operation in (
        lapse(root.id, leased.id, hold.id),
        expire(root.id, leased.id),
        collect(root.id, below.id),
    ):
        first = ledger.do(operation, SYSTEM)
        position = ledger.position
        assert ledger.do(operation, SYSTEM) == first._replace(replayed=True)
        assert ledger.position == position
    assert hold.hold.state is HoldState.LAPSED
    assert root.money == Balances(granted=1_000, available=990, delegated=10)
    assert ledger.verify(root.id) is None


def test_what_was_too_early_is_not_recorded_and_done_when_its_time_has_come() -> None:
    ledger = Ledger()
    root = ledger.grant(100)
    hold = root.hold(10, ttl_us=10 * MINUTE)
    operation = lapse(root.id, root.id, hold.id)
    ledger.refuse(operation, Refusal.NOT_DUE, SYSTEM)
    ledger.pass_time(10 * MINUTE)
    assert not ledger.do(operation, SYSTEM).replayed


@pytest.mark.parametrize("kind", [Kind.LAPSE, Kind.EXPIRE, Kind.COLLECT])
def test_no_client_can_take_the_id_of_what_the_ledger_will_do(kind: Kind) -> None:
    """Or an agent could keep its lease from ending."""
    ledger = Ledger()
    root = ledger.grant(100)
    taking = root.spend(1, operation_id=system_id(kind, root.id))
    facts = ledger.refuse(taking, Refusal.MALFORMED)
    assert facts["field"] == "operation_id"


def test_a_system_operation_is_well_formed_whatever_its_subjects_id() -> None:
    """Ids of version 7 are asked for when they are made, and nothing looks at them afterwards."""
    for subject in (bytes(16), b"\xff" * 16, SUBJECT):
        made: list[Operation] = [
            lapse(SUBJECT, SUBJECT, subject),
            expire(SUBJECT, subject),
            collect(SUBJECT, subject),
        ]
        assert [check_shape(operation) for operation in made] == [None] * 3


def test_a_lease_ends_below_a_closed_level_too_and_what_is_left_is_collected() -> None:
    """Its money goes where that of the closed level goes."""
    ledger = Ledger(eager=0)
    root = ledger.grant(1_000)
    top = root.child(500)
    leased = top.child(300, lease_us=HOUR)
    below = leased.child(100)
    hold = leased.hold(50)
    ledger.do(root.revoke(top))
    ledger.refuse(leased.expire(), Refusal.NOT_DUE)
    ledger.pass_time(HOUR)
    outcome = ledger.do(expire(root.id, leased.id), SYSTEM)
    assert isinstance(outcome, Outcome)
    assert (outcome.returned, outcome.pending) == (150, 100)
    assert leased.budget.closed
    assert leased.money == Balances(granted=150, delegated=100, held=50)
    ledger.refuse(leased.expire(), Refusal.BUDGET_CLOSED)
    ledger.do(collect(root.id, below.id), SYSTEM)
    ledger.do(hold.settle(20))
    assert root.money == Balances(granted=1_000, available=980, delegated=20)
    assert ledger.verify(root.id) is None
