"""What the tests of the whole system share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.forked import Forked
from tests.postgres import Server as PostgresServer
from tests.server import RunningServer, starting
from tests.system.wire import Wire
from tests.system.world import webhook_flags


@dataclass(frozen=True)
class Shared:
    """A server in dev mode for all tests of a module, its database, and a connection to it."""

    server: RunningServer
    database: str
    wire: Wire


@pytest.fixture(scope="module")
def shared(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("server")
    with (
        postgres.fresh_database(postgres.migrated_template()) as database,
        starting(directory, Forked) as start,
    ):
        # What the tests make is not to change behind their backs.
        flags = ("--sweep-seconds", "0", *webhook_flags(directory))
        server = start("--database-url", database, *flags)
        with Wire(server.address) as wire:
            yield Shared(server, database, wire)


@pytest.fixture
def wire(running_server: RunningServer) -> Iterator[Wire]:
    """A connection to the test's own server."""
    with Wire(running_server.address) as connection:
        yield connection
