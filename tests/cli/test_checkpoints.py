"""Checkpoints on the command line: they are listed, prove entries, and fail when something does not hold."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

import peculium
from peculium_server.signing import SigningKey, public_pem
from tests.cli.test_cli import Cli
from tests.server import StartServer


class Sealed:
    """A server that has sealed a tree of two entries, the key, and the command line."""

    def __init__(self, cli: Cli, key: SigningKey, folder: Path) -> None:
        self.cli = cli
        self.key = key
        self.public = folder / "public.pem"
        self.public.write_text(public_pem(key.public_key))
        self.wrong = folder / "wrong.hex"
        self.wrong.write_text(SigningKey.make(folder / "wrong.pem").public_key.hex())


@pytest.fixture
def sealed(start_server: StartServer, served_database: str, tmp_path: Path) -> Sealed:
    key = SigningKey.make(tmp_path / "key.pem")
    arguments = ("--signing-key-file", str(tmp_path / "key.pem"), "--seal-seconds", "1")
    server = start_server("--database-url", served_database, *arguments)
    with peculium.connect(server.address) as client:
        client.admin.grant("acme", unit="calls", amount=100, holder="dev")
        client.open("acme").spend(5)
    cli = Cli(server.address)
    deadline = time.monotonic() + 50
    while cli.run("audit", "prove", "acme", "2").code == 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return Sealed(cli, key, tmp_path)


def test_checkpoints_are_listed_and_prove_an_entry(sealed: Sealed) -> None:
    cli = sealed.cli
    [first, *_] = cli.lines("audit", "checkpoints", "--oldest-first")
    assert (first["number"], first["key_id"]) == (1, sealed.key.key_id.hex())
    latest = cli.lines("audit", "checkpoints", "--limit", "1")
    assert [each["number"] for each in latest] == [
        max(each["number"] for each in cli.lines("audit", "checkpoints"))
    ]
    assert first["hash"] in cli.says("audit", "checkpoints")
    said = cli.says("audit", "prove", "acme", "2", "--public-key", str(sealed.public))
    assert "entry 2 is under checkpoint" in said
    assert "signed with the public key that was given" in said
    digits = sealed.key.public_key.hex()
    assert "that was given" in cli.says("audit", "prove", "acme", "2", "--public-key", digits)
    assert "compare it with what was published" in cli.says("audit", "prove", "acme", "1")
    proof: dict[str, Any]
    [proof] = cli.lines("audit", "prove", "acme", "2", "--public-key", str(sealed.public))
    assert (proof["proven"], proof["flaw"], proof["entry"]["kind"]) == (True, None, "SPEND")


def test_a_proof_under_another_key_fails(sealed: Sealed) -> None:
    finished = sealed.cli.run("audit", "prove", "acme", "2", "--public-key", str(sealed.wrong))
    assert finished.code == 1
    assert "NOT PROVEN: the checkpoint is not signed with this public key" in finished.out
    code, said = sealed.cli.complains("audit", "prove", "acme", "2", "--public-key", "/none")
    assert code == 2
    assert "cannot be read" in said


def test_a_proof_of_what_was_altered_fails(sealed: Sealed, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE entries SET principal = 'mallory' WHERE seq = 2")
    finished = sealed.cli.run("audit", "prove", "acme", "2", "--public-key", str(sealed.public))
    assert finished.code == 1
    assert "NOT PROVEN" in finished.out


def test_what_is_not_there_is_told_so(sealed: Sealed) -> None:
    code, said = sealed.cli.complains("audit", "prove", "acme", "9")
    assert code == 2
    assert "must be 1 to 2" in said


def test_a_key_is_made_once(tmp_path: Path) -> None:
    cli, file = Cli("127.0.0.1:1"), tmp_path / "key.pem"
    [made] = cli.lines("audit", "new-key", str(file))
    assert made["public_key"] == SigningKey.load(file).public_key.hex()
    private = file.read_text().splitlines()[1]
    code, said = cli.complains("audit", "new-key", str(file))
    assert code == 2
    assert "File exists" in said
    other = cli.says("audit", "new-key", str(tmp_path / "other.pem"))
    assert "BEGIN PUBLIC KEY" in other
    assert "PRIVATE" not in other
    assert private not in other
