"""What the transports of `peculium.httpx` have in common: how attempts are told, ended and refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from peculium._limits import LABEL_VALUE_BYTES_MAX, REFERENCE_BYTES_MAX
from peculium.errors import PeculiumError, Refused, Unavailable
from peculium.metering import AnswerReader, Call, Prices
from peculium.money import Usage
from peculium.values import Seconds

log = logging.getLogger("peculium")

OnRefusal = Literal["raise", "respond"]
"""What becomes of a call that the ledger does not permit."""

RETRY_COUNT = "x-stainless-retry-count"
"""The header in which the clients of OpenAI and Anthropic say which of their own retries it is."""
_REQUEST_IDS = ("x-request-id", "request-id")
_NOT_RETRIED = {"x-should-retry": "false"}
"""The header by which those clients are told not to try again."""

_PERHAPS_BILLED = frozenset({408, 409})
"""Time-outs and conflicts of the provider's own. Other answers below 500 come before any work."""
_OK, _MULTIPLE_CHOICES, _SERVER_ERROR = 200, 300, 500
_REFUSED, _UNAVAILABLE, _INVALID = 402, 503, 400


class Ending(Enum):
    """What is done with the hold of an attempt that was answered."""

    READ = "read"
    """Settled by the usage in the answer."""
    RELEASED = "released"
    """It was surely not billed."""
    SPENT = "spent"
    """It may have been billed: all of it."""


def ending(status: int) -> Ending:
    """What an answer's status means for the bill."""
    if _OK <= status < _MULTIPLE_CHOICES:
        return Ending.READ
    if status < _OK or status >= _SERVER_ERROR or status in _PERHAPS_BILLED:
        return Ending.SPENT
    return Ending.RELEASED


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a transport sends: its arguments, but for the budget and the inner transport."""

    prices: Prices
    ttl: Seconds | None
    labels: Mapping[str, str]
    on_refusal: OnRefusal
    timeout: float | None

    def labels_of(self, call: Call, headers: Mapping[str, str]) -> dict[str, str]:
        """What an attempt's hold is labelled with."""
        labels = dict(self.labels)
        if call.model and len(call.model.encode()) <= LABEL_VALUE_BYTES_MAX:
            labels.setdefault("model", call.model)
        retry = headers.get(RETRY_COUNT, "")
        if retry.isdecimal() and int(retry):
            labels.setdefault("retry", retry)
        return labels

    def reader(self, call: Call, headers: Mapping[str, str]) -> AnswerReader:
        """What reads the answer."""
        return AnswerReader(call, headers.get("content-type", ""), reference_of(headers))

    def settlement(self, call: Call, reader: AnswerReader, *, whole: bool) -> Settlement:
        """How the hold is settled, by what was read: whole, if it is not known what was billed."""
        answer = reader.answer(whole=whole)
        reference = _fitting(answer.reference)
        if answer.usage is None:
            return Settlement(None, reference, None)
        try:
            cost = self.prices.cost(call, answer.usage, answer.reported)
        except Exception:
            # The call is paid for: whatever is wrong with the prices, its answer is not to be lost.
            log.exception("what a call has cost cannot be told; its hold is spent whole")
            return Settlement(None, reference, answer.usage)
        return Settlement(cost, reference, answer.usage)


@dataclass(frozen=True, slots=True)
class Settlement:
    """How a hold is settled."""

    actual: int | None
    """None: all of it, since the cost is not known."""
    reference: str
    usage: Usage | None


def reference_of(headers: Mapping[str, str]) -> str:
    """The provider's id of a request, by its answer's headers."""
    return _fitting(next(filter(None, (headers.get(name, "") for name in _REQUEST_IDS)), ""))


def _fitting(reference: str) -> str:
    return reference if len(reference.encode()) <= REFERENCE_BYTES_MAX else ""


def refusal(error: PeculiumError) -> tuple[int, dict[str, str], dict[str, Any]]:
    """The answer that stands for a call that was not made: status, headers and content.

    In the form of OpenAI's and of Anthropic's errors, with a status that neither's client tries again.
    """
    status = _INVALID
    if isinstance(error, Refused):
        status = _REFUSED
    elif isinstance(error, Unavailable):
        status = _UNAVAILABLE
    code = getattr(error, "reason", "") or type(error).__name__
    detail = {
        "type": "peculium",
        "code": code,
        "message": str(error),
        "param": None,
        "budget": error.budget,
        "remedy": error.remedy,
    }
    return status, dict(_NOT_RETRIED), {"type": "error", "error": detail}
