"""A ledger to do harm to: a PostgreSQL of its own, servers, and proxies on both sides of each.

    clients -> front proxy -> server -> back proxy -> PostgreSQL

Whoever reads the tables does it past all proxies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg

from peculium_server.embedded import EmbeddedPostgres, EmbeddedPostgresError
from peculium_server.store import migrate
from tests.faults.proxy import Proxy

ROOT = Path(__file__).parents[2]
WAIT_SECONDS_MAX = 180
"""For anything that has to come about: longer than a machine with too much to do takes."""
POLL_SECONDS = 0.05
SERVER = ("-m", "peculium_server")
_SETTINGS = {"max_connections": "200", "shared_buffers": "64MB"}
"""Beside Postgres's own defaults, which are durable."""


_FLAGS = ("--call-seconds-max", "600")
"""A verification of everything takes as long as it takes."""
_BACKENDS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'peculium'"


class ClusterBroken(Exception):
    """Something did not come up again in time; carries what is known of it."""


@dataclass(eq=False)
class Node:
    """A server and the proxies on either side of it."""

    name: str
    folder: Path
    front: Proxy
    back: Proxy
    command: Sequence[str] = SERVER
    """What Python runs as the server: the arguments before `serve`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    flags: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where clients connect, whatever becomes of the server: the front proxy."""
        return self.front.address

    @property
    def log(self) -> Path:
        """What all its processes have said."""
        return self.folder / f"{self.name}.log"

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self.process is not None and self.process.poll() is None

    async def start(self) -> None:
        """Start the server and wait until it serves; again and again while its database is not there.

        Clients find it at the same address as before.

        Raises:
            ClusterBroken: It does not serve in time.
        """
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while not await self._started(deadline):
            if time.monotonic() > deadline:
                raise ClusterBroken(f"{self.name} does not start:\n{self.log_tail()}")
            await asyncio.sleep(0.2)

    async def _started(self, deadline: float) -> bool:
        ready = self.folder / f"{self.name}.ready"
        ready.unlink(missing_ok=True)
        # In its environment, where no list of processes shows it.
        variables = {"PECULIUM_DATABASE_URL": self._database_url, **self.environment}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, *self.command, "serve", "--listen", "127.0.0.1:0"),
                    *("--ready-file", str(ready), *self.flags),
                ],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        while not ready.exists():
            if not self.running or time.monotonic() > deadline:
                self.kill()
                return False
            await asyncio.sleep(POLL_SECONDS)
        self.front.target = json.loads(ready.read_text())["listening"]
        return True

    @property
    def _database_url(self) -> str:
        return self.environment.get("PECULIUM_DATABASE_URL", "")

    def kill(self) -> None:
        """End it by SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(WAIT_SECONDS_MAX)

    def pause(self) -> None:
        """Stop it in its tracks: its connections stay, and nothing moves until `resume`."""
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on, as if nothing had been."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    async def stop(self) -> int:
        """Let it drain: its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, WAIT_SECONDS_MAX)

    def log_tail(self) -> str:
        """The last that it has said."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


class Cluster:
    """PostgreSQL and servers that run, until `running` is left."""

    def __init__(self, folder: Path, chance: Random) -> None:
        self.folder = folder
        self.chance = chance
        self.nodes: list[Node] = []
        self.kills = 0
        """Processes that were ended by SIGKILL."""
        self._port = _free_port()
        self._postgres: EmbeddedPostgres | None = None
        self._reviving: asyncio.Task[None] | None = None

    @property
    def data_dir(self) -> Path:
        """Where PostgreSQL keeps its data."""
        return self.folder / "postgres"

    @property
    def postgres(self) -> EmbeddedPostgres:
        """The database server as it was last started."""
        assert self._postgres is not None
        return self._postgres

    @property
    def dsn(self) -> str:
        """The database, past all proxies."""
        return self.postgres.dsn

    @property
    def cuts(self) -> int:
        """Connections that were cut or silenced, on either side of all servers."""
        return sum(node.front.cuts + node.back.cuts for node in self.nodes)

    @property
    def proxies(self) -> list[Proxy]:
        """All of them."""
        return [proxy for node in self.nodes for proxy in (node.front, node.back)]

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls,
        folder: Path,
        chance: Random,
        *,
        servers: int = 2,
        command: Sequence[str] = SERVER,
        environments: Sequence[Mapping[str, str]] = (),
        flags: Sequence[str] = _FLAGS,
    ) -> AsyncIterator[Cluster]:
        """A new ledger in a folder, whose data is removed at the end; the logs stay.

        Args:
            folder: Must be reachable by the user who runs PostgreSQL.
            chance: For what the proxies leave to chance.
            servers: How many.
            command: What Python runs as a server: its arguments before `serve`.
            environments: What each server's environment has beside this process's own.
            flags: For all servers.
        """
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        cluster = cls(folder, chance)
        async with contextlib.AsyncExitStack() as open_:
            open_.callback(shutil.rmtree, cluster.data_dir, ignore_errors=True)
            open_.callback(cluster._stop_postgres)
            open_.push_async_callback(cluster._settle)
            await cluster._start_postgres()
            await asyncio.to_thread(migrate.upgrade, cluster.dsn)
            for number in range(servers):
                own = dict(environments[number]) if number < len(environments) else {}
                node = await cluster._add_node(open_, number, command, own, flags)
                await node.start()
            try:
                yield cluster
            finally:
                await cluster._settle()
                for node in cluster.nodes:
                    node.kill()

    async def _add_node(
        self,
        open_: contextlib.AsyncExitStack,
        number: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        flags: Sequence[str],
    ) -> Node:
        front = await open_.enter_async_context(Proxy("127.0.0.1:1", self.chance))
        back = await open_.enter_async_context(Proxy(f"127.0.0.1:{self._port}", self.chance))
        url = urlsplit(self.postgres.tcp_dsn)
        through = url._replace(netloc=f"{url.username}:{url.password}@{back.address}").geturl()
        node = Node(
            name=f"server-{number}",
            folder=self.folder,
            front=front,
            back=back,
            command=command,
            environment={"PECULIUM_DATABASE_URL": through, **environment},
            flags=flags,
        )
        open_.callback(node.kill)
        self.nodes.append(node)
        return node

    # -- Harm -----------------------------------------------------------------------------------------

    def kill_server(self, node: Node) -> None:
        """End a server; `node.start` brings it back."""
        node.kill()
        self.kills += 1

    async def kill_backend(self) -> bool:
        """End a process of PostgreSQL that serves a ledger server: whether there was one.

        PostgreSQL ends all others with it, and recovers by itself.
        """
        try:
            rows = await self.fetch(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
                " AND application_name = 'peculium' ORDER BY pid"
            )
        except psycopg.Error:
            return False
        if not rows:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.chance.choice(rows)[0], signal.SIGKILL)
            self.kills += 1
        return True

    def kill_postmaster(self) -> None:
        """End PostgreSQL's first process; its backends notice and end. `start_postgres` recovers."""
        with contextlib.suppress(psutil.NoSuchProcess):
            postmaster = psutil.Process(self.postgres.pid)
            postmaster.kill()
            postmaster.wait(WAIT_SECONDS_MAX)
            self.kills += 1

    async def start_postgres(self) -> None:
        """Start PostgreSQL again after its end, on the same data.

        Raises:
            ClusterBroken: It does not come up.
        """
        await asyncio.to_thread(self._release_postgres)
        await self._start_postgres()

    async def _start_postgres(self) -> None:
        """Start it on a port that is free; the proxies know where it is."""
        # What never ran is not waited for: the folder may be one that it cannot use.
        ran = (self.data_dir / "cluster").exists()
        deadline = time.monotonic() + (WAIT_SECONDS_MAX if ran else 0)
        while self._postgres is None:
            try:
                self._postgres = await asyncio.to_thread(
                    EmbeddedPostgres.start, self.data_dir, port=self._port, settings=_SETTINGS
                )
            except EmbeddedPostgresError as error:
                if time.monotonic() > deadline:
                    raise ClusterBroken(f"PostgreSQL does not start: {error}") from error
                # Somebody's connection may have the port by now.
                self._port = _free_port()
                await asyncio.sleep(0.2)
        for node in self.nodes:
            node.back.target = f"127.0.0.1:{self._port}"

    def _release_postgres(self) -> None:
        """Count as no user of a server that is gone: the next start has to find none."""
        if self._postgres is not None:
            self._postgres.stop()
            self._postgres = None

    def _stop_postgres(self) -> None:
        if self._postgres is not None:
            self._postgres.stop()
        elif (self.data_dir / "cluster").exists():
            EmbeddedPostgres.start(self.data_dir, port=_free_port(), settings=_SETTINGS).stop()

    # -- Healing --------------------------------------------------------------------------------------

    async def heal(self) -> None:
        """End all faults, and wait until everything runs and serves.

        Raises:
            ClusterBroken: Something does not come back.
        """
        for proxy in self.proxies:
            await proxy.heal()
        await self.revive()

    async def revive(self) -> None:
        """Wait until every process runs and serves; faults of connections go on.

        Who is cancelled meanwhile leaves it to the next one: nothing is started twice.

        Raises:
            ClusterBroken: Something does not come back.
        """
        if self._reviving is None or self._reviving.done():
            self._reviving = asyncio.create_task(self._revive())
        await asyncio.shield(self._reviving)

    async def _revive(self) -> None:
        for node in self.nodes:
            node.resume()
        if self._postgres is None or not _alive(self._postgres.pid):
            await self.start_postgres()
        await self.answering()
        for node in self.nodes:
            if not node.running:
                await node.start()

    async def _settle(self) -> None:
        """Let a revival end that nobody waits for any more."""
        if self._reviving is not None:
            await asyncio.gather(self._reviving, return_exceptions=True)

    async def answering(self) -> None:
        """Wait until PostgreSQL answers: it may be recovering.

        Raises:
            ClusterBroken: It does not in time.
        """
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while True:
            try:
                await self.fetch("SELECT 1")
            except psycopg.Error as error:
                if time.monotonic() > deadline:
                    raise ClusterBroken(f"PostgreSQL does not answer: {error}") from error
                await asyncio.sleep(POLL_SECONDS)
            else:
                return

    async def no_backends(self) -> None:
        """Wait until no server's connection is open any more: nothing can be committed then.

        Raises:
            ClusterBroken: One stays.
        """
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while (await self.fetch(_BACKENDS))[0] != (0,):
            if time.monotonic() > deadline:
                raise ClusterBroken("connections of servers that were stopped stay open")
            await asyncio.sleep(POLL_SECONDS)

    # -- Looking --------------------------------------------------------------------------------------

    async def fetch(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query, past all proxies.

        Raises:
            psycopg.Error: It failed.
        """
        async with await psycopg.AsyncConnection.connect(
            self.dsn, autocommit=True, connect_timeout=10
        ) as connection:
            # A query is written by a test, never made of what somebody has sent.
            cursor = await connection.execute(query.encode(), values)
            return await cursor.fetchall() if cursor.description else []


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
