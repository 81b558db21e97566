"""The naive model agrees with what the store keeps."""

from __future__ import annotations

from tests.audit.journal import Journal
from tests.audit.world import World
from tests.rpc.wire import Stored


async def test_the_fold_of_the_entries_is_what_the_rows_say(stored: Stored) -> None:
    world = World(stored.store, seed=4)
    root = await world.begin()
    journal = await Journal.read(stored.store, root.root_id)
    assert journal.first.keys() == {node.id for node in world.nodes}
    for node in world.nodes:
        account, row = journal.account(node.id), node.budget
        assert account is not None
        for name in account.__dataclass_fields__:
            assert getattr(account, name) == getattr(row, name), name
    states = {node.budget.state(world.ledger.now) for node in world.nodes}
    assert len(states) > 1, "it would be no test of anything that it does not have"
