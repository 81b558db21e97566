"""How far the demonstration is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from peculium_server.demo.messages import Tally

RATE_SECONDS: Final = 3.0
_REDRAW_SECONDS: Final = 0.2
_LINE_SECONDS: Final = 1.0
_NANO_DIGITS: Final = 9
_MICRO_DIGITS: Final = 6
_CENT_DIGITS: Final = 2
_NANOS_PER_USD: Final = 10**_NANO_DIGITS


def exact_dollars(nanos: int) -> str:
    """An amount for people, to the billionth of a dollar."""
    whole, rest = divmod(nanos, _NANOS_PER_USD)
    return f"${whole:,}.{rest:0{_NANO_DIGITS}}"


def dollars(nanos: int, digits: int = _MICRO_DIGITS) -> str:
    """An amount for people, cut after so many digits."""
    return exact_dollars(nanos)[: digits - _NANO_DIGITS]


class Rate:
    """Calls per second, over the last few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def at(self, now: float, calls: int) -> float:
        """Note how many calls there were by now, and say how fast they came lately."""
        self._seen.append((now, calls))
        while now - self._seen[0][0] > RATE_SECONDS:
            self._seen.popleft()
        since, before = self._seen[0]
        return (calls - before) / (now - since) if now > since else 0.0


@asynccontextmanager
async def shown(console: Console, granted: int, tally: Callable[[], Tally]) -> AsyncIterator[None]:
    """Show how far a run is for the time of the block; `tally` is asked again and again."""
    look = _Bar(console, granted) if console.is_terminal else _Lines(console, granted)
    with look.context:
        showing = asyncio.create_task(_show(look, tally))
        try:
            yield
        finally:
            showing.cancel()
            look.show(tally())


class _Look(Protocol):
    pause_seconds: float

    def show(self, tally: Tally, /) -> None: ...


async def _show(look: _Look, tally: Callable[[], Tally]) -> None:
    while True:
        look.show(tally())
        await asyncio.sleep(look.pause_seconds)


class _Bar:
    """For a terminal, which has few columns, of which the bar wants some."""

    pause_seconds: float = _REDRAW_SECONDS

    def __init__(self, console: Console, granted: int) -> None:
        self._rate = Rate()
        self._cap = granted
        self._digits = _CENT_DIGITS if granted > _NANOS_PER_USD else _MICRO_DIGITS
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=granted)
        self.context: AbstractContextManager[object] = self._progress

    def show(self, tally: Tally) -> None:
        """Draw."""
        rate = self._rate.at(time.monotonic(), tally.calls)
        spent, cap, held = (
            dollars(amount, self._digits) for amount in (tally.spent, self._cap, tally.held)
        )
        text = f"{spent} of {cap}, {held} held, {rate:,.0f} calls/s, {tally.refused:,} refused"
        self._progress.update(self._task, completed=tally.spent, description=text)


class _Lines:
    """For a file or a pipe."""

    pause_seconds: float = _LINE_SECONDS
    context: AbstractContextManager[object] = nullcontext()

    def __init__(self, console: Console, granted: int) -> None:
        self._rate = Rate()
        self._cap = granted
        self._console = console

    def show(self, tally: Tally) -> None:
        """Write a line."""
        rate = self._rate.at(time.monotonic(), tally.calls)
        self._console.print(
            f"{tally.calls:,} calls, {rate:,.0f}/s, {tally.refused:,} refused;"
            f" spent {dollars(tally.spent)} of {dollars(self._cap)}, held {dollars(tally.held)}",
            highlight=False,
            soft_wrap=True,
        )
