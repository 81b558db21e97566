"""The alerter: finds what rules watch for, on every server, and has it sent to whom it concerns.

It works behind the operations and never in their way: it looks at committed entries, of trees that have
rules only, and sums up a subtree only if its tree has moved. What it finds is recorded together with how
far it has looked, so that nothing is found twice or passed over, whichever of the servers looks, and
whatever becomes of it meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Final

from opentelemetry import metrics

from peculium_server.core.alerts import (
    Alert,
    AlertKind,
    Reading,
    Rule,
    alert_of,
    concerns,
    event_of,
    look,
)
from peculium_server.core.limits import SECOND_US
from peculium_server.core.refusals import id_text
from peculium_server.core.state import Budget
from peculium_server.store.alerting import Standing
from peculium_server.store.alerts import Progress
from peculium_server.store.errors import LedgerCorrupt, StoreError
from peculium_server.store.history import with_totals
from peculium_server.store.store import Store
from peculium_server.telemetry import instruments

ALERTS_MAX: Final = 256
"""Once so many are found in a round, the rest is left to the next one, at once."""
POSITIONS_MAX: Final = 65_536
"""Of a lane, that are looked at in one round; more of them are looked at in the next one, at once."""
SUM_SHARE: Final = 10
"""A subtree that takes long to sum up is left alone for so many times as long."""
FORGET_SECONDS: Final = 600.0
UNAVAILABLE_SECONDS: Final = 5.0

_logger = logging.getLogger(__name__)


class Round(Enum):
    """What a round has come to."""

    LOOKED = auto()
    MORE = auto()
    """It has looked at as much as it may at once, and more is waiting."""
    OVERTAKEN = auto()
    """Another server was faster, or rules or webhooks have changed."""
    NOTHING = auto()
    """Nothing has moved that anybody watches."""


class Alerter:
    """Looks for what the rules of an open ledger watch for."""

    def __init__(
        self,
        store: Store,
        seconds: float,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        """Begin with nothing known.

        Args:
            store: The ledger's.
            seconds: Between two looks, whichever servers look.
            meter_provider: Of the process, if not given.
        """
        self._store = store
        self._alerting = store.alerting
        self._seconds = seconds
        self._known: tuple[Progress, dict[bytes, Rule]] | None = None
        """The rules, and where alerts stood when these were all: as long as they stand there, they are."""
        self._not_before: dict[bytes, float] = {}
        """When a subtree may be summed up again, by the id of its top."""
        self._forget_at = 0.0
        meter = metrics.get_meter(__name__, meter_provider=meter_provider)
        self._rounds = instruments.ALERTER_ROUNDS.counter(meter)
        self._recorded = instruments.ALERTS.counter(meter)

    async def run(self) -> None:
        """Look until cancelled."""
        answers = True
        while True:
            wait = self._seconds
            try:
                if await self.round() in (Round.MORE, Round.OVERTAKEN):
                    wait = 0.0
                await self._forget()
                answers = True
            except StoreError as error:
                wait = max(wait, UNAVAILABLE_SECONDS)
                if answers:
                    _logger.warning("no alerts are found: %s", error)
                answers = False
            except Exception:
                wait = max(wait, UNAVAILABLE_SECONDS)
                _logger.exception("a round of the alerter has failed")
            # Never two servers' the same.
            await asyncio.sleep(wait * (0.75 + secrets.randbelow(1024) / 2048))

    async def round(self) -> Round:
        """Look at what was recorded since somebody has looked, and record what is found.

        Raises:
            StoreError: The database does not say, or does not take it.
        """
        outcome = await self._round()
        self._rounds.add(1, {"outcome": outcome.name.lower()})
        return outcome

    async def _round(self) -> Round:
        standing = await self._alerting.standing()
        # Of several servers one is enough; half the time, since each of them waits for another one.
        age = (standing.now - standing.progress.looked_at) / SECOND_US
        if 0 <= age < self._seconds / 2 and not standing.progress.more:
            return Round.NOTHING
        seen, rules = await self._rules(standing.progress)
        if seen != standing.progress:
            return Round.OVERTAKEN
        by_lane: defaultdict[int, list[Rule]] = defaultdict(list)
        for rule in rules.values():
            by_lane[rule.lane].append(rule)
        looked = _Looked(list(seen.positions))
        for lane, of_lane in sorted(by_lane.items()):
            await self._look(lane, of_lane, standing, looked)
        if not looked.anything:
            return Round.NOTHING
        after = await self._alerting.record(
            seen,
            looked.positions,
            list(looked.changed.values()),
            looked.alerts,
            more=looked.more,
        )
        if after is None:
            return Round.OVERTAKEN
        self._known = after, rules | looked.changed
        for kind, number in Counter(alert.kind for alert in looked.alerts).items():
            self._recorded.add(number, {"kind": instruments.label_of(kind)})
        return Round.MORE if looked.more else Round.LOOKED

    async def _rules(self, progress: Progress) -> tuple[Progress, dict[bytes, Rule]]:
        if self._known is None or self._known[0] != progress:
            seen, rules = await self._alerting.rules()
            self._known = seen, {rule.rule_id: rule for rule in rules}
        return self._known

    # -- One lane -----------------------------------------------------------------------------------

    async def _look(
        self, lane: int, rules: Sequence[Rule], standing: Standing, looked: _Looked
    ) -> None:
        if len(looked.alerts) >= ALERTS_MAX:
            looked.more = True
            return
        now = standing.positions[lane]
        # Before all of the rules were made there is nothing for them.
        after = max(standing.progress.positions[lane], min(rule.since for rule in rules))
        if now < after:
            raise LedgerCorrupt(
                f"lane {lane} was looked at up to {after}, and has {now} operations"
            )
        until = min(now, after + POSITIONS_MAX)
        due = {rule.root_id for rule in rules if rule.due}
        if after < until:
            watched = {rule.root_id for rule in rules if rule.kind is not AlertKind.USED}
            if watched:
                until = await self._events(lane, rules, sorted(watched), after, until, looked)
            summed = {rule.root_id for rule in rules if rule.kind is AlertKind.USED}
            if summed:
                due |= set(
                    await self._alerting.moved(lane, sorted(summed), after=after, until=until)
                )
            looked.positions[lane] = until
            looked.anything = True
            looked.more |= until < now
        await self._thresholds([rule for rule in rules if rule.root_id in due], looked)

    async def _events(
        self,
        lane: int,
        rules: Sequence[Rule],
        root_ids: Sequence[bytes],
        after: int,
        until: int,
        looked: _Looked,
    ) -> int:
        """Find the events of some trees; up to where that was possible."""
        entries, until = await self._alerting.events(lane, root_ids, after=after, until=until)
        last = after
        for entry in entries:
            if len(looked.alerts) >= ALERTS_MAX and entry.position > last:
                until = entry.position - 1
                break
            last = entry.position
            event = event_of(entry)
            if event is None:
                continue
            watching = [
                rule
                for rule in rules
                if rule.root_id == entry.root_id
                and rule.kind is event.kind
                and rule.since < entry.position
            ]
            if not watching:
                continue
            line = await self._store.budget(entry.root_id, entry.budget_id)
            ids = tuple(budget.budget_id for budget in line)
            looked.alerts += [
                alert_of(rule, event, entry, _path(line))
                for rule in watching
                if concerns(rule, event, ids)
            ]
        return until

    async def _thresholds(self, rules: Iterable[Rule], looked: _Looked) -> None:
        """Look at what subtrees have used."""
        by_top: defaultdict[bytes, list[Rule]] = defaultdict(list)
        for rule in rules:
            if rule.kind is AlertKind.USED:
                by_top[rule.budget_id].append(rule)
        for _, of_top in sorted(by_top.items()):
            reading = await self._read(of_top[0])
            for rule in of_top:
                if reading is None:
                    after, alert = rule._replace(due=True), None
                else:
                    after, alert = look(rule, reading)
                if after != rule:
                    looked.change(after)
                if alert is not None:
                    looked.alerts.append(alert)

    async def _read(self, rule: Rule) -> Reading | None:
        """What a subtree has used; None if it is left for another time."""
        begun = time.monotonic()
        if begun < self._not_before.get(rule.budget_id, 0.0):
            return None
        try:
            line, used = await with_totals(self._store, rule.root_id, rule.budget_id)
            at = await self._alerting.now()
        except StoreError as error:
            # Others need not wait for it.
            _logger.warning(
                "what %s has used cannot be summed up: %s", id_text(rule.budget_id), error
            )
            return None
        finally:
            took = time.monotonic() - begun
            self._not_before[rule.budget_id] = begun + took * SUM_SHARE
        closed = any(budget.closed for budget in line)
        return Reading(at, used.used, line[0].money.granted, closed)

    async def _forget(self) -> None:
        """Let go of what is old, now and then."""
        if time.monotonic() < self._forget_at:
            return
        if not await self._alerting.forget():
            self._forget_at = time.monotonic() + FORGET_SECONDS


class _Looked:
    """What a round has looked at, and found."""

    def __init__(self, positions: list[int]) -> None:
        self.positions = positions
        self.changed: dict[bytes, Rule] = {}
        """Rules that are not as they were, by id."""
        self.alerts: list[Alert] = []
        self.anything = False
        self.more = False

    def change(self, rule: Rule) -> None:
        """Keep a rule as it is now."""
        self.changed[rule.rule_id] = rule
        self.anything = True


def _path(line: Sequence[Budget]) -> str:
    return "/".join(budget.name for budget in reversed(line))
