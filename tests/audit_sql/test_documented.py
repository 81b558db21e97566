"""Everything that auditors read says what it is, in the database and on the page."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from peculium_server.store import roles
from tests.audit_sql.filling import chain, fill, record_checkpoints
from tests.core.every_kind import lived
from tests.postgres import as_role

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "schema.md"

COLUMNS = """
    SELECT c.relname::text, a.attname::text, col_description(c.oid, a.attnum), obj_description(c.oid)
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
    WHERE c.relnamespace = 'audit'::regnamespace
"""
FUNCTIONS = """
    SELECT proname::text, obj_description(oid, 'pg_proc') FROM pg_proc
    WHERE pronamespace = 'audit'::regnamespace
"""


@pytest.fixture
def connection(database: str) -> psycopg.Connection:
    return psycopg.connect(database)


def test_every_view_column_and_function_has_a_comment(connection: psycopg.Connection) -> None:
    with connection:
        columns = connection.execute(COLUMNS).fetchall()
        functions = connection.execute(FUNCTIONS).fetchall()
    assert len(columns) > 100
    assert [row for row in columns if not (row[2] and row[3])] == []
    assert [row for row in functions if not row[1]] == []


def test_the_reference_names_every_view_column_and_function(
    connection: psycopg.Connection,
) -> None:
    said = set(re.findall(r"`(?:audit\.)?(\w+)(?:\([^`]*\))?`", PAGE.read_text(encoding="utf-8")))
    with connection:
        names = {name for row in connection.execute(COLUMNS).fetchall() for name in row[:2]}
        names |= {row[0] for row in connection.execute(FUNCTIONS).fetchall()}
    assert names - said == set()


def _queries() -> list[str]:
    section = PAGE.read_text(encoding="utf-8").partition("## Views for auditors")[2]
    blocks = re.findall(r"```sql\n(.*?)```", section.partition("## Roles")[0], flags=re.DOTALL)
    return [query.strip() for block in blocks for query in block.split(";") if query.strip()]


@pytest.mark.parametrize("query", _queries())
def test_every_query_of_the_page_is_answered(query: str, database: str) -> None:
    """With names of a ledger that there is in place of the page's."""
    ledger, root = lived()
    fill(database, ledger)
    record_checkpoints(database, *chain((1, 2)))
    hold = next(hold for hold in root.tree.known_holds() if hold.budget_id != root.id)
    budget = root.tree.budget(hold.budget_id)
    line = [root.tree.budget(above).name for above in reversed(budget.ancestors)]
    for said, meant in (
        ("acme/research/run-7", "/".join([*line, budget.name])),
        ("acme/research", "/".join(line[:2])),
        ("acme", line[0]),
        ("worker-3", "agent"),
        ("4bf92f3577b34da6a3ce929d0e0e4736", bytes(range(16)).hex()),
        ("'…'", f"'{hold.hold_id.hex()}'"),
        ("2026-11-01", "2027-01-01"),
        ("2026-11-30", "2027-12-31"),
        ("2026-12-01", "2028-01-01"),
    ):
        query = query.replace(said, meant)
    with psycopg.connect(as_role(database, roles.AUDITOR)) as auditor:
        answer = auditor.execute(query.encode()).fetchall()
    assert answer
