"""The calls that a ledger knows of: what was recorded of each hold and each spend, put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from peculium_server.core import cbor
from peculium_server.core.encoding import REQUEST_KEYS, USAGE_KEYS
from peculium_server.core.operations import Kind
from peculium_server.core.state import HoldState
from peculium_server.core.usage import MODEL_LABEL

CONCERNED: Final = frozenset(
    {Kind.RESERVE, Kind.SETTLE, Kind.RELEASE, Kind.LAPSE, Kind.RESOLVE, Kind.SPEND}
)
"""The kinds of operations that a call consists of."""

# Keys of the entry encoding.
_LABELS, _AMOUNT, _REFERENCE, _USAGE = (
    REQUEST_KEYS[name] for name in ("labels", "amount", "reference", "usage")
)
_PROVIDER, _MODEL = USAGE_KEYS["provider"], USAGE_KEYS["model"]
_HOLD = 11
_HOLD_ID, _STATE, _RESERVED, _REMAINING, _BOOKED, _DISPUTED, _CREATED = range(1, 8)


class Recorded(NamedTuple):
    """Part 0 of an operation, as it is recorded."""

    kind: Kind
    budget_id: bytes
    operation_id: bytes
    at: int
    """When it was decided. Microseconds since the Unix epoch."""
    request: bytes
    effect: bytes


@dataclass(slots=True)
class Call:
    """A hold as it is, or a spend.

    Attributes:
        budget_id: The budget.
        hold_id: The hold; None for a spend.
        state: Where the hold is in its life; SETTLED for a spend.
        reserved: The amount that was set aside.
        booked: What is booked as spent.
        open: What the ledger leaves open: forfeited by a lapse, or disputed.
        created_at: When it was reserved. Microseconds since the Unix epoch.
        settled: Somebody has settled it; otherwise what is booked an admin or owner has resolved.
        at: When it was last settled, or else when it lapsed, or else when it was reserved.
        references: What the settles called it, in order; most have one.
        model: By the usage facts, or else the label.
        provider: By the usage facts.
        labels: Values of the labels that were asked for.
    """

    budget_id: bytes
    hold_id: bytes | None
    state: HoldState
    reserved: int
    booked: int
    open: int
    created_at: int
    settled: bool
    at: int
    references: tuple[str, ...]
    model: str
    provider: str
    labels: tuple[str, ...]

    @property
    def counted_at(self) -> int:
        """When it counts as billed: when it was last settled, or else when it was reserved."""
        return self.at if self.settled else self.created_at


class Level(NamedTuple):
    """What a budget is as far as calls are concerned."""

    parent_id: bytes | None
    labels: Mapping[str, str]


class Calls:
    """Puts calls together from what is recorded of a tree, in the order of recording."""

    def __init__(self, levels: Mapping[bytes, Level], label_keys: Sequence[str] = ()) -> None:
        """Begin with nothing.

        Args:
            levels: The budgets of the tree: their labels hold for the calls that do not say other.
            label_keys: The labels that matter.
        """
        self._levels = levels
        self._keys = tuple(label_keys)
        self._holds: dict[bytes, Call] = {}
        self._spends: list[Call] = []
        self._said_by: dict[bytes, tuple[str, tuple[str, ...]]] = {}
        self._same: dict[Any, Any] = {}

    def __iter__(self) -> Iterator[Call]:
        """All calls, holds first."""
        yield from self._holds.values()
        yield from self._spends

    def add(self, recorded: Recorded) -> None:
        """Take in the next operation; of those that concern no call nothing is taken.

        Raises:
            ValueError: Request or effect is not as the ledger records it.
        """
        if recorded.kind not in CONCERNED:
            return
        try:
            said: Any = cbor.read(recorded.request)
            if recorded.kind is Kind.SPEND:
                self._spends.append(self._spend(recorded, said))
            else:
                hold = _mapping(_mapping(cbor.read(recorded.effect)).get(_HOLD))
                self._hold(recorded, said, hold)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not what is recorded of a call: {error}") from error

    def _spend(self, recorded: Recorded, said: Mapping[Any, Any]) -> Call:
        model, labels = self._attributes(recorded.budget_id, said)
        reference, facts = said.get(_REFERENCE), said.get(_USAGE, {})
        return Call(
            recorded.budget_id,
            None,
            HoldState.SETTLED,
            reserved=said[_AMOUNT],
            booked=said[_AMOUNT],
            open=0,
            created_at=recorded.at,
            settled=True,
            at=recorded.at,
            references=(reference,) if reference else (),
            model=self._once(facts.get(_MODEL) or model),
            provider=self._once(facts.get(_PROVIDER, "")),
            labels=labels,
        )

    def _hold(self, recorded: Recorded, said: Mapping[Any, Any], hold: Mapping[Any, Any]) -> None:
        hold_id, state = hold[_HOLD_ID], HoldState(hold[_STATE])
        call = self._holds.get(hold_id)
        if call is None:
            model, labels = self._attributes(recorded.budget_id, said)
            call = self._holds[hold_id] = Call(
                self._once(recorded.budget_id),
                hold_id,
                state,
                reserved=hold.get(_RESERVED, 0),
                booked=0,
                open=0,
                created_at=hold[_CREATED],
                settled=False,
                at=hold[_CREATED],
                references=(),
                model=model,
                provider="",
                labels=labels,
            )
        call.state = state
        call.booked = hold.get(_BOOKED, 0)
        lapsed = hold.get(_REMAINING, 0) if state is HoldState.LAPSED else 0
        call.open = lapsed + hold.get(_DISPUTED, 0)
        if recorded.kind is Kind.LAPSE and not call.settled:
            call.at = recorded.at
        elif recorded.kind is Kind.SETTLE:
            self._settled(call, recorded, said)

    def _settled(self, call: Call, recorded: Recorded, said: Mapping[Any, Any]) -> None:
        call.settled, call.at = True, recorded.at
        reference, facts, own = said.get(_REFERENCE), said.get(_USAGE, {}), said.get(_LABELS, {})
        if reference and reference not in call.references:
            call.references += (reference,)
        call.model = self._once(facts.get(_MODEL) or own.get(MODEL_LABEL) or call.model)
        call.provider = self._once(facts.get(_PROVIDER) or call.provider)
        if own and self._keys:
            values = zip(self._keys, call.labels, strict=True)
            call.labels = self._once(tuple(own.get(key, value) for key, value in values))

    def _attributes(self, budget_id: bytes, said: Mapping[Any, Any]) -> tuple[str, tuple[str, ...]]:
        """The model and labels of an operation: its own, or else its budget's or an ancestor's."""
        model, labels = self._of_budget(budget_id)
        own = said.get(_LABELS)
        if not own:
            return model, labels
        values = zip(self._keys, labels, strict=True)
        return (
            self._once(own.get(MODEL_LABEL, model)),
            self._once(tuple(own.get(key, value) for key, value in values)),
        )

    def _of_budget(self, budget_id: bytes) -> tuple[str, tuple[str, ...]]:
        known = self._said_by.get(budget_id)
        if known is None:
            known = self._said_by[budget_id] = (
                self._default(budget_id, MODEL_LABEL),
                tuple(self._default(budget_id, key) for key in self._keys),
            )
        return known

    def _default(self, budget_id: bytes | None, key: str) -> str:
        while budget_id is not None:
            level = self._levels.get(budget_id)
            if level is None:
                break
            if key in level.labels:
                return level.labels[key]
            budget_id = level.parent_id
        return ""

    def _once(self, value: Any) -> Any:
        """The same object for equal values: there are few models, and many calls."""
        return self._same.setdefault(value, value)


def _mapping(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError("a map was expected")
    return value
