"""What was recorded last is told by whole operations, however many rows are read at once."""

from __future__ import annotations

from typing import Any

import pytest

from peculium_server.core.state import Entry
from peculium_server.store import rows, tail
from peculium_server.store.errors import LedgerCorrupt
from tests.core.ledger import Ledger

Row = tuple[Any, ...]


@pytest.fixture
def journal() -> list[Entry]:
    """Operations of one to four parts, all of one lane."""
    ledger = Ledger()
    root = ledger.grant(1_000)
    ledger.do(root.delegate(*[root.spec(10) for _ in range(3)]))
    ledger.do(root.spend(1))
    ledger.do(root.delegate(*[root.spec(10) for _ in range(2)]))
    return ledger.journal


def told(journal: list[Entry], *, after: int, limit: int) -> list[Row]:
    """What the database tells: so many rows at most."""
    behind = [entry for entry in journal if entry.position > after]
    return [(*rows.from_entry(entry), entry.previous_hash, True) for entry in behind[:limit]]


@pytest.mark.parametrize("limit", [5, 6, 7, 8, 9, 100])
async def test_reading_on_tells_every_operation_once_with_all_its_parts(
    limit: int, journal: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "TAIL_ROWS_MAX", limit)
    end, after = journal[-1].position, 0
    recorded: list[tail.Recorded] = []
    while after < end:
        found = await tail.to_tail(told(journal, after=after, limit=limit), end)
        recorded += found.operations
        assert after < found.until <= end
        after = found.until
    assert [entry for operation in recorded for entry in operation.entries] == journal
    assert [operation.position for operation in recorded] == [1, 2, 3, 4]
    assert all(operation.request for operation in recorded)


async def test_an_operation_of_more_parts_than_are_read_at_once_is_refused(
    journal: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "TAIL_ROWS_MAX", 4)
    with pytest.raises(LedgerCorrupt, match="position 2"):
        await tail.to_tail(told(journal, after=1, limit=4), 4)


@pytest.mark.parametrize("lanes", [[0], [0, 2], [1, 0], [0, 1, 2]])
def test_all_lanes_have_to_stand_somewhere(lanes: list[int]) -> None:
    assert tail.to_positions([(0, 7), (1, 9)], 2) == (7, 9)
    with pytest.raises(LedgerCorrupt, match="position"):
        tail.to_positions([(lane, 7) for lane in lanes], 2)
