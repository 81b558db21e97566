"""Alerts in the store: rules, what they have found, webhooks, and the outbox of deliveries.

Whatever changes rules, alerts or webhooks does it in a SERIALIZABLE transaction that writes the one row
of `alert_progress`, so that all of these are in one order: who records alerts knows all rules and webhooks
that there are by then, and nobody else has looked at the same entries. What the ledger has recorded is
read outside of these transactions: no operation is ever in their way, nor they in its.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import psycopg

from peculium_server.core.alerts import (
    RULES_MAX,
    RULES_OF_ALL_MAX,
    WEBHOOKS_MAX,
    Alert,
    DeliveryState,
    Numbered,
    Rule,
    Webhook,
)
from peculium_server.core.limits import SECOND_US
from peculium_server.core.state import Entry
from peculium_server.store import tail
from peculium_server.store.alerts import (
    STATEMENTS,
    Delivery,
    Progress,
    alert_values,
    delivery_values,
    rule_changes,
    rule_values,
    webhook_values,
)
from peculium_server.store.audit_reads import BY_INDEX
from peculium_server.store.connect import Readers, is_postgres
from peculium_server.store.errors import LedgerCorrupt, StoreContended, is_contention, translate
from peculium_server.store.reading import fetch_together, reading
from peculium_server.store.tail import Within
from peculium_server.store.waiting import Waiting, waiting
from peculium_server.store.wire import Connection, Statement, Step

EVENTS_MAX: Final = 500
"""Entries that may tell of events, of which as many are looked at in a lane at once."""
KEPT_US: Final = 90 * 86_400 * SECOND_US
"""For so long alerts are kept with their deliveries, and rules and webhooks after they were deleted."""
FORGOTTEN_AT_ONCE: Final = 1_000
_ATTEMPTS_MAX: Final = 10
_NIL: Final = bytes(16)
_NUMBER_MAX: Final = 2**63 - 1
_LAST_ID: Final = b"\xff" * 16

_BEGIN: Final = Step(Statement(b"begin", b"BEGIN ISOLATION LEVEL SERIALIZABLE"))
_COMMIT: Final = Step(Statement(b"commit", b"COMMIT"))

Made = TypeVar("Made", Rule, Webhook)
Told = TypeVar("Told")


class Standing(NamedTuple):
    """Where alerts stand, and where the lanes do."""

    now: int
    """The database's clock. Microseconds since the Unix epoch."""
    progress: Progress
    positions: tuple[int, ...]


class Events(NamedTuple):
    """Entries of a lane that may tell of events, and up to where all of them are among these."""

    entries: tuple[Entry, ...]
    until: int


class TooMany(NamedTuple):
    """There are as many as there may be."""

    what: str
    limit: int


class Alerting:
    """Rules, alerts, webhooks and deliveries of an open ledger."""

    def __init__(self, readers: Readers, lanes: int) -> None:
        self._readers = readers
        self._lanes = lanes

    # -- What there is to be looked at ------------------------------------------------------------

    async def standing(self) -> Standing:
        """Where alerts and lanes stand.

        Raises:
            StoreError: The database does not say.
        """
        async with reading(self._readers) as connection:
            progress, clock, positions = await fetch_together(
                connection,
                # First up to where was looked: where the lanes stand afterwards is not before that.
                Step(STATEMENTS["progress"]),
                Step(STATEMENTS["alert_clock"]),
                Step(tail.STATEMENTS["positions"]),
            )
        found = _only(progress)
        if len(found.positions) != self._lanes:
            raise LedgerCorrupt("alerts are of other lanes")
        return Standing(clock[0], found, tail.to_positions(positions, self._lanes))

    async def waiting(self) -> Waiting:
        """What is still to be done.

        Raises:
            StoreError: The database does not say.
        """
        async with reading(self._readers) as connection:
            return await waiting(connection, self._lanes)

    async def rules(self) -> tuple[Progress, list[Rule]]:
        """Where alerts stand, and all rules that were not deleted by then, or a little later."""
        async with reading(self._readers) as connection:
            # In this order: who has the rules of a later moment than this one records nothing by them.
            progress, rules = await fetch_together(
                connection, Step(STATEMENTS["progress"]), Step(STATEMENTS["rules"])
            )
        return _only(progress), rules

    async def moved(
        self, lane: int, root_ids: Sequence[bytes], *, after: int, until: int
    ) -> list[bytes]:
        """Of some trees of a lane those that have entries between two positions."""
        values = {"lane": lane, "root_ids": root_ids, "after": after, "until": until}
        return await self._fetch_by_index("moved", **values)

    async def events(
        self, lane: int, root_ids: Sequence[bytes], *, after: int, until: int
    ) -> Events:
        """Entries of some trees between two positions that may tell of events, the first ones if many."""
        values = {"lane": lane, "root_ids": root_ids, "after": after, "until": until}
        found: list[Entry] = await self._fetch_by_index("events", **values, limit=EVENTS_MAX)
        if len(found) < EVENTS_MAX:
            return Events(tuple(found), until)
        # Of the last operation a part may be missing.
        edge = found[-1].position
        whole = tuple(entry for entry in found if entry.position < edge)
        if not whole:
            raise LedgerCorrupt(
                f"the operation at position {edge} of lane {lane} has too many parts"
            )
        return Events(whole, edge - 1)

    async def record(
        self,
        seen: Progress,
        positions: Sequence[int],
        changed: Sequence[Rule],
        found: Sequence[Alert],
        *,
        more: bool = False,
    ) -> Progress | None:
        """Record what was found, with its deliveries, unless anything about alerts has changed.

        Args:
            seen: Where alerts stood when it was looked for.
            positions: Up to where, by lane, everything was looked at.
            changed: Rules that are not as they were.
            found: The alerts, in their order.
            more: There is more to be looked at, which does not wait.

        Returns:
            Where alerts stand now; None if another server was faster, or rules or webhooks have changed.

        Raises:
            StoreError: It was not recorded, or nobody knows.
        """

        async def recording(connection: Connection, progress: Progress) -> Progress | None:
            if progress != seen:
                return None
            webhooks, clock = await fetch_together(
                connection, Step(STATEMENTS["live_webhooks"]), Step(STATEMENTS["alert_clock"])
            )
            now = clock[0]
            numbered = [
                Numbered(progress.alerts + index, now, alert)
                for index, alert in enumerate(found, start=1)
            ]
            deliveries = [
                Delivery(
                    webhook.webhook_id, each.number, DeliveryState.PENDING, 0, now, None, 0, ""
                )
                for each in numbered
                for webhook in webhooks
                if webhook.wants(each.alert)
            ]
            after = progress._replace(
                positions=tuple(positions),
                alerts=progress.alerts + len(found),
                looked_at=now,
                more=more,
            )
            steps = [Step(STATEMENTS["save_progress"], after._asdict())]
            if changed:
                steps.append(Step(STATEMENTS["save_rules"], rule_changes(changed)))
            if numbered:
                steps.append(Step(STATEMENTS["add_alerts"], alert_values(numbered)))
            if deliveries:
                steps.append(Step(STATEMENTS["add_deliveries"], delivery_values(deliveries)))
            await fetch_together(connection, *steps)
            return after

        try:
            return await self._change(recording, attempts=1)
        except StoreContended:
            return None

    async def forget(self) -> int:
        """Let go of some of what is older than it is kept; how many alerts that were."""

        async def forgetting(connection: Connection, _: Progress) -> int:
            [now] = await connection.fetch(Step(STATEMENTS["alert_clock"]))
            values = {"now": now - KEPT_US}
            oldest, _rules, _webhooks = await fetch_together(
                connection,
                Step(STATEMENTS["oldest_kept"], {**values, "limit": FORGOTTEN_AT_ONCE}),
                Step(STATEMENTS["forget_rules"], values),
                Step(STATEMENTS["forget_webhooks"], values),
            )
            until: int | None = oldest[0]
            if until is None:
                return 0
            edge = {"until": until}
            await fetch_together(
                connection,
                Step(STATEMENTS["forget_deliveries"], edge),
                Step(STATEMENTS["forget_alerts"], edge),
            )
            return until

        return await self._change(forgetting)

    # -- Rules ------------------------------------------------------------------------------------

    async def add_rule(self, rule: Rule) -> tuple[Rule, bool] | TooMany:
        """Add a rule, unless its id is known.

        Returns:
            The rule that has the id, and whether it was there before; or that there are too many.

        Raises:
            StoreError: It was not added, or nobody knows.
        """

        async def adding(connection: Connection, progress: Progress) -> tuple[Rule, bool] | TooMany:
            there, counts, clock = await fetch_together(
                connection,
                Step(STATEMENTS["rule"], {"rule_id": rule.rule_id}),
                Step(STATEMENTS["count_rules"], {"lane": rule.lane, "root_id": rule.root_id}),
                Step(STATEMENTS["alert_clock"]),
            )
            if there:
                return there[0], True
            of_tree, of_all = counts[0]
            if of_tree >= RULES_MAX:
                return TooMany("alert rules of a tree", RULES_MAX)
            if of_all >= RULES_OF_ALL_MAX:
                return TooMany("alert rules", RULES_OF_ALL_MAX)
            made = rule._replace(created_at=clock[0])
            await fetch_together(
                connection, Step(STATEMENTS["add_rule"], rule_values(made)), _changed(progress)
            )
            return made, False

        return await self._change(adding)

    async def end_rule(self, rule_id: bytes, by: str) -> Rule | None:
        """Delete a rule, and return it as it is then; None if there is none. Twice is once."""
        rule: Rule | None = await self._end("rule", {"rule_id": rule_id}, by)
        return rule

    async def rule(self, rule_id: bytes) -> Rule | None:
        """A rule, deleted or not; None if there is none."""
        found = await self._fetch("rule", rule_id=rule_id)
        return found[0] if found else None

    async def list_rules(
        self, within: Within | None, *, limit: int, after: bytes | None
    ) -> list[Rule]:
        """Some rules by id: of a budget and those below it, or all."""
        values: dict[str, Any] = {"after": after or _NIL, "limit": limit}
        if within is None:
            return await self._fetch("list_rules", **values)
        values |= {"root_id": within.root_id, "budget_id": within.budget_id or within.root_id}
        return await self._fetch("rules_of_subtree", **values)

    # -- Alerts -----------------------------------------------------------------------------------

    async def recorded(self) -> int:
        """How many alerts were recorded: the number of the last one."""
        progress: Progress = _only(await self._fetch("progress"))
        return progress.alerts

    async def list_alerts(
        self,
        within: Within | None,
        *,
        limit: int,
        after: int | None = None,
        descending: bool = False,
    ) -> list[Numbered]:
        """Some alerts by number, behind one: of rules on a budget or within its reach, or all."""
        edge = _NUMBER_MAX if descending else 0
        values: dict[str, Any] = {"after": edge if after is None else after, "limit": limit}
        reach = "ledger"
        if within is not None:
            values["root_id"] = within.root_id
            reach = "tree"
            if within.budget_id is not None:
                values["budget_id"] = within.budget_id
                reach = "subtree" if within.subtree else "budget"
        suffix = "_descending" if descending else ""
        return await self._fetch(f"alerts_of_{reach}{suffix}", **values)

    async def numbered(self, numbers: Sequence[int]) -> dict[int, Numbered]:
        """Some alerts by their numbers, as far as they are kept."""
        found: list[Numbered] = await self._fetch("numbered_alerts", numbers=numbers)
        return {each.number: each for each in found}

    # -- Webhooks ---------------------------------------------------------------------------------

    async def add_webhook(self, webhook: Webhook) -> tuple[Webhook, bool] | TooMany:
        """Add a webhook, unless its id is known; as `add_rule`."""

        async def adding(
            connection: Connection, progress: Progress
        ) -> tuple[Webhook, bool] | TooMany:
            there, live, clock = await fetch_together(
                connection,
                Step(STATEMENTS["webhook"], {"webhook_id": webhook.webhook_id}),
                Step(STATEMENTS["live_webhooks"]),
                Step(STATEMENTS["alert_clock"]),
            )
            if there:
                return there[0], True
            if len(live) >= WEBHOOKS_MAX:
                return TooMany("webhooks", WEBHOOKS_MAX)
            made = webhook._replace(created_at=clock[0])
            await fetch_together(
                connection,
                Step(STATEMENTS["add_webhook"], webhook_values(made)),
                _changed(progress),
            )
            return made, False

        return await self._change(adding)

    async def end_webhook(self, webhook_id: bytes, by: str, problem: str) -> Webhook | None:
        """Delete a webhook; what is pending for it is dead then, of this problem. Twice is once."""
        dead = Step(STATEMENTS["kill_deliveries"], {"webhook_id": webhook_id, "problem": problem})
        webhook: Webhook | None = await self._end("webhook", {"webhook_id": webhook_id}, by, dead)
        return webhook

    async def webhook(self, webhook_id: bytes) -> Webhook | None:
        """A webhook, deleted or not; None if there is none."""
        found = await self._fetch("webhook", webhook_id=webhook_id)
        return found[0] if found else None

    async def webhooks(self) -> list[Webhook]:
        """All webhooks that were not deleted, by id."""
        return await self._fetch("live_webhooks")

    # -- Deliveries -------------------------------------------------------------------------------

    async def due_webhooks(self) -> list[bytes]:
        """The ids of webhooks for which something is to be tried."""
        return await self._fetch("due_webhooks", now=await self.now())

    async def claim(
        self, webhook_id: bytes, *, now: int, limit: int, lease_us: int
    ) -> list[Delivery]:
        """Take some of what is to be tried for a webhook by now; for so long nobody else takes it."""
        return await self._fetch(
            "claim", webhook_id=webhook_id, limit=limit, now=now, until=now + lease_us
        )

    async def finish(
        self,
        delivery: Delivery,
        state: DeliveryState,
        *,
        delay_us: int,
        status: int,
        problem: str,
    ) -> None:
        """Say what became of a delivery that was claimed; if it is pending, when it is tried again."""
        await self._fetch(
            "finish_delivery",
            webhook_id=delivery.webhook_id,
            number=delivery.number,
            attempts=delivery.attempts,
            state=state,
            next_at=await self.now() + delay_us,
            status=status,
            problem=problem,
        )

    async def list_deliveries(
        self,
        webhook_ids: Sequence[bytes],
        states: Sequence[DeliveryState],
        *,
        limit: int,
        after: tuple[int, bytes] | None,
    ) -> list[tuple[Delivery, bytes]]:
        """Some deliveries, the latest alert's first, each with its alert's id; of none said, of all."""
        number, webhook_id = after or (_NUMBER_MAX, _LAST_ID)
        return await self._fetch(
            "list_deliveries",
            webhook_ids=webhook_ids,
            states=states,
            limit=limit,
            after=number,
            webhook_id=webhook_id,
        )

    async def replay(self, webhook_id: bytes, alert_ids: Sequence[bytes] | None) -> int | bytes:
        """Have some deliveries tried as if for the first time: of these alerts, or all dead ones.

        Returns:
            How many; or an alert that the webhook has no delivery of, and then nothing is tried again.
        """

        async def replaying(connection: Connection, _: Progress) -> int | bytes:
            key = {"webhook_id": webhook_id}
            if alert_ids is None:
                return len(await connection.fetch(Step(STATEMENTS["replay_dead"], key)))
            found = await connection.fetch(
                Step(STATEMENTS["delivered_alerts"], {**key, "alert_ids": alert_ids})
            )
            numbers = dict(found)
            for alert_id in alert_ids:
                if alert_id not in numbers:
                    return alert_id
            values = {**key, "numbers": list(numbers.values())}
            return len(await connection.fetch(Step(STATEMENTS["replay_some"], values)))

        return await self._change(replaying)

    # -- All of it --------------------------------------------------------------------------------

    async def now(self) -> int:
        """The database's clock. Microseconds since the Unix epoch."""
        now: int = _only(await self._fetch("alert_clock"))
        return now

    async def _end(self, name: str, key: dict[str, bytes], by: str, *steps: Step) -> Any:
        async def ending(connection: Connection, progress: Progress) -> Any:
            there = await connection.fetch(Step(STATEMENTS[name], key))
            if not there or there[0].deleted_at is not None:
                return there[0] if there else None
            *_, after = await fetch_together(
                connection,
                Step(STATEMENTS[f"end_{name}"], {**key, "by": by}),
                *steps,
                _changed(progress),
                Step(STATEMENTS[name], key),
            )
            return after[0]

        return await self._change(ending)

    async def _change(
        self,
        change: Callable[[Connection, Progress], Awaitable[Told]],
        *,
        attempts: int = _ATTEMPTS_MAX,
    ) -> Told:
        """Change something about alerts in a transaction, again if another one was in the way.

        Raises:
            StoreContended: One was each time.
            StoreError: It was not done, or nobody knows.
        """
        for _ in range(attempts):
            try:
                async with self._readers.connection() as connection:
                    _, progress = await fetch_together(
                        connection, _BEGIN, Step(STATEMENTS["progress"])
                    )
                    told = await change(connection, _only(progress))
                    await fetch_together(connection, _COMMIT)
                    return told
            except psycopg.Error as error:
                if not is_contention(error):
                    raise translate(error) from error
        raise StoreContended(attempts)

    async def _fetch(self, name: str, **values: Any) -> list[Any]:
        async with reading(self._readers) as connection:
            return await connection.fetch(Step(STATEMENTS[name], values))

    async def _fetch_by_index(self, name: str, **values: Any) -> list[Any]:
        """The rows of a statement over entries, which are many."""
        async with reading(self._readers) as connection:
            steps = [Step(STATEMENTS[name], values)]
            if is_postgres(connection):
                steps.insert(0, Step(BY_INDEX))
            return (await fetch_together(connection, *steps))[-1]


def _changed(progress: Progress) -> Step:
    """Let whoever is about to record alerts look again."""
    after = progress._replace(changes=progress.changes + 1)
    return Step(STATEMENTS["save_progress"], after._asdict())


def _only(found: Sequence[Any]) -> Any:
    if len(found) != 1:
        raise LedgerCorrupt("the row that says how far alerts have come is missing")
    return found[0]
