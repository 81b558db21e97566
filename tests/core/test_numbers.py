"""Numbers that are recorded or sent are never changed, and mean the same everywhere."""

from __future__ import annotations

from enum import IntEnum

import pytest

from peculium.v1 import types_pb2
from peculium_server.core.operations import OPERATIONS, Kind
from peculium_server.core.refusals import RULES, Refusal
from peculium_server.core.state import BudgetState, Custody, HoldState

WIRE = {
    BudgetState: types_pb2.BudgetState,
    Custody: types_pb2.Custody,
    HoldState: types_pb2.HoldState,
    Kind: types_pb2.OperationKind,
    Refusal: types_pb2.RefusalReason,
}


@pytest.mark.parametrize("numbers", WIRE, ids=[each.__name__ for each in WIRE])
def test_numbers_are_those_of_the_wire(numbers: type[IntEnum]) -> None:
    wire = WIRE[numbers].DESCRIPTOR
    prefix = wire.values_by_number[0].name.removesuffix("UNSPECIFIED")
    told = {value.name.removeprefix(prefix): value.number for value in wire.values if value.number}
    assert {each.name: each.value for each in numbers} == told


def test_every_kind_has_a_value_of_its_own() -> None:
    assert list(OPERATIONS) == list(Kind)
    assert all(OPERATIONS[kind].kind is kind for kind in Kind)


def test_every_refusal_has_a_sentence() -> None:
    assert list(RULES) == list(Refusal)
    sentences = [rule.sentence for rule in RULES.values()]
    assert len(sentences) == len(set(sentences))
    assert all(sentence.endswith(".") for sentence in sentences)
