"""What a scenario is made of: agents, their calls, and what befalls them, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from tests.replay.provider import Fate, Stream

PROCESSES = 4
PARENT = PROCESSES - 1
"""The process of a parent, where there is one among its children."""
CHILD = 0
"""The process of a child that has its own share, where another has its parent's authority."""
PARENTS_PARTS = 4
"""How many times the cap of that child its parent has."""
HOLD_SECONDS = 60.0
STORE_SECONDS_MAX = 10.0
"""How long agents wait for what keeps the budget."""
CUT_OFF_SECONDS_MAX = 0.5
"""The same where it will not answer: the trial is to end."""


class Point(StrEnum):
    """Where in a call a process dies."""

    RESERVED = "reserved"
    """It has permission, and has sent nothing."""
    ANSWERED = "answered"
    """It has the answer, and has told nobody."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call that an agent makes, perhaps in several attempts."""

    estimate: int
    """The most that the agent expects it to cost."""
    cost: int
    """What the provider bills for each attempt."""
    reports: int | Literal["truth"] | None = "truth"
    """The usage in the answer; None: none."""
    fates: tuple[Fate, ...] = (Fate.ANSWERED,)
    attempts: int = 1
    """How often the agent's client sends it, until it is answered."""
    seconds: float = 0.02
    """How long the provider works on it."""
    dies: Point | None = None
    stream: Stream = Stream.NO

    @property
    def told(self) -> int | None:
        """The usage in the answer."""
        return self.cost if self.reports == "truth" else self.reports


@dataclass(frozen=True, kw_only=True)
class Agent:
    """One agent: makes its calls one after the other, until one is refused."""

    calls: tuple[Call, ...]
    process: int = 0
    goes_on: bool = False
    """Also after a refusal."""
    obeys: bool = True
    """A refused call is not made. One that does not obey makes it with a key of its own."""
    name: str = ""

    def named(self, number: int) -> Agent:
        """With its name."""
        return replace(self, name=f"a{number}")


class Strike(StrEnum):
    """What befalls what keeps the budget, while calls are in flight."""

    NONE = "none"
    KILLED = "killed"
    """It is killed, its database too, and started again."""
    RESERVE_REPLY_LOST = "the reply to a reservation is lost"
    SETTLE_REPLY_LOST = "the reply to a settlement is lost"
    CUT_OFF = "cut off"
    """The agents cannot reach it any more."""
    REVOKED = "revoked"
    """The budget is taken away from its agents."""


DISTURBED = frozenset({Strike.RESERVE_REPLY_LOST, Strike.SETTLE_REPLY_LOST, Strike.CUT_OFF})
"""Strikes at the way there."""


class Custody(StrEnum):
    """How agents get at the budget, where there is a choice."""

    SHARED = "shared"
    """All of them spend from one."""
    SHARES = "shares"
    """Each process has a share of its own."""
    TWICE = "twice"
    """One share, handed by mistake to two processes."""
    GIVEN = "given"
    """Each process has a share, and all of it is shares; but for one, which has given them all away."""
    COPIED = "copied"
    """One process has a share; another has a copy of what its parent was handed, who has more."""
    REPLICAS = "replicas"
    """All spend from one, through two instances of what keeps it."""


@dataclass(frozen=True, kw_only=True)
class Act:
    """Agents that begin at the same moment, and what happens meanwhile."""

    agents: tuple[Agent, ...]
    strike: Strike = Strike.NONE
    strikes_at: int = 0
    """It strikes when the provider works on so many calls at once."""
    after_bill: bool = False
    """It begins when holds have lapsed, and were resolved by the provider's bill."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A play that every contestant takes part in."""

    name: str
    title: str
    cap: int
    acts: tuple[Act, ...]
    cites: tuple[str, ...] = ()
    """Ids of the incidents that it stands for."""
    custody: Custody = Custody.SHARED
    bound: int | None = 0
    """How far beyond the cap the bill may be, as documented; None: without bound, since nothing tells a
    ledger of it."""
    why: str = ""
    """Why a ledger cannot prevent it, where it cannot."""
    hold_seconds: float = HOLD_SECONDS
    """Until a hold lapses that nobody has ended."""
    lease_seconds: float | None = None
    """How long a share lives."""
    skew_seconds: float = 0.0
    """How far the agents' clock is off."""
    family: str = ""
    """Scenarios of one kind that are drawn together."""
    at_once: int = 4
    """How many trials may be played at the same time: those that wait for holds to lapse."""

    @property
    def preventable(self) -> bool:
        """Whether a ledger can keep the bill within the cap."""
        return self.bound == 0

    @property
    def agents(self) -> int:
        """How many there are at once, at most."""
        return max(len(act.agents) for act in self.acts)
