"""What is measured: one PostgreSQL as it comes, databases in it, and servers on them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, LiteralString
from urllib.parse import urlsplit
from uuid import UUID

import psycopg
from psycopg import sql

from peculium import BudgetRef, Child, aio
from peculium._limits import CHILDREN_MAX
from peculium.aio import Client
from peculium_server import embedded
from peculium_server.core.lanes import lane_of
from peculium_server.embedded import EmbeddedPostgres
from peculium_server.store import migrate, operating
from tests.bench.jobs import TIMEOUT_SECONDS, Place
from tests.server import RunningServer, StartServer, starting

HOLDER = "dev"
"""Whom a server without a key file takes everybody for."""
GRANTED = 10**15
SHARE = 10**10
"""What each budget below a root gets: more than is ever spent."""
_ROOTS_AT_ONCE = 50
_CONFLICTS = ("could not serialize access", "deadlock detected")
_LOCK_TIMEOUT = "canceling statement due to lock timeout"


def programs() -> Path:
    """Where PostgreSQL's own programs are."""
    return embedded._wheel_programs()


class Postgres:
    """A PostgreSQL with its own settings, which are durable, and with none of ours unless it is said."""

    def __init__(
        self,
        folder: Path,
        server: EmbeddedPostgres,
        start: StartServer,
        told: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.told = told
        """What it was set to; None: nothing."""
        self.server = server
        self.start_server = start

    @classmethod
    @contextlib.contextmanager
    def running(cls, folder: Path, told: Mapping[str, str] | None = None) -> Iterator[Postgres]:
        """A new one in a folder, which is removed at the end."""
        data = folder / "postgres"
        with starting(folder) as start:
            server = EmbeddedPostgres.start(data, settings=told)
            postgres = cls(folder, server, start, told)
            try:
                yield postgres
            finally:
                # Another one than was started first, if that was killed.
                postgres.server.stop()
                shutil.rmtree(data, ignore_errors=True)

    def url_of(self, database: str) -> str:
        """The libpq URI of a database."""
        return urlsplit(self.server.dsn)._replace(path=f"/{database}").geturl()

    def create(self, database: str, template: str = "template0") -> str:
        """Make a database, or a copy of one that nobody uses: its URI."""
        self._do(
            "CREATE DATABASE {} TEMPLATE {}", sql.Identifier(database), sql.Identifier(template)
        )
        return self.url_of(database)

    def drop(self, database: str) -> None:
        """Remove a database, whoever uses it."""
        self._do("DROP DATABASE IF EXISTS {} WITH (FORCE)", sql.Identifier(database))

    def _do(self, statement: LiteralString, *names: sql.Identifier) -> None:
        with psycopg.connect(self.url_of("postgres"), autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*names))

    def settings(self, *names: str) -> dict[str, str]:
        """What the server has been told of some settings."""
        with psycopg.connect(self.url_of("postgres"), autocommit=True) as connection:
            rows = connection.execute(
                "SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY(%s)",
                [list(names)],
            ).fetchall()
        return dict(rows)

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self.server.pid

    def conflicts(self, since: int) -> tuple[dict[str, int], int]:
        """What its log tells of from a place on, counted; and the place where it ends now."""
        with self.server.log_file.open("rb") as log:
            log.seek(since)
            content = log.read()
        text = content.decode(errors="replace")
        counts = {
            "serialization_retries": sum(text.count(words) for words in _CONFLICTS),
            "lock_timeouts": text.count(_LOCK_TIMEOUT),
        }
        return counts, since + len(content)


@dataclass
class Ledger:
    """A database with a ledger in it, and what its provider has billed."""

    postgres: Postgres
    database: str
    billed: Counter[bytes] = field(default_factory=Counter)

    @classmethod
    def made(cls, postgres: Postgres, database: str) -> Ledger:
        """A new one, without any budget."""
        dsn = postgres.create(database)
        migrate.upgrade(dsn)
        return cls(postgres, database)

    @property
    def dsn(self) -> str:
        """Where it is."""
        return self.postgres.url_of(self.database)

    def copied(self, database: str) -> Ledger:
        """A copy as it is now. No server may be using it."""
        self.postgres.drop(database)
        dsn = self.postgres.create(database, self.database)
        # Otherwise servers would notice that it is a copy, and let nobody spend from it.
        reason = "a copy to be measured"
        asyncio.run(operating.restored(dsn, principal="bench", reason=reason, nothing_lost=True))
        return Ledger(self.postgres, database, self.billed.copy())

    @contextlib.contextmanager
    def serving(self, servers: int = 1) -> Iterator[list[RunningServer]]:
        """Servers with their own settings on it, for the time of the block."""
        running: list[RunningServer] = []
        try:
            for _ in range(servers):
                running.append(self.postgres.start_server("--database-url", self.dsn))  # noqa: PERF401 - those that did start have to end
            yield running
        finally:
            for server in running:
                server.end()

    def fetch(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query, read beside all servers."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return connection.execute(query.encode(), values).fetchall()

    @property
    def entries(self) -> int:
        """How many there are."""
        return int(self.fetch("SELECT count(*) FROM entries")[0][0])

    @property
    def operations(self) -> int:
        """How many were accepted so far."""
        return int(self.fetch("SELECT sum(position) FROM lanes")[0][0])

    def vacuum(self) -> None:
        """Do what PostgreSQL would soon do by itself."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute("VACUUM (ANALYZE)")

    def bytes_on_disk(self) -> dict[str, int]:
        """What tables and all their indexes take, by table."""
        rows = self.fetch(
            "SELECT coalesce(inhparent, oid)::regclass::text, sum(pg_total_relation_size(oid))"
            " FROM pg_class LEFT JOIN pg_inherits ON inhrelid = oid"
            " WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' GROUP BY 1"
        )
        return {name: int(size) for name, size in rows}

    def wrong(self) -> list[str]:
        """A sentence for each budget of which ledger and provider say different things."""
        problems = []
        found = self.fetch(
            "SELECT budget_id, spent, held, overrun FROM budgets WHERE spent > 0 OR held > 0"
            " OR overrun > 0 OR budget_id = ANY(%s)",
            [[UUID(bytes=budget) for budget in self.billed]],
        )
        seen = set()
        for budget, spent, held, overrun in found:
            seen.add(budget.bytes)
            billed = self.billed[budget.bytes]
            if spent != billed or held or overrun:
                problems.append(
                    f"{self.database}: budget {budget} was billed {billed}; it has {spent} spent,"
                    f" {held} held, {overrun} overrun"
                )
        problems += [
            f"{self.database}: budget {UUID(bytes=budget)} was billed and is not there"
            for budget in self.billed.keys() - seen
        ]
        return problems


# --- trees to spend from ---


@dataclass
class Trees:
    """Budgets in one ledger, made when they are first asked for."""

    address: str
    lanes: int
    _made: dict[str, list[Place]] = field(default_factory=dict)

    def children(self, root: str, count: int, *, other_lane_than: str | None = None) -> list[Place]:
        """So many budgets held by token, all below one root; perhaps in another lane than another."""
        if root not in self._made:
            avoided = None if other_lane_than is None else self._made[other_lane_than][0].root_id
            self._made[root] = asyncio.run(self._family(root, count, avoided))
        return self._made[root][:count]

    def roots(self, name: str, count: int) -> list[Place]:
        """So many roots held by token."""
        there = self._made.setdefault(name, [])
        if len(there) < count:
            there += asyncio.run(self._roots(name, range(len(there), count)))
        return there[:count]

    def shared(self, name: str) -> list[Place]:
        """One root that its principal holds, for everybody."""
        if name not in self._made:
            self._made[name] = asyncio.run(self._shared(name))
        return self._made[name]

    def deep(self, name: str, depth: int, count: int) -> list[Place]:
        """So many budgets held by token on a level of one tree; the root is on the first."""
        if depth == 1:
            return self.roots(name, count)
        if name not in self._made:
            self._made[name] = asyncio.run(self._deep(name, depth, count))
        return self._made[name][:count]

    async def _family(self, root: str, count: int, avoided: bytes | None) -> list[Place]:
        async with self._client() as client:
            name = root
            while True:
                made = await client.admin.grant(name, unit="calls", amount=GRANTED, holder=HOLDER)
                lane = lane_of(made.ref.root_id, self.lanes)
                if avoided is None or lane != lane_of(avoided, self.lanes):
                    return await _children(client, name, count)
                # A root's lane is a matter of chance, which the next has again.
                name += "-again"

    async def _deep(self, name: str, depth: int, count: int) -> list[Place]:
        async with self._client() as client:
            await client.admin.grant(name, unit="calls", amount=GRANTED, holder=HOLDER)
            path = name
            for level in range(2, depth):
                parent = await client.open(path)
                await parent.delegate([Child(f"level-{level}", GRANTED, holder=HOLDER)])
                path += f"/level-{level}"
            return await _children(client, path, count)

    async def _roots(self, name: str, numbers: range) -> list[Place]:
        turns = asyncio.Semaphore(_ROOTS_AT_ONCE)
        async with self._client() as client:

            async def make(number: int) -> Place:
                async with turns:
                    made = await client.admin.grant(
                        f"{name}-{number}",
                        unit="calls",
                        amount=GRANTED,
                        holder=HOLDER,
                        token=True,
                    )
                return _place(made.ref, by_token=True)

            return await asyncio.gather(*map(make, numbers))

    async def _shared(self, name: str) -> list[Place]:
        async with self._client() as client:
            made = await client.admin.grant(name, unit="calls", amount=GRANTED, holder=HOLDER)
        return [_place(made.ref, by_token=False)]

    def _client(self) -> Client:
        return aio.connect(self.address, timeout=TIMEOUT_SECONDS)


async def _children(client: Client, path: str, count: int) -> list[Place]:
    parent = await client.open(path)
    made = []
    for first in range(0, count, CHILDREN_MAX):
        numbers = range(first, min(first + CHILDREN_MAX, count))
        made += await parent.delegate(
            [Child(f"agent-{number}", SHARE, holder=HOLDER, token=True) for number in numbers]
        )
    return [_place(child.ref, by_token=True) for child in made]


def _place(ref: BudgetRef, *, by_token: bool) -> Place:
    return Place(ref.root_id, ref.budget_id, str(ref), by_token)
