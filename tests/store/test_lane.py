"""What a lane's transaction loads and saves, operation by operation."""

from __future__ import annotations

from peculium_server.core.operations import After, ByHolder, ByRole, Usage
from peculium_server.core.refusals import Refusal
from peculium_server.core.state import Custody, HoldState
from tests.core.ledger import HOUR, HoldRef, Node
from tests.store.stored import StoredLedger


async def reserved(node: Node, amount: int = 10) -> HoldRef:
    assert isinstance(node.ledger, StoredLedger)
    reserve = node.reserve(amount)
    await node.ledger.accept(reserve)
    return HoldRef(node, reserve.hold_id)


async def test_every_kind_of_operation_is_loaded_as_it_was_saved(ledger: StoredLedger) -> None:
    root = await ledger.root(10**12, labels=(("run", ""), ("team", "böhse")))
    await ledger.accept(root.top_up(5))
    await ledger.accept(root.withdraw(3))
    child = await ledger.below(
        root,
        1_000,
        labels=(("run", "7"),),
        overrun_factor=2,
        lease_us=HOUR,
        lease_latest_us=9 * HOUR,
    )
    await ledger.accept(root.fund(child, 500, lease_us=2 * HOUR))
    await ledger.accept(child.renew(3 * HOUR))
    await ledger.accept(child.accept())
    first, second, third = [await reserved(child, 100) for _ in range(3)]
    usage = Usage(provider="p", model="m", input_tokens=1, output_tokens=2, cached_tokens=3)
    await ledger.accept(first.settle(70, reference="req-1", usage=usage, estimated=True))
    await ledger.accept(second.extend())
    await ledger.accept(second.settle(30, keep_open=True))
    await ledger.accept(second.settle(200))
    await ledger.accept(third.release())
    await ledger.accept(child.spend(7, trace_id=bytes(range(16))))
    fourth = await reserved(child)
    await ledger.accept(child.recover(holds=(fourth.rotation(),)))
    await ledger.accept(child.resolve(fourth, 3))
    await ledger.accept(first.node.admin_resolve(first, 60))
    await ledger.accept(child.freeze(reason="why"))
    await ledger.accept(child.unfreeze())
    await ledger.accept(child.admin_recover(holder="ops", next_token_id=None))
    assert child.budget.custody is Custody.PRINCIPAL
    grandchild = await ledger.below(child, 50)
    await ledger.accept(child.give_back(20))
    await ledger.accept(root.revoke(child))
    await ledger.accept(grandchild.collect())
    assert await ledger.verified(root.root_id) is None


async def test_a_far_too_large_settle_is_disputed_and_resolved(ledger: StoredLedger) -> None:
    root = await ledger.root(1_000)
    child = await ledger.below(root, 100)
    hold = await reserved(child, 10)
    await ledger.accept(hold.settle(10**18))
    assert hold.hold.state is HoldState.DISPUTED
    assert child.budget.disputed == 10**18 - 20
    await ledger.accept(child.admin_resolve(hold, 2_000))
    assert root.money.overrun == 1_000
    await ledger.accept(root.top_up(1_500))
    assert await ledger.verified(root.root_id) is None


async def test_operations_of_one_transaction_see_each_other(ledger: StoredLedger) -> None:
    root = await ledger.root(100)
    one = root.reserve(10)
    two = root.reserve(20, authority=After(0))
    settle = HoldRef(root, one.hold_id).settle(4, authority=After(0))
    three = root.spend(5, authority=After(1))
    await ledger.accept(one, two, settle, three)
    assert root.money.available == 71
    assert await ledger.verified(root.root_id) is None


async def test_a_hold_that_began_and_ended_in_one_transaction_is_loaded_as_ended(
    ledger: StoredLedger,
) -> None:
    root = await ledger.root(100)
    reserve = root.reserve(10)
    hold = HoldRef(root, reserve.hold_id)
    await ledger.accept(reserve, hold.settle(4, authority=After(0)))
    assert (await ledger.refused(root.reserve(hold_id=hold.id))).reason is Refusal.ID_TAKEN


async def test_what_was_recorded_is_found_again_with_all_its_parts(ledger: StoredLedger) -> None:
    root = await ledger.root(100)
    delegate = root.delegate(root.spec(10), root.spec(20), root.spec(0))
    [made] = await ledger.accept(delegate)
    [again] = await ledger.accept(delegate)
    assert again == made._replace(replayed=True)
    spend = root.spend(1)
    await ledger.accept(spend)
    [again] = await ledger.accept(spend)
    assert again.replayed


async def test_a_consumed_token_tells_who_consumed_it(ledger: StoredLedger) -> None:
    root = await ledger.root(100)
    spend = root.spend(1)
    await ledger.accept(spend)
    refused = await ledger.refused(root.spend(2, authority=spend.authority))
    assert refused.reason is Refusal.TOKEN_CONSUMED
    assert refused.facts["kind"] == "SPEND"


async def test_a_produced_token_may_not_be_an_open_holds(ledger: StoredLedger) -> None:
    root = await ledger.root(100)
    hold = await reserved(root)
    refused = await ledger.refused(root.spend(1, next_token_id=hold.hold.token))
    assert refused.reason is Refusal.TOKEN_ID_REUSED


async def test_names_are_taken_for_ever_among_siblings_and_among_roots(
    ledger: StoredLedger,
) -> None:
    root = await ledger.root(100, name="acme")
    child = await ledger.below(root, 10, name="research")
    await ledger.accept(child.return_all())
    again = root.delegate(root.spec(1, name="research"))
    assert (await ledger.refused(again)).reason is Refusal.NAME_TAKEN
    await ledger.accept(root.delegate(root.spec(1, name="Research")))
    other = ledger.ask_grant(1, name="acme")
    lane = ledger.store.lane_of(root.root_id)
    while ledger.store.lane_of(other.root_id) != lane:
        other = ledger.ask_grant(1, name="acme")
    assert (await ledger.refused(other)).reason is Refusal.NAME_TAKEN


async def test_a_deep_line_is_loaded_whole(ledger: StoredLedger) -> None:
    node = await ledger.root(1_000)
    for depth in range(15):
        node = await ledger.below(node, 900 - depth)
    assert len(node.budget.ancestors) == 15
    await ledger.accept(node.spend(1))
    assert (await ledger.refused(node.delegate(node.spec(1)))).reason is Refusal.TREE_TOO_DEEP
    assert await ledger.verified(node.root_id) is None


async def test_an_open_child_is_found_wherever_it_is(ledger: StoredLedger) -> None:
    root = await ledger.root(1_000)
    top = await ledger.below(root, 500)
    await ledger.below(top, 0)
    rich = await ledger.below(top, 5)
    assert (await ledger.refused(top.return_all())).reason is Refusal.OPEN_CHILDREN
    await ledger.accept(rich.return_all())
    assert (await ledger.refused(top.return_all())).reason is Refusal.OPEN_CHILDREN
    await ledger.accept(top.return_all(cascade=True))
    assert await ledger.verified(root.root_id) is None


async def test_what_is_below_a_closing_budget_is_returned_or_pending(ledger: StoredLedger) -> None:
    root = await ledger.root(10_000)
    top = await ledger.below(root, 5_000)
    specs = [top.spec(10) for _ in range(90)]
    await ledger.accept(top.delegate(*specs))
    deep = await ledger.below(Node(ledger, root.root_id, specs[0].budget_id), 4)
    [outcome] = await ledger.accept(root.revoke(top))
    assert (outcome.returned, outcome.pending) == (4_100 + 640 - 4, 264)
    await ledger.accept(deep.collect())
    assert await ledger.verified(root.root_id) is None


async def test_recover_lists_no_more_holds_than_it_may(ledger: StoredLedger) -> None:
    root = await ledger.root(10_000, holder="ops", by_token=False)
    for _ in range(3):
        await ledger.accept(*[root.reserve(1, authority=ByHolder()) for _ in range(200)])
    [outcome] = await ledger.accept(root.admin_recover(authority=ByRole()))
    assert len(outcome.holds) == 256
    assert outcome.holds_truncated


async def test_a_refusal_saves_nothing(ledger: StoredLedger) -> None:
    root = await ledger.root(100)
    before = await ledger.store.budget(root.root_id, root.id)
    assert (await ledger.refused(root.spend(101))).reason is Refusal.BUDGET_EXHAUSTED
    assert await ledger.store.budget(root.root_id, root.id) == before
    assert (await ledger.store.standing(ledger.store.lane_of(root.root_id))).position == 1


async def test_nothing_is_found_under_unknown_ids(ledger: StoredLedger) -> None:
    root = await ledger.root(100)
    stranger = Node(ledger, ledger.id(), ledger.id())
    while ledger.store.lane_of(stranger.root_id) != ledger.store.lane_of(root.root_id):
        stranger = Node(ledger, ledger.id(), ledger.id())
    spend = root.spend(1)
    foreign = type(spend)(
        operation_id=ledger.id(),
        root_id=stranger.root_id,
        budget_id=root.id,
        authority=spend.authority,
        amount=1,
        next_token_id=ledger.token(),
    )
    assert (await ledger.refused(foreign)).reason is Refusal.CAPABILITY_UNKNOWN
