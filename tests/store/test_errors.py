"""What is made of a driver's errors."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors
from psycopg.pq import DiagnosticField

from peculium_server.store.errors import (
    LedgerCorrupt,
    StatementRefused,
    StoreError,
    StoreUnavailable,
    is_contention,
    is_lost,
    translate,
)
from peculium_server.store.schema import metadata


def said(state: str, severity: str = "ERROR", *, table: str = "") -> psycopg.Error:
    """An error as PostgreSQL sends it."""
    fields: dict[int, bytes | None] = dict.fromkeys(DiagnosticField)
    fields[DiagnosticField.SQLSTATE] = state.encode()
    fields[DiagnosticField.SEVERITY_NONLOCALIZED] = severity.encode()
    fields[DiagnosticField.TABLE_NAME] = table.encode()
    kind = errors.lookup(state)
    return kind("the driver's words, SECRET", info=fields, encoding="utf-8")


@pytest.mark.parametrize("state", ["53100", "57P01", "57P02", "25P03", "XX000", "58030"])
def test_an_error_that_ends_the_session_leaves_a_commit_in_doubt(state: str) -> None:
    """After a panic over a full disk the commit may turn out to be in the log."""
    assert is_lost(said(state, "FATAL"))
    assert is_lost(said(state, "PANIC"))
    assert isinstance(translate(said(state, "FATAL")), StoreUnavailable)


@pytest.mark.parametrize("state", ["53100", "57014", "42501", "40001", "23514"])
def test_an_error_that_leaves_the_session_is_an_answer(state: str) -> None:
    assert not is_lost(said(state))


def test_a_result_that_the_database_does_not_know_itself_leaves_a_commit_in_doubt() -> None:
    assert is_lost(said("40003"))
    assert is_lost(said("08006"))
    assert is_lost(psycopg.OperationalError("server closed the connection unexpectedly"))


@pytest.mark.parametrize("state", ["40001", "40P01", "55P03"])
def test_what_others_were_in_the_way_of_may_be_repeated(state: str) -> None:
    assert is_contention(said(state))


@pytest.mark.parametrize("table", metadata.tables)
def test_a_row_that_another_was_quicker_with_may_be_tried_again(table: str) -> None:
    assert is_contention(said("23505", table=table))
    assert is_contention(said("23505", table=f"{table}_07"))
    assert not is_contention(said("23505", table=f"pg_{table}"))
    assert not is_contention(said("23505"))


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("53100", StoreUnavailable),
        ("53300", StoreUnavailable),
        ("57014", StoreUnavailable),
        ("25006", StoreUnavailable),
        ("55P03", StoreUnavailable),
        ("0A000", StoreUnavailable),
        ("42501", StatementRefused),
        ("42P01", StatementRefused),
        ("42703", StatementRefused),
        ("42883", StatementRefused),
        ("42601", StatementRefused),
        ("22P02", StatementRefused),
        ("22012", LedgerCorrupt),
        ("23514", LedgerCorrupt),
    ],
)
def test_only_what_may_pass_is_an_outage(state: str, kind: type[StoreError]) -> None:
    error = translate(said(state))
    assert type(error) is kind
    assert state in str(error)
    assert "SECRET" not in str(error)


def test_a_refusal_of_what_may_be_committed_already_does_not_say_that_nothing_was_done() -> None:
    error = translate(said("42501"), outcome_unknown=True)
    assert isinstance(error, StoreUnavailable)
    assert error.outcome_unknown
