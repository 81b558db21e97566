"""Exports on the command line, from a real server into a file and back."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from rich.console import Console

from peculium._sync_audit import Audit
from peculium.exports import ExportPiece
from peculium_server.cli import exporting
from peculium_server.signing import SigningKey, public_pem
from tests.cli.test_cli import Cli
from tests.server import StartServer


def test_an_export_is_verified_brought_up_to_date_and_never_overwritten(
    cli: Cli, tmp_path: Path
) -> None:
    file = str(tmp_path / "ledger.jsonl")
    cli.says("grant", "acme", "100", "--unit", "calls", "--holder", "dev")
    assert "1 entries, 1 budgets, 0 holds" in cli.says("audit", "export", "--output", file)
    finished = cli.run("audit", "verify", "--export", file)
    assert finished.code == 0
    assert "verified: 1 entries of 1 trees" in finished.out
    assert "not that it is your ledger's" in finished.err
    code, complaint = cli.complains("audit", "export", "--output", file)
    assert (code, "exists already" in complaint) == (1, True)
    cli.says("topup", "acme", "7")
    cli.says("audit", "export", "--output", file, "--resume")
    [verdict] = cli.lines("audit", "verify", "--export", file, "--decide")
    assert verdict["verified"]
    assert (verdict["entries"], verdict["checkpoints"], verdict["unsealed"]) == (2, 0, None)


def test_a_ledger_that_was_tampered_with_does_not_verify_offline(
    cli: Cli, tmp_path: Path, database: str
) -> None:
    file = str(tmp_path / "ledger.jsonl")
    cli.says("grant", "acme", "100", "--unit", "calls", "--holder", "dev")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE entries SET amount = 99")
    cli.says("audit", "export", "acme", "--output", file)
    finished = cli.run("audit", "verify", "--export", file)
    assert finished.code == 1
    assert "NOT verified" in finished.out
    assert "entry 1: chain:" in finished.out
    [verdict] = [json.loads(cli.run("audit", "verify", "--export", file, "--json").out)]
    assert [finding["rule"] for finding in verdict["findings"]] == ["chain"]


def test_checkpoints_are_trusted_by_the_operators_key_alone(
    start_server: StartServer, served_database: str, tmp_path: Path
) -> None:
    key = SigningKey.make(tmp_path / "key.pem")
    server = start_server(
        "--database-url",
        served_database,
        PECULIUM_SIGNING_KEY_FILE=str(tmp_path / "key.pem"),
        PECULIUM_SEAL_SECONDS="1",
    )
    cli = Cli(server.address)
    cli.says("grant", "acme", "100", "--unit", "calls", "--holder", "dev")
    _wait_for_a_checkpoint(served_database)
    file = str(tmp_path / "ledger.jsonl")
    cli.says("audit", "export", "--output", file)
    pem = tmp_path / "key.pub"
    pem.write_text(public_pem(key.public_key))
    for trusted in (str(pem), key.public_key.hex()):
        [verdict] = cli.lines("audit", "verify", "--export", file, "--public-key", trusted)
        assert (verdict["verified"], verdict["keys_trusted"]) == (True, True)
        assert (verdict["checkpoints"], verdict["unsealed"]) == (1, 0)
    other = SigningKey.make(tmp_path / "other.pem").public_key.hex()
    finished = cli.run("audit", "verify", "--export", file, "--public-key", other)
    assert finished.code == 1
    assert f"signed with the key {key.key_id.hex()}, which is not known" in finished.out

    # What a server verifies is held against the same key, and against what was published.
    [checkpoint] = cli.lines("audit", "checkpoints")
    known = ("--public-key", str(pem), "--published", f"1:{checkpoint['hash']}")
    for verified in (("verify",), ("audit", "verify"), ("audit", "verify", "--export", file)):
        [verdict] = cli.lines(*verified, *known)
        assert (verdict["verified"], verdict["findings"]) == (True, [])
        for contradiction, words in (
            (("--public-key", other), "which is not known"),
            (("--published", f"1:{'00' * 32}"), "has another hash than the one that was published"),
            (("--published", f"2:{checkpoint['hash']}"), "it was published, and is missing"),
        ):
            finished = cli.run(*verified, *contradiction)
            assert (finished.code, words in finished.out) == (1, True), finished


def _wait_for_a_checkpoint(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        for _ in range(200):
            row = connection.execute("SELECT count(*), pg_sleep(0.05)::text FROM checkpoints")
            found = row.fetchone()
            if found is not None and found[0]:
                return
    raise AssertionError("nothing was sealed")


@pytest.mark.parametrize(
    ("name", "form", "advice"),
    [
        ("e.jsonl", "jsonl", "--resume goes on"),
        ("e.jsonl.gz", "jsonl", "remove e.jsonl.gz, which is cut, and export anew"),
        ("e.csv", "csv", "its end: export anew"),
    ],
)
def test_who_gets_half_an_export_is_told_how_to_get_the_rest(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str, advice: str
) -> None:
    cli.says("grant", "acme", "100", "--unit", "calls", "--holder", "dev")
    monkeypatch.chdir(tmp_path)
    whole = Audit.export

    def half(*asked: Any, **more: Any) -> Iterator[ExportPiece]:
        return itertools.islice(whole(*asked, **more), 2)

    monkeypatch.setattr(Audit, "export", half)
    code, complaint = cli.complains("audit", "export", "--output", name, "--format", form)
    assert code == 3
    assert advice in " ".join(complaint.split())
    assert (tmp_path / name).exists() is (form == "jsonl")


def test_how_far_an_export_is_is_told_and_what_was_there_before_counts(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "ledger.jsonl")
    cli.says("grant", "acme", "100", "--unit", "calls", "--holder", "dev")
    for _ in range(4):
        cli.says("topup", "acme", "1")
    told: list[str] = []
    status = SimpleNamespace(update=told.append)
    monkeypatch.setattr(exporting, "TOLD_EVERY", 2)
    monkeypatch.setattr(Console, "status", lambda *_: contextlib.nullcontext(status))
    cli.says("audit", "export", "--output", file)
    assert told == ["exporting: 2 entries", "exporting: 4 entries"]
    cli.says("topup", "acme", "1")
    cli.says("audit", "export", "--output", file, "--resume")
    assert told[2:] == ["exporting: 6 entries"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("export", "--output", "e.csv", "--format", "csv", "--resume"), 2, "gone on with"),
        (("export", "--output", "/nowhere/e.jsonl"), 1, "cannot be written"),
        (("verify", "--export", "/nowhere/e.jsonl"), 1, "cannot be read"),
        (("verify", "acme", "--export", "e.jsonl"), 2, "name no tree"),
        (("verify", "--decide"), 2, "is for an --export"),
        (("verify", "--published", "12"), 2, "write NUMBER:HASH"),
        (("verify", "--published", f"0:{'00' * 32}"), 2, "write NUMBER:HASH"),
        (
            ("verify", "--published", f"1:{'00' * 32}", "--published", f"1:{'11' * 32}"),
            2,
            "given with two hashes",
        ),
        (("verify", "--export", "e.jsonl", "--public-key", "/nowhere"), 2, "cannot be read"),
    ],
)
def test_what_cannot_be_is_told(arguments: tuple[str, ...], code: int, words: str) -> None:
    ended, complaint = Cli("127.0.0.1:1").complains("audit", *arguments)
    assert ended == code
    assert words in " ".join(complaint.replace("│", " ").split())
