"""What the tests of the command line share."""

from __future__ import annotations

import pytest

from tests.cli.test_cli import Cli
from tests.server import RunningServer


@pytest.fixture
def cli(running_server: RunningServer) -> Cli:
    """The command line, pointed at a server without anything in it."""
    return Cli(running_server.address)
