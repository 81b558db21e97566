"""What the demonstration's processes tell each other. Amounts are integers in `usd_nanos`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, get_args

# --- from the coordinator to a worker ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How many agents the worker has, and whom it speaks to."""

    agents: int
    target: str
    provider_port: int
    timeout_seconds: float
    """How long an operation is pursued while the ledger does not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Some of the requests that are the worker's: number, context tokens and generated tokens of each."""

    requests: list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """The budget that was delegated to the worker's token; ids in hexadecimal. All work was sent."""

    path: str
    root_id: str
    budget_id: str
    carrier: dict[str, str]
    """The trace that it was delegated in, if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of an `Ask`."""

    ask: int
    funded: bool
    """The worker's budget has at least what was needed. Otherwise nothing is left that could pay it."""
    unspent_max: int
    """What is not spent of the whole cap is no more than this, now and for ever."""


# --- from a worker to the coordinator ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The worker has made the secret of the budget that it is to get; this is its token id."""

    token_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How far the worker is."""

    calls: int
    refused: int
    spent: int
    held: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Nothing in the worker's budget can pay for a request; it has given back what was idle."""

    ask: int
    need: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """The worker has given back what was idle, and asks for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The worker has no requests left and has closed its budget; calls served and refused by agent."""

    calls: list[int]
    refused: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The worker cannot go on."""

    problem: str


# --- between the coordinator and the provider ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """The provider takes calls."""

    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BillPlease:
    """The coordinator wants the bill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """Everything that the provider was asked for so far."""

    calls: int
    input_tokens: int
    output_tokens: int
    amount: int


Message = (
    Start
    | Work
    | Begin
    | Answer
    | Ready
    | Tally
    | Ask
    | Returned
    | Done
    | Failed
    | Listening
    | BillPlease
    | Bill
)

BY_NAME: Final[dict[str, type[Message]]] = {kind.__name__: kind for kind in get_args(Message)}
