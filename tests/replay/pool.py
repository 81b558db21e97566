"""The locked reserve-and-refund counter of one process, as a service for the agents of all processes.

What a gateway keeps in its memory: a reservation that does not fit is refused, what was not used comes
back. Nothing checks and adds in between, since one process does it all. It knows no holds, no ids, and
nothing of itself after a restart.

    python -m tests.replay.pool PORT     # tells its port in one line, and serves until its input ends
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys

HOST = "127.0.0.1"


class Pool:
    """Counters by name."""

    def __init__(self) -> None:
        self.available: dict[str, int] = {}

    def do(self, verb: str, name: str, amount: int) -> int:
        """Do one thing: what is available then; below zero for a refusal."""
        if verb != "make" and name not in self.available:
            # Begun again, and what is configured is not loaded yet.
            return -1
        available = self.available.get(name, 0)
        if verb == "make":
            # As at start-up: what is configured counts, unless it is there.
            available = self.available.setdefault(name, amount)
        elif verb == "reserve":
            if amount > available:
                return -1
            available -= amount
        elif verb == "refund":
            available += amount
        elif verb == "stop":
            available = min(available, 0)
        self.available[name] = available
        return available

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests: a line of JSON for each, and a number back."""
        with contextlib.suppress(ConnectionError, ValueError):
            while line := await reader.readline():
                number, verb, name, amount = json.loads(line)
                writer.write(json.dumps([number, self.do(verb, name, amount)]).encode() + b"\n")
        writer.close()


async def _serve(port: int) -> None:
    server = await asyncio.start_server(Pool().serve, HOST, port, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
