"""Counts what a server does.

Whatever happens for each operation is added to plain dictionaries, which are read when somebody collects,
some times a minute: an instrument's own addition would cost more than the rest of the operation's way
through the lane. Only what a transaction or a call is measured by is recorded at once, with the trace that
it belongs to as its exemplar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Final

from opentelemetry import metrics

from peculium_server.core.operations import Kind
from peculium_server.core.refusals import Refusal
from peculium_server.core.reuse import ReuseKind
from peculium_server.core.state import Accepted
from peculium_server.core.throttle import Limit
from peculium_server.telemetry import instruments
from peculium_server.telemetry.instruments import Instrument

_UNITS: Final = frozenset(instruments.UNITS)
_SQLSTATES: Final = frozenset(instruments.SQLSTATES)
_OTHER: Final = "other"

ReadersUse = tuple[int, int]
"""Places for connections in use, and idle ones."""


class Meters:
    """The instruments of one server, and the counts behind them."""

    def __init__(self, provider: metrics.MeterProvider | None = None) -> None:
        """Begin with nothing counted.

        Args:
            provider: Who collects; of the process, if not given.
        """
        self._meter = metrics.get_meter("peculium_server", meter_provider=provider)
        self._operations: dict[tuple[Kind, str], int] = {}
        self._refusals: dict[Refusal, int] = {}
        self._limited = dict.fromkeys(Limit, 0)
        self._amounts: dict[tuple[Kind, str], int] = {}
        # An overrun may be the only one: see `Instrument.counter`.
        self._overrun = dict.fromkeys(instruments.UNITS, 0)
        self._retries: dict[str, int] = {}
        # All of them from the beginning: the first is seen as an increase.
        self._reused = dict.fromkeys(ReuseKind, 0)
        self._batch_size = instruments.BATCH_SIZE.histogram(self._meter)
        self._commit_duration = instruments.COMMIT_DURATION.histogram(self._meter)
        self._call_duration = instruments.CALL_DURATION.histogram(self._meter)
        for instrument, observe in (
            (instruments.OPERATIONS, self._observe_operations),
            (instruments.REFUSALS, self._observe_refusals),
            (instruments.LIMITED, self._observe_limited),
            (instruments.AMOUNTS, self._observe_amounts),
            (instruments.OVERRUN, self._observe_overrun),
            (instruments.RETRIES, self._observe_retries),
            (instruments.SECURITY_EVENTS, self._observe_reused),
        ):
            instrument.observed(self._meter, observe)

    # -- What happens -------------------------------------------------------------------------------

    def answered(self, kind: Kind, outcome: str) -> None:
        """An operation has its answer."""
        key = kind, outcome
        counts = self._operations
        counts[key] = counts.get(key, 0) + 1

    def refused(self, reason: Refusal, number: int) -> None:
        """A caller was told no, so many times."""
        self._refusals[reason] = self._refusals.get(reason, 0) + number

    def limited(self, limit: Limit) -> None:
        """A call was told to wait, since its principal has reached a limit."""
        self._limited[limit] += 1

    def committed(self, operations: int, seconds: float, saved: Iterable[Accepted]) -> None:
        """A transaction of a lane is committed, in the context of its span.

        Args:
            operations: How many were decided in it.
            seconds: How long it took.
            saved: What was accepted.
        """
        self.ended("committed", seconds)
        self._batch_size.record(operations)
        amounts = self._amounts
        for accepted in saved:
            unit = accepted.budgets[0].unit
            if unit not in _UNITS:
                unit = _OTHER
            entries = accepted.entries
            key = entries[0].kind, unit
            amounts[key] = amounts.get(key, 0) + entries[0].amount
            overrun = sum(entry.effect.changes.overrun for entry in entries)
            if overrun > 0:
                self._overrun[unit] += overrun

    def ended(self, outcome: str, seconds: float) -> None:
        """A transaction of a lane has come to an end, as named in `instruments.COMMITS`."""
        self._commit_duration.record(seconds, {"outcome": outcome})

    def retried(self, sqlstate: str | None) -> None:
        """An attempt of a transaction failed; without a code the connection was lost."""
        state = "lost" if sqlstate is None else sqlstate
        if state not in _SQLSTATES:
            state = _OTHER
        self._retries[state] = self._retries.get(state, 0) + 1

    def reused(self, kind: ReuseKind) -> None:
        """A secret was shown by another than whose it is."""
        self._reused[kind] += 1

    def called(self, method: str, status: str, seconds: float) -> None:
        """A call has ended, in the context of its span."""
        attributes = {
            "rpc.method": method,
            "rpc.system.name": "grpc",
            "rpc.response.status_code": status,
        }
        self._call_duration.record(seconds, attributes)

    # -- What is ------------------------------------------------------------------------------------

    def watch_lanes(self, depths: Callable[[], Iterable[tuple[str, int]]]) -> None:
        """Tell how much waits in each lane, by its name."""

        def observe(_: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
            for name, depth in depths():
                yield metrics.Observation(depth, {"lane": name})

        instruments.LANE_DEPTH.observed(self._meter, observe)

    def watch_readers(self, use: Callable[[], ReadersUse]) -> None:
        """Tell how many of the connections for reads are used."""

        def observe(_: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
            for state, number in zip(instruments.READER_STATES, use(), strict=True):
                yield metrics.Observation(number, {"state": state})

        instruments.READERS.observed(self._meter, observe)

    def watch_holds(self, holds: Callable[[], Mapping[str, int]]) -> None:
        """Tell how many holds there are, by state."""

        def observe(_: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
            for state, number in holds().items():
                yield metrics.Observation(number, {"state": state})

        instruments.HOLDS.observed(self._meter, observe)

    def watch_roots(self, balances: Callable[[], Mapping[str, Mapping[str, int]]]) -> None:
        """Tell the balances of some roots, by name."""

        def observe(_: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
            for root, money in balances().items():
                for balance, amount in money.items():
                    # Beyond what the wire's integers hold where it is added up.
                    attributes = {"root": root, "balance": balance}
                    yield metrics.Observation(float(amount), attributes)

        instruments.ROOT_BALANCE.observed(self._meter, observe)

    def watch_alerts(self, waiting: Callable[[], Mapping[Instrument, float]]) -> None:
        """Tell what is still to be done about alerts, as far as that is known."""

        def observe(
            instrument: Instrument, _: metrics.CallbackOptions
        ) -> Iterator[metrics.Observation]:
            found = waiting()
            if instrument in found:
                yield metrics.Observation(found[instrument])

        for each in (
            *(instruments.ALERTER_LAG, instruments.ALERTER_DUE),
            *(instruments.OUTBOX_DEPTH, instruments.OUTBOX_AGE),
        ):
            each.observed(self._meter, partial(observe, each))

    def watch_unattributed(self, refusals: Callable[[], int]) -> None:
        """Tell how many refusals are in the table without their budget."""

        def observe(_: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
            yield metrics.Observation(refusals())

        instruments.REFUSALS_UNATTRIBUTED.observed(self._meter, observe)

    # -- What is read -------------------------------------------------------------------------------
    # In another thread: a copy of a dictionary is made at once.

    def _observe_operations(self, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for (kind, outcome), number in self._operations.copy().items():
            attributes = {"kind": instruments.label_of(kind), "outcome": outcome}
            yield metrics.Observation(number, attributes)

    def _observe_refusals(self, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for reason, number in self._refusals.copy().items():
            yield metrics.Observation(number, {"reason": instruments.label_of(reason)})

    def _observe_limited(self, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for limit, number in self._limited.copy().items():
            yield metrics.Observation(number, {"limit": limit.value})

    def _observe_amounts(self, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for (kind, unit), amount in self._amounts.copy().items():
            attributes = {"kind": instruments.label_of(kind), "unit": unit}
            yield metrics.Observation(float(amount), attributes)

    def _observe_overrun(self, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for unit, amount in self._overrun.copy().items():
            yield metrics.Observation(float(amount), {"unit": unit})

    def _observe_retries(self, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for sqlstate, number in self._retries.copy().items():
            yield metrics.Observation(number, {"sqlstate": sqlstate})

    def _observe_reused(self, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for kind, number in self._reused.copy().items():
            yield metrics.Observation(number, {"kind": instruments.label_of(kind)})
