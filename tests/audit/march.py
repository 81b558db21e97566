"""A ledger of which everything is known: what happened in `acme` in March 2026, and what that comes to.

It is what docs/how-to/audit.md tells of. Amounts are billionths of a dollar; times are long past, so
that they can be asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from peculium_server.core.operations import Actor, Role, Usage
from tests.core.ledger import HoldRef, Ledger, Node

TREASURER = Actor("treasurer", Role.ADMIN)
TRACE = bytes.fromhex("4bf92f3577b34da6a3ce929d0e0e4736")
GPT = Usage(provider="openai", model="gpt-5", input_tokens=1_200, output_tokens=300)
MINI = Usage(provider="openai", model="gpt-5-mini", input_tokens=5_000)
CLAUDE = Usage(provider="anthropic", model="claude", input_tokens=700, output_tokens=90)


def usd(dollars: float) -> int:
    return round(dollars * 10**9)


@dataclass
class March:
    """The ledger, and what is asked about in it."""

    ledger: Ledger
    acme: Node
    late: HoldRef
    """Lapsed, and settled the day after."""
    forfeited: HoldRef
    """Lapsed, and never settled."""
    disputed: HoldRef
    """Settled for more than may be booked; nobody has resolved that."""

    @classmethod
    def lived(cls) -> March:
        """Let it happen."""
        ledger = Ledger()
        acme = _granted(ledger)
        research, run_7, run_8 = _delegated(ledger, acme)
        late, forfeited = _second_of_march(ledger, run_7)
        disputed = _third_of_march(ledger, research, run_7, run_8, late)
        _at(ledger, "2026-03-05T08:00")
        ledger.do(acme.top_up(usd(20)), TREASURER)
        platform: dict[str, Any] = {"labels": (("team", "platform"),), "usage": GPT}
        _at(ledger, "2026-03-06T08:00")
        ledger.do(acme.spend(usd(0.6), reference="call-7", **platform))
        _at(ledger, "2026-04-02T08:00")
        ledger.do(acme.spend(usd(0.2), **platform))
        return cls(ledger, acme, late, forfeited, disputed)


def _granted(ledger: Ledger) -> Node:
    _at(ledger, "2026-03-02T09:00")
    grant = ledger.ask_grant(usd(100), name="acme", holder="gateway", by_token=False)
    ledger.do(grant, TREASURER)
    return Node(ledger, grant.root_id, grant.root_id)


def _delegated(ledger: Ledger, acme: Node) -> tuple[Node, Node, Node]:
    _at(ledger, "2026-03-02T09:10")
    team = (("team", "research"),)
    research = acme.child(usd(40), name="research", holder="lead", labels=team)
    _at(ledger, "2026-03-02T09:20")
    ledger.do(research.accept())
    _at(ledger, "2026-03-02T10:00")
    run_7 = research.child(usd(10), name="run-7", holder="worker-3", labels=(("run", "7"),))
    run_8 = research.child(
        usd(5), name="run-8", holder="worker-4", by_token=False, labels=(("run", "8"),)
    )
    _at(ledger, "2026-03-02T10:05")
    ledger.do(run_7.accept())
    return research, run_7, run_8


def _second_of_march(ledger: Ledger, run_7: Node) -> tuple[HoldRef, HoldRef]:
    _at(ledger, "2026-03-02T11:00")
    first = run_7.hold(usd(2), trace_id=TRACE)
    _at(ledger, "2026-03-02T11:01")
    ledger.do(first.settle(usd(1.25), usage=GPT, reference="call-1", trace_id=TRACE))
    _at(ledger, "2026-03-02T11:30")
    late = run_7.hold(usd(1))
    _at(ledger, "2026-03-02T11:40")
    ledger.do(late.lapse())
    _at(ledger, "2026-03-02T12:00")
    forfeited = run_7.hold(usd(0.5))
    _at(ledger, "2026-03-02T12:10")
    ledger.do(forfeited.lapse())
    _at(ledger, "2026-03-02T12:30")
    dear = run_7.hold(usd(0.1))
    _at(ledger, "2026-03-02T12:31")
    # 0.10 of the hold, as much again of the budget, and 0.15 are disputed.
    ledger.do(dear.settle(usd(0.35), usage=GPT, reference="call-4"))
    _at(ledger, "2026-03-02T15:00")
    ledger.do(run_7.admin_resolve(dear, usd(0.35), reason="the provider's log says so"), TREASURER)
    return late, forfeited


def _third_of_march(
    ledger: Ledger, research: Node, run_7: Node, run_8: Node, late: HoldRef
) -> HoldRef:
    _at(ledger, "2026-03-03T08:00")
    ledger.do(late.settle(usd(0.4), usage=MINI, reference="call-2"))
    _at(ledger, "2026-03-03T09:00")
    ledger.do(run_8.spend(usd(0.75), usage=CLAUDE, reference="call-5", trace_id=TRACE))
    _at(ledger, "2026-03-03T10:00")
    disputed = run_7.hold(usd(0.2))
    _at(ledger, "2026-03-03T10:01")
    # 0.20, as much again, and 0.50 are disputed.
    ledger.do(disputed.settle(usd(0.9), usage=GPT, reference="call-6"))
    _at(ledger, "2026-03-03T11:00")
    ledger.do(run_8.freeze(reason="it goes in circles"), TREASURER)
    _at(ledger, "2026-03-03T12:00")
    ledger.do(research.revoke(run_8))
    return disputed


def _at(ledger: Ledger, time: str) -> None:
    ledger.now = round(datetime.fromisoformat(time).replace(tzinfo=UTC).timestamp()) * 10**6
