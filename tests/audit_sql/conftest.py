"""Ledgers in which much has happened, in memory and in a database, and an auditor's connection to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import psycopg
import pytest

from peculium_server.store import roles
from tests.audit_sql.filling import fill
from tests.audit_sql.lives import Life
from tests.core.ledger import Ledger
from tests.postgres import Server, as_role

SEEDS = (1, 2, 3)


class Lived(NamedTuple):
    """A ledger, twice."""

    ledger: Ledger
    dsn: str


@pytest.fixture(scope="module", params=SEEDS)
def lived(postgres: Server, request: pytest.FixtureRequest) -> Iterator[Lived]:
    """A random ledger. Tests only read it."""
    ledger = Life(request.param).live()
    with postgres.fresh_database(postgres.migrated_template()) as dsn:
        fill(dsn, ledger)
        yield Lived(ledger, dsn)


@pytest.fixture
def auditor(lived: Lived) -> Iterator[psycopg.Connection]:
    """A session with the auditor's rights."""
    with psycopg.connect(as_role(lived.dsn, roles.AUDITOR), autocommit=True) as connection:
        yield connection
