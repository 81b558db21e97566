"""Which column of a bill says what: as the caller names them, or as the well-known reports call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from peculium_server.reconcile.problems import BillInvalid

_WELL_KNOWN: Final[Mapping[str, tuple[str, ...]]] = {
    # Request ids of gateways (LiteLLM, Helicone, OpenRouter), the first that is there.
    "reference": (
        "reference",
        "provider_request_id",
        "request_id",
        "requestId",
        "response_id",
        "generation_id",
        "id",
    ),
    "hold": ("hold_id", "metadata.hold_id", "metadata.peculium_hold_id"),
    # OpenAI's costs (JSON, CSV), Anthropic's cost report, LiteLLM, OpenRouter, Helicone.
    "amount": (
        "amount.value",
        "amount_value",
        "amount",
        "spend",
        "cost_usd",
        "costUSD",
        "cost_total",
        "total_cost",
        "response_cost",
        "cost",
        "usage",
    ),
    "currency": ("amount.currency", "amount_currency", "currency"),
    "time": (
        "start_time_iso",
        "start_time",
        "startTime",
        "starting_at",
        "usage_date_utc",
        "request_created_at",
        "created_at",
        "createdAt",
        "timestamp",
        "created",
        "date",
        "day",
        "time",
    ),
    "model": ("model", "line_item", "model_permaslug"),
}
_LINE_ITEM: Final = "line_item"
_NAMES_TOLD: Final = 30


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of columns; of nested objects with dots between, for example metadata.hold_id.

    Attributes:
        reference: The provider's id of the call. Empty: find one out, if there is one. So with all.
        hold: The ledger's id of the hold, where a gateway was told it.
        amount: What was billed.
        currency: In which currency.
        time: When, or on which day.
        model: Which model.
        labels: Labels of the ledger, with the column that has their values.
    """

    reference: str = ""
    hold: str = ""
    amount: str = ""
    currency: str = ""
    time: str = ""
    model: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def found_in(self, values: Mapping[str, Any], line: int) -> Columns:
        """The same with what was left open found out from the first row.

        Raises:
            BillInvalid: The amount's is not there, or none is known to be it.
        """
        found = {role: getattr(self, role) or _well_known(role, values) for role in _WELL_KNOWN}
        if self.amount and not has(values, self.amount):
            problem = f"is not there; there are {names_told(values)}"
            raise BillInvalid(problem, line=line, column=self.amount)
        if not found["amount"]:
            raise BillInvalid(
                f"no column is known to be the amount, name it; there are {names_told(values)}",
                line=line,
            )
        return Columns(**found, labels=self.labels)

    def names(self) -> set[str]:
        """All columns that are named."""
        roles = {getattr(self, role) for role in _WELL_KNOWN}
        return (roles | set(self.labels.values())) - {""}


def _well_known(role: str, values: Mapping[str, Any]) -> str:
    for name in _WELL_KNOWN[role]:
        if has(values, name) and not isinstance(get(values, name), dict | list):
            return name
    return ""


def has(values: Mapping[str, Any], name: str) -> bool:
    """The row has such a column, perhaps without a value."""
    if name in values:
        return True
    top, dot, rest = name.partition(".")
    inner = values.get(top)
    return bool(dot) and isinstance(inner, dict) and has(inner, rest)


def get(values: Mapping[str, Any], name: str) -> Any:
    """What the row has in a column; None if there is nothing."""
    if name in values:
        return values[name]
    top, dot, rest = name.partition(".")
    inner = values.get(top)
    return get(inner, rest) if dot and isinstance(inner, dict) else None


def text_of(value: Any) -> str:
    """What a cell says, as text: a call's id, a model, a label's value."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).strip()


def model_of(column: str, value: Any) -> str:
    """The model that a cell names: in line items of OpenAI, `gpt-4o-2024-08-06, input`, a part of it."""
    text = text_of(value)
    return text.partition(", ")[0] if column == _LINE_ITEM else text


def names_told(values: Mapping[str, Any]) -> str:
    """The names of a row's columns, for people."""
    names = [str(name) for name in values]
    more = ", …" if len(names) > _NAMES_TOLD else ""
    return (", ".join(names[:_NAMES_TOLD]) or "none") + more
