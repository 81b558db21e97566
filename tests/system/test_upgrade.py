"""Servers that are restarted, and replaced by newer ones, while everybody goes on working."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import peculium
from peculium_server.store import migrate, roles, schema
from tests.postgres import Server, as_role
from tests.server import RunningServer, StartServer, starting
from tests.system.health import SERVING, becomes
from tests.system.load import Load, check, under_load

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
VERSIONS = Path("migrations/peculium_migrations/versions")
PACKAGES = ("client", "server", "migrations")
CALLS = 30
TIMEOUT_SECONDS = 60.0


class Spender(threading.Thread):
    """A program with the blocking client, until it is told to stop."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.stopping = threading.Event()
        self.failed: BaseException | None = None
        self.spent = 0
        self._target = target

    def run(self) -> None:
        try:
            with peculium.connect(self._target, timeout=TIMEOUT_SECONDS) as client:
                client.admin.grant("threads", unit="calls", amount=10**6, holder="dev")
                budget = client.open("threads")
                while not self.stopping.is_set():
                    with budget.reserve(2) as hold:
                        hold.settle(1)
                    self.spent += 1
                assert budget.balances().spent == self.spent
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is a call that failed
            self.failed = error


@contextlib.asynccontextmanager
async def at_work(first: str, second: str) -> AsyncIterator[list[Load]]:
    """Clients of both kinds that know two servers, some of which go to the first, others to the second.

    None of their calls may fail.
    """
    spender = Spender(f"ipv4:{first},{second}")
    async with (
        under_load(f"ipv4:{first},{second}", "first", budgets=2, timeout=TIMEOUT_SECONDS) as one,
        under_load(f"ipv4:{second},{first}", "second", budgets=2, timeout=TIMEOUT_SECONDS) as other,
    ):
        spender.start()
        try:
            yield [one, other]
        finally:
            spender.stopping.set()
            await asyncio.to_thread(spender.join)
    assert spender.failed is None
    assert spender.spent
    for load in (one, other):
        await check(first, load)


async def progress(loads: Sequence[Load]) -> None:
    for load in loads:
        await load.progress(CALLS)


async def replaced(
    loads: Sequence[Load], server: RunningServer, start: Callable[[str], RunningServer]
) -> RunningServer:
    """End a server as an orchestrator does, let the other one work alone, and start another there."""
    assert await asyncio.to_thread(server.stop) == 0
    await progress(loads)
    started = await asyncio.to_thread(start, server.address)
    await becomes(started.address, SERVING)
    await progress(loads)
    return started


async def test_two_servers_are_restarted_in_turn_and_no_call_fails(
    start_server: StartServer, served_database: str
) -> None:
    def start(listen: str) -> RunningServer:
        return start_server("--database-url", served_database, listen=listen)

    servers = [await asyncio.to_thread(start, "127.0.0.1:0") for _ in range(2)]
    async with at_work(*(server.address for server in servers)) as loads:
        await progress(loads)
        for server in servers:
            await replaced(loads, server, start)


Version = Mapping[str, str]
"""What to set in the environment for programs to be of that version; nothing: for this one."""

NEXT_STEP = """
from alembic import op

revision, down_revision, branch_labels, depends_on = "{next}", "{newest}", None, None


def upgrade():
    op.execute("ALTER TABLE entries ADD COLUMN of_a_later_version bigint")
    op.execute("CREATE TABLE of_a_later_version (id bigint PRIMARY KEY)")
"""
"""As later versions will expand the schema: by what this one has never heard of."""


def steps(folder: Path) -> list[Path]:
    return sorted((folder / VERSIONS).glob("[0-9]*.py"))


def version_in(folder: Path) -> Version:
    """The version of which a folder holds the packages."""
    return {"PYTHONPATH": os.pathsep.join(str(folder / package) for package in PACKAGES)}


def version_before(folder: Path) -> Version:
    """The last version that was written before the newest step of the schema."""
    newest = VERSIONS / steps(ROOT)[-1].name
    added = git("log", "-1", "--format=%H", "--diff-filter=A", "--", str(newest)).decode().strip()
    before = f"{added}^" if added else "HEAD"
    try:
        packed = git("archive", "--format=tar", before, "--", *PACKAGES)
    except subprocess.CalledProcessError:
        pytest.skip("the history does not reach back to before the newest step of the schema")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    assert not (folder / newest).exists()
    if steps(folder)[-1].name < schema.SERVES_FROM:
        pytest.skip("the schema was contracted: the servers before the newest step do not suit it")
    return version_in(folder)


def version_after(folder: Path) -> Version:
    """A version that is as this one, and has expanded the schema."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package)
    newest = steps(folder)[-1]
    number = newest.name[:4]
    following = f"{int(number) + 1:04}"
    step = NEXT_STEP.format(next=following, newest=number)
    newest.with_name(f"{following}_expand_later.py").write_text(step)
    return version_in(folder)


def git(*arguments: str) -> bytes:
    """What git says of this repository."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout
    except FileNotFoundError:
        pytest.skip("there is no git, and so no history")


@pytest.fixture(params=["the version before and this one", "this version and one after it"])
def versions(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Version, Version]:
    """An older version, and a newer one."""
    folder = tmp_path / "version"
    if request.param == "this version and one after it":
        return {}, version_after(folder)
    return version_before(folder), {}


@pytest.fixture
def start_version(tmp_path: Path) -> Iterator[Callable[[Version], StartServer]]:
    """Starts servers of a version."""
    with contextlib.ExitStack() as stack:

        def start(version: Version) -> StartServer:
            def launch(
                arguments: Sequence[str], environment: Mapping[str, str]
            ) -> subprocess.Popen[str]:
                return subprocess.Popen(
                    [sys.executable, "-m", "peculium_server", *arguments],
                    env={**environment, **version},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )

            return stack.enter_context(starting(tmp_path, launch))

        yield start


async def migrated(version: Version, database: str) -> str | None:
    """The revision that a version brings a database to."""
    command = [sys.executable, "-m", "peculium_server", "migrate", "--database-url", database]
    await asyncio.to_thread(subprocess.run, command, env={**os.environ, **version}, check=True)
    return await asyncio.to_thread(migrate.current, database)


async def test_servers_of_an_older_version_go_on_while_the_schema_and_they_are_replaced(
    postgres: Server,
    versions: tuple[Version, Version],
    start_version: Callable[[Version], StartServer],
) -> None:
    """No call fails, and the whole ledger verifies, whichever version has recorded what."""
    old, new = versions
    with postgres.fresh_database() as database:
        before = await migrated(old, database)
        served = as_role(database, roles.SERVER)

        def start(version: Version, listen: str = "127.0.0.1:0") -> RunningServer:
            return start_version(version)("--database-url", served, listen=listen)

        servers = [await asyncio.to_thread(start, old) for _ in range(2)]
        async with at_work(*(server.address for server in servers)) as loads:
            await progress(loads)
            assert await migrated(new, database) != before
            await progress(loads)
            # One of the old ones is started again, too: whoever restarts it knows nothing of this.
            restarted = await replaced(loads, servers[0], functools.partial(start, old))
            await replaced(loads, servers[1], functools.partial(start, new))
            await replaced(loads, restarted, functools.partial(start, new))
