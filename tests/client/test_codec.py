from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest

from peculium import _codec as codec
from peculium.v1 import types_pb2
from peculium.values import HoldState, Receipt

OUTCOME = types_pb2.Outcome(
    operation_id=b"o" * 16,
    budget_id=b"b" * 16,
    balances=types_pb2.Balances(available=7),
    hold=types_pb2.Hold(hold_id=b"h" * 16, state=types_pb2.HOLD_STATE_LIVE, amount=3),
)


def test_a_receipt_that_nobody_looked_at_yet_equals_one_that_somebody_did() -> None:
    read = codec.receipt(OUTCOME)
    assert read.hold is not None
    assert (read.balances.available, read.hold.state, read.hold.amount) == (7, HoldState.LIVE, 3)
    assert codec.receipt(OUTCOME) == read
    assert hash(codec.receipt(OUTCOME)) == hash(read)
    assert repr(codec.receipt(OUTCOME)) == repr(read)


def test_a_receipt_is_decoded_when_it_is_looked_at_and_only_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded: list[bytes] = []
    decode = codec._receipt

    def watch(encoded: bytes) -> Receipt:
        decoded.append(encoded)
        return decode(encoded)

    monkeypatch.setattr(codec, "_receipt", watch)
    receipt = codec.receipt(OUTCOME)
    assert decoded == []
    assert (receipt.balances.available, receipt.replayed, receipt.balances.held) == (7, False, 0)
    assert decoded == [OUTCOME.SerializeToString()]


def test_a_receipt_is_a_value_as_any_other() -> None:
    receipt = codec.receipt(OUTCOME)
    assert pickle.loads(pickle.dumps(codec.receipt(OUTCOME))) == receipt  # noqa: S301 - our own
    assert copy.deepcopy(codec.receipt(OUTCOME)) == receipt
    assert replace(codec.receipt(OUTCOME), seq=5).seq == 5
    match codec.receipt(OUTCOME):
        case Receipt(returned=returned):
            assert returned == 0


def test_a_receipt_has_no_other_attributes() -> None:
    with pytest.raises(AttributeError, match="amount"):
        _ = codec.receipt(OUTCOME).amount  # type: ignore[attr-defined]


def test_a_receipt_is_what_the_answer_said_when_it_came() -> None:
    outcome = types_pb2.Outcome()
    outcome.CopyFrom(OUTCOME)
    receipt = codec.receipt(outcome)
    outcome.balances.available = 1
    assert receipt.balances.available == 7
