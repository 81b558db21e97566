"""Fixtures: one real Postgres for the whole run, and a database of its own for each test.

The server is an embedded one in a directory in memory, shared by all xdist workers: the first one
that needs it starts it. `TEST_DATABASE_URL` names another one to use instead, by a URL of a role
that may create databases. Databases are copies of a template, which is migrated once.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest
from psycopg import sql

from peculium_server.embedded import EmbeddedPostgres, EmbeddedPostgresError
from peculium_server.store import roles

MIGRATE = "peculium_server.store.migrate"
MEMORY = Path("/dev/shm")  # noqa: S108 - what is in it ends with the machine, as in any temporary folder
MEMORY_BYTES_MIN = 4 << 30
TEMPLATE_LOCK = 0x7065637C  # Advisory: one worker makes the template, the others wait for it.

_run_id = pytest.StashKey[str]()
_folder = pytest.StashKey[str]()
_running = pytest.StashKey[BinaryIO]()

_NAME = "peculium-tests-{}"
_MARK = ".running"
"""The suffix of a file beside a run's data, locked for as long as the run lives."""


@dataclass(frozen=True)
class Server:
    """A Postgres on which this run makes its databases, told apart by their names' prefix."""

    dsn: str
    prefix: str

    def url_of(self, database: str) -> str:
        """The libpq URI of one of the server's databases."""
        return urlsplit(self.dsn)._replace(path=f"/{database}").geturl()

    @contextlib.contextmanager
    def fresh_database(self, template: str = "template0") -> Iterator[str]:
        """A new database for the time of the block, as its libpq URI."""
        name = f"{self.prefix}{secrets.token_hex(4)}"
        self.create(name, template)
        try:
            yield self.url_of(name)
        finally:
            self.drop(name)

    def migrated_template(self) -> str:
        """The name of a database at the newest schema, made when it is first asked for."""
        return self._template

    @functools.cached_property
    def _template(self) -> str:
        name = f"{self.prefix}template"
        self._admin.execute("SELECT pg_advisory_lock(%s)", [TEMPLATE_LOCK])
        try:
            found = self._admin.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name])
            if found.fetchone() is None:
                unfinished = f"{name}_unfinished"
                self.drop(unfinished)
                self.create(unfinished)
                importlib.import_module(MIGRATE).upgrade(self.url_of(unfinished))
                self._admin.execute(
                    sql.SQL("ALTER DATABASE {} RENAME TO {}").format(
                        sql.Identifier(unfinished), sql.Identifier(name)
                    )
                )
        finally:
            self._admin.execute("SELECT pg_advisory_unlock(%s)", [TEMPLATE_LOCK])
        return name

    def create(self, name: str, template: str = "template0") -> None:
        """Create a database as a copy of another: of its files, which takes half the work of logging them."""
        self._admin.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )

    def drop(self, name: str) -> None:
        """Drop a database, and the connections to it."""
        self._admin.execute(
            sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        )

    def drop_all(self) -> None:
        """Drop whatever this run made."""
        pattern = self.prefix.replace("_", r"\_") + "%"
        rows = self._admin.execute(
            "SELECT datname FROM pg_database WHERE datname LIKE %s", [pattern]
        ).fetchall()
        for (name,) in rows:
            self.drop(name)

    def close(self) -> None:
        """Close the connection by which databases are made."""
        self._admin.close()

    @functools.cached_property
    def _admin(self) -> psycopg.Connection:
        """One for all: connecting anew for each would take as long as making it."""
        return psycopg.connect(self.dsn, autocommit=True)


def as_role(dsn: str, role: str) -> str:
    """The URI of the same database for sessions that have the role's rights and no others."""
    url = urlsplit(dsn)
    query = "&".join(filter(None, [url.query, f"options=-c%20role%3D{role}"]))
    return url._replace(query=query).geturl()


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Iterator[Server]:
    """The server of this run."""
    prefix = f"peculium_test_{pytestconfig.stash[_run_id]}_"
    given = os.environ.get("TEST_DATABASE_URL")
    if given is not None:
        with contextlib.closing(Server(given, prefix)) as server:
            yield server
        return
    data_dir = _data_dir(pytestconfig)
    with (
        EmbeddedPostgres.start(data_dir, settings={"max_connections": "400"}) as running,
        contextlib.closing(Server(running.dsn, prefix)) as server,
    ):
        yield server


@pytest.fixture
def empty_database(postgres: Server) -> Iterator[str]:
    """The URL of a database without any table."""
    with postgres.fresh_database() as url:
        yield url


@pytest.fixture
def database(postgres: Server) -> Iterator[str]:
    """The URL of a database at the newest schema, without any budget."""
    with postgres.fresh_database(postgres.migrated_template()) as url:
        yield url


@pytest.fixture
def served_database(database: str) -> str:
    """The URL of the same for a server: with the rights that a server has to have, and no others."""
    return as_role(database, roles.SERVER)


@pytest.fixture
def own_postgres() -> Iterator[Path]:
    """A data directory for a PostgreSQL of the test's own, whoever may run that."""
    folder = Path(tempfile.mkdtemp(prefix="peculium-own-"))
    folder.chmod(0o755)
    data_dir = folder / "data"
    yield data_dir
    if data_dir.exists():
        # Whoever used it was stopped or killed: this is the last one who does.
        EmbeddedPostgres.start(data_dir).stop()
    shutil.rmtree(folder)


def pytest_configure(config: pytest.Config) -> None:
    """Give all workers of a run the same id and folder, by which they find the same server."""
    given = getattr(config, "workerinput", None)
    config.stash[_run_id] = secrets.token_hex(4) if given is None else given["peculium_run_id"]
    config.stash[_folder] = _roomy_folder() if given is None else given["peculium_folder"]
    if given is None and "TEST_DATABASE_URL" not in os.environ:
        remove_what_killed_runs_left(Path(config.stash[_folder]))
        config.stash[_running] = mark_of(config).open("wb")
        fcntl.flock(config.stash[_running], fcntl.LOCK_SH)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Hand them to a worker of xdist."""
    config: pytest.Config = node.config  # type: ignore[attr-defined]
    node.workerinput["peculium_run_id"] = config.stash[_run_id]  # type: ignore[attr-defined]
    node.workerinput["peculium_folder"] = config.stash[_folder]  # type: ignore[attr-defined]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what the run made, also when a worker died on the way."""
    if hasattr(config, "workerinput"):
        return
    given = os.environ.get("TEST_DATABASE_URL")
    if given is not None:
        with contextlib.closing(Server(given, f"peculium_test_{config.stash[_run_id]}_")) as server:
            server.drop_all()
        return
    _remove(_data_dir(config))


def mark_of(config: pytest.Config) -> Path:
    """The file that is locked for as long as this run lives."""
    return _data_dir(config).with_suffix(_MARK)


def remove_what_killed_runs_left(folder: Path) -> None:
    """Stop the servers of runs that were killed, and remove their data, which may be in memory."""
    for mark in folder.glob(f"{_NAME.format('*')}{_MARK}"):
        # One that another user's run has left, or that somebody else is just removing.
        with contextlib.suppress(OSError, EmbeddedPostgresError), mark.open("rb") as running:
            fcntl.flock(running, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(mark.with_suffix(""))


def _remove(data_dir: Path) -> None:
    if (data_dir / "cluster" / "postmaster.pid").exists():
        server = EmbeddedPostgres.start(data_dir)
        server.stop()
        if server.running:
            return
    shutil.rmtree(data_dir, ignore_errors=True)
    data_dir.with_suffix(_MARK).unlink(missing_ok=True)


def _data_dir(config: pytest.Config) -> Path:
    """In memory where there is enough of it: commits then wait for no disk, and settings stay durable."""
    return Path(config.stash[_folder]) / _NAME.format(config.stash[_run_id])


def _roomy_folder() -> str:
    if MEMORY.is_dir():
        # The folder may promise more than there is.
        room = min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available)
        if room >= MEMORY_BYTES_MIN:
            return str(MEMORY)
    return tempfile.gettempdir()
