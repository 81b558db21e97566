"""What was spent, attributed: by day, label, model, principal, budget or provider, in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any, Final, NamedTuple

from peculium_server.core import cbor
from peculium_server.core.encoding import BALANCE_KEYS, REQUEST_KEYS, USAGE_KEYS
from peculium_server.core.limits import SECOND_US
from peculium_server.core.operations import Kind, Labels

MODEL_LABEL: Final = "model"
"""The label that names the model where the usage facts do not."""

_LABELS: Final = REQUEST_KEYS["labels"]
_USAGE: Final = REQUEST_KEYS["usage"]
_ESTIMATED: Final = REQUEST_KEYS["estimated"]
_PROVIDER, _MODEL, _INPUT, _OUTPUT, _CACHED = USAGE_KEYS.values()
_SPENT: Final = BALANCE_KEYS["spent"]
_FORFEITED: Final = BALANCE_KEYS["forfeited"]
_CHANGES: Final = cbor.integer(1)
"""The key that an effect begins with, if anything has changed."""

_BOOKING: Final = frozenset({Kind.SETTLE, Kind.SPEND, Kind.RESOLVE})
_DAY_US: Final = 86_400 * SECOND_US


class By(IntEnum):
    """What can be grouped by. Numbers are those of the wire."""

    DAY = 1
    LABEL = 2
    MODEL = 3
    PRINCIPAL = 4
    BUDGET = 5
    PROVIDER = 6


class Grouping(NamedTuple):
    """One thing to group by."""

    by: By
    label: str = ""
    """Which one, by label."""


class Booked(NamedTuple):
    """What operations have booked, and what their callers said of them."""

    operations: int = 0
    """Settles, spends and resolves."""
    spent: int = 0
    """What was taken back counts below zero."""
    forfeited: int = 0
    """What was settled or released after its lapse counts below zero."""
    estimated: int = 0
    """Operations whose amount was an estimate."""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0


class Booking(NamedTuple):
    """An operation that may have changed what a budget has spent or forfeited, as it is recorded."""

    budget_id: bytes
    kind: Kind
    at: int
    """When it was decided. Microseconds since the Unix epoch."""
    principal: str
    request: bytes
    effect: bytes
    """On the budget that it names."""


class Level(NamedTuple):
    """A budget or one of its ancestors, as far as it tells where something belongs."""

    name: str
    labels: Labels


Defaults = tuple[str, ...]
"""Of each grouping what a budget says, for operations that say nothing themselves."""
Keys = tuple[str, ...]
"""Of each grouping the text of a group."""


class TooManyGroups(Exception):
    """There are more groups than may be asked for."""


class Usage:
    """Adds up what operations have booked, by group."""

    def __init__(self, groupings: Sequence[Grouping], *, groups_max: int) -> None:
        self.groups: dict[Keys, Booked] = {}
        self._groupings = tuple(groupings)
        self._groups_max = groups_max
        self._days: dict[int, str] = {}

    def defaults(self, line: Sequence[Level]) -> Defaults:
        """What a budget says of each grouping.

        Args:
            line: The budget, then its ancestors up to the root.
        """
        return tuple(_default(grouping, line) for grouping in self._groupings)

    def add(self, booking: Booking, defaults: Defaults) -> None:
        """Count an operation.

        Args:
            booking: The operation.
            defaults: What its budget says of each grouping.

        Raises:
            TooManyGroups: There would be more groups than may be.
            ValueError: Request or effect is not as the ledger records it.
        """
        try:
            changes = _changes(booking.effect)
            if booking.kind not in _BOOKING and not (_SPENT in changes or _FORFEITED in changes):
                # The release of a hold that had not lapsed.
                return
            said = _mapping(cbor.read(booking.request))
            facts = _mapping(said.get(_USAGE, {}))
            keys = self._keys(booking, _mapping(said.get(_LABELS, {})), facts, defaults)
            booked = Booked(
                operations=booking.kind in _BOOKING,
                spent=changes.get(_SPENT, 0),
                forfeited=changes.get(_FORFEITED, 0),
                estimated=said.get(_ESTIMATED, False),
                input_tokens=facts.get(_INPUT, 0),
                output_tokens=facts.get(_OUTPUT, 0),
                cached_tokens=facts.get(_CACHED, 0),
            )
            before = self.groups.get(keys)
            if before is None:
                if len(self.groups) == self._groups_max:
                    raise TooManyGroups
                before = Booked()
            self.groups[keys] = Booked(*map(sum, zip(before, booked, strict=True)))
        except TypeError as error:
            raise ValueError(f"not what an operation says of itself: {error}") from error

    def total(self) -> Booked:
        """What all groups have booked."""
        return Booked(*map(sum, zip(Booked(), *self.groups.values(), strict=True)))

    def _keys(
        self,
        booking: Booking,
        labels: Mapping[Any, Any],
        facts: Mapping[Any, Any],
        defaults: Defaults,
    ) -> Keys:
        keys: list[str] = []
        for (by, label), default in zip(self._groupings, defaults, strict=True):
            match by:
                case By.DAY:
                    keys.append(self._day(booking.at))
                case By.LABEL:
                    keys.append(labels.get(label, default))
                case By.MODEL:
                    keys.append(facts.get(_MODEL) or labels.get(MODEL_LABEL, default))
                case By.PRINCIPAL:
                    keys.append(booking.principal)
                case By.BUDGET:
                    keys.append(default)
                case By.PROVIDER:
                    keys.append(facts.get(_PROVIDER, ""))
        return tuple(keys)

    def _day(self, at: int) -> str:
        number = at // _DAY_US
        day = self._days.get(number)
        if day is None:
            moment = datetime.fromtimestamp(number * _DAY_US // SECOND_US, UTC)
            day = self._days[number] = moment.strftime("%Y-%m-%d")
        return day


def _default(grouping: Grouping, line: Sequence[Level]) -> str:
    match grouping.by:
        case By.BUDGET:
            return "/".join(level.name for level in reversed(line))
        case By.LABEL | By.MODEL:
            label = MODEL_LABEL if grouping.by is By.MODEL else grouping.label
            said = (value for level in line for key, value in level.labels if key == label)
            return next(said, "")
        case _:
            return ""


def _changes(effect: bytes) -> Mapping[Any, Any]:
    """By how much an entry's balances have changed, by their keys."""
    return _mapping(cbor.read(effect, 2)) if effect[1:2] == _CHANGES else {}


def _mapping(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError("a map was expected")
    return value
