"""No view shows the id of a token that is live, in any form."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from peculium_server.core.state import Custody
from tests.audit_sql.conftest import Lived
from tests.leaks.marks import escaped

VIEWS = "SELECT table_name::text FROM information_schema.views WHERE table_schema = 'audit'"
CALLS = ("subtree('{}')", "as_of('{}', 'infinity')", "statement('{}', subtree => true)")


def forms(token_id: bytes) -> Iterator[str]:
    """How bytes may be written in a text."""
    yield token_id.hex()
    yield token_id.hex().upper()
    for encode in (base64.b64encode, base64.urlsafe_b64encode, base64.b32encode):
        yield encode(token_id).decode().rstrip("=")
    # As `bytea_output = escape` has it, and as JSON numbers.
    yield escaped(token_id)
    yield ", ".join(map(str, token_id))


def live_tokens(lived: Lived) -> set[bytes]:
    """The ids of all tokens with which somebody could do something."""
    tokens = set()
    for tree in lived.ledger.trees.values():
        for budget in tree.known_budgets():
            if budget.custody is Custody.TOKEN and budget.token is not None:
                tokens.add(budget.token)
        tokens |= {hold.token for hold in tree.known_holds() if hold.settleable}
    return tokens


def shown(auditor: psycopg.Connection, output: str) -> str:
    """Everything that an auditor can read, as text."""
    auditor.execute(sql.SQL("SET bytea_output = {}").format(sql.Literal(output)))
    views = [name for (name,) in auditor.execute(VIEWS).fetchall()]
    assert len(views) > 5
    sources = list(views)
    for (root,) in auditor.execute("SELECT DISTINCT root FROM audit.budgets").fetchall():
        sources += [call.format(root) for call in CALLS]
    texts = []
    for source in sources:
        query = f"SELECT value FROM audit.{source} AS r, jsonb_each_text(to_jsonb(r))"
        texts += [text for (text,) in auditor.execute(query.encode()).fetchall() if text]
    return "\n".join(texts)


@pytest.mark.parametrize("output", ["hex", "escape"])
def test_a_live_token_is_not_shown_in_any_form(
    lived: Lived, auditor: psycopg.Connection, output: str
) -> None:
    told = shown(auditor, output)
    tokens = live_tokens(lived)
    assert len(tokens) > 5
    assert not [form for token in tokens for form in forms(token) if form in told]


def test_a_consumed_token_is_shown_and_would_be_found(
    lived: Lived, auditor: psycopg.Connection
) -> None:
    told = {output: shown(auditor, output) for output in ("hex", "escape")}
    for entry in lived.ledger.journal:
        if entry.consumed is not None:
            for text in told.values():
                assert any(form in text for form in forms(entry.consumed))
