"""`peculium doctor`: what it finds, and what it tells to do about it; and `peculium restored`."""

from __future__ import annotations

import asyncio
import json
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from psycopg import sql

import peculium
from peculium_server.store import examine, roles
from tests.cli.test_cli import Cli
from tests.server import RunningServer, StartServer
from tests.system.health import SERVING, becomes

CHECKS = [
    *("database", "schema", "clock", "encryption", "settings", "replication", "incarnation"),
    *("sweeping", "sealing", "rights"),
]


class Doctor:
    """What is found in a database, by check."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.code = 0

    def found(self, *flags: str) -> dict[str, tuple[str, str, str]]:
        """By check: how bad it is, what was found, what to do."""
        cli = Cli("")
        done = cli.run("doctor", "--database-url", self.url, "--json", *flags)
        self.code = done.code
        lines = [json.loads(line) for line in done.out.splitlines()]
        return {line["check"]: (line["level"], line["said"], line["remedy"]) for line in lines}


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as admin:
        for statement in statements:
            admin.execute(statement.encode())


@pytest.fixture
def doctor(served_database: str) -> Doctor:
    return Doctor(served_database)


def test_a_ledger_in_order_has_nothing_to_be_done(doctor: Doctor) -> None:
    found = doctor.found()
    assert list(found) == CHECKS
    assert {level for level, _, _ in found.values()} == {"ok"}
    assert {remedy for _, _, remedy in found.values()} == {""}
    assert doctor.code == 0
    shown = Cli("").run("doctor", "--database-url", doctor.url)
    assert (shown.code, "this version's" in shown.out) == (0, True)


def test_nothing_is_changed_by_looking(doctor: Doctor, database: str) -> None:
    """Not even what a server would notice: that it is a copy."""
    with psycopg.connect(database) as admin:
        before = admin.execute("SELECT count(*) FROM incarnations").fetchall()
        doctor.found()
        assert admin.execute("SELECT count(*) FROM incarnations").fetchall() == before


def test_a_database_that_does_not_answer_is_told_without_its_password() -> None:
    doctor = Doctor("postgresql://someone:hunter2@127.0.0.1:1/none")
    found = doctor.found()
    assert list(found) == ["database"]
    assert found["database"][0] == "failed"
    assert "hunter2" not in str(found)
    assert doctor.code == 1


def test_a_database_without_a_schema_is_to_be_migrated(empty_database: str) -> None:
    doctor = Doctor(empty_database)
    level, said, remedy = doctor.found()["schema"]
    assert (level, "has no schema" in said, "peculium migrate" in remedy) == ("failed", True, True)
    assert doctor.code == 1


def test_servers_are_to_follow_a_schema_that_is_ahead(doctor: Doctor, database: str) -> None:
    execute(database, "UPDATE alembic_version SET version_num = '9999'")
    level, _, remedy = doctor.found()["schema"]
    assert (level, "newer version" in remedy) == ("warning", True)
    # A warning is no failure.
    assert doctor.code == 0
    execute(database, "UPDATE ledger SET serves_from = '9999'")
    assert doctor.found()["schema"][0] == "failed"


def test_settings_that_forget_are_told_with_what_to_set(doctor: Doctor, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as admin:
        name = sql.Identifier(urlsplit(database).path.removeprefix("/"))
        admin.execute(sql.SQL("ALTER DATABASE {} SET synchronous_commit = off").format(name))
    level, said, remedy = doctor.found()["settings"]
    assert (level, doctor.code) == ("failed", 1)
    assert "synchronous_commit" in said
    assert "ALTER SYSTEM SET synchronous_commit = on" in remedy


def test_a_missing_right_is_named(doctor: Doctor, database: str) -> None:
    execute(database, f"REVOKE UPDATE (spent) ON budgets FROM {roles.SERVER}")
    execute(database, f"REVOKE INSERT ON entries FROM {roles.SERVER}")
    level, said, remedy = doctor.found()["rights"]
    assert level == "failed"
    assert "UPDATE on budgets.spent" in said
    assert "INSERT on entries" in said
    assert roles.SERVER in remedy


def test_a_user_who_could_rewrite_history_is_warned_of(database: str) -> None:
    level, said, _ = Doctor(database).found()["rights"]
    assert (level, "rewrite history" in said) == ("warning", True)


def test_what_nobody_sweeps_or_seals_is_told(
    running_server: RunningServer, doctor: Doctor, database: str
) -> None:
    with peculium.connect(running_server.address) as client:
        client.admin.grant("acme", unit="calls", amount=100, holder="dev")
        client.open("acme").reserve(1)
    assert doctor.found()["sweeping"][0] == "ok"
    assert doctor.found()["sealing"][:2] == ("warning", "nothing was ever sealed")
    running_server.stop()
    execute(
        database,
        "UPDATE holds SET expires_at = expires_at - interval '1 day', created_at = created_at - interval '1 day'",
    )
    level, said, remedy = doctor.found()["sweeping"]
    assert (level, "holds do not lapse" in said, "sweep_seconds" in remedy) == (
        "warning",
        True,
        True,
    )


def test_clocks_that_are_apart_are_told(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "CLOCK_SECONDS_WARNED", -1.0)
    assert doctor.found()["clock"][0] == "warning"
    monkeypatch.setattr(examine, "CLOCK_SECONDS_MAX", -1.0)
    level, _, remedy = doctor.found()["clock"]
    assert (level, "NTP" in remedy) == ("failed", True)


def test_a_servers_health_is_asked_for(running_server: RunningServer, doctor: Doctor) -> None:
    # It listens before it has made sure that the database takes commits.
    asyncio.run(becomes(running_server.address, SERVING))
    level, said, _ = doctor.found("--target", running_server.address)["server"]
    assert (level, said.endswith(" says SERVING")) == ("ok", True)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    level, said, _ = doctor.found("--target", f"127.0.0.1:{port}")["server"]
    assert (level, "UNAVAILABLE" in said, doctor.code) == ("failed", True, 1)


def test_without_any_database_it_says_which_to_name(tmp_path: Path) -> None:
    done = Cli("").run("doctor", "--data-dir", str(tmp_path / "none"))
    assert (done.code, "--database-url" in done.out) == (1, True)
    assert not (tmp_path / "none").exists()


def test_a_restored_ledger_is_told_until_an_operator_has_confirmed_it(
    start_server: StartServer, doctor: Doctor, database: str
) -> None:
    server = start_server("--database-url", doctor.url)
    with peculium.connect(server.address) as client:
        client.admin.grant("acme", unit="calls", amount=100, holder="dev")
    server.stop()
    # It was in another PostgreSQL until now.
    execute(
        database,
        "INSERT INTO incarnations (number, incarnation, frozen, event, positions, timeline,"
        " database_oid, system_identifier, xid) SELECT number + 1, incarnation, frozen, event, positions,"
        " timeline, database_oid, system_identifier - 1, pg_current_xact_id()::text::bigint"
        " FROM incarnations ORDER BY number DESC LIMIT 1",
    )
    level, said, remedy = doctor.found()["incarnation"]
    assert (level, "it is in PostgreSQL" in said, "peculium restored" in remedy) == (
        "failed",
        True,
        True,
    )
    start_server("--database-url", doctor.url).stop()
    level, said, _ = doctor.found()["incarnation"]
    assert (level, "frozen since" in said) == ("failed", True)
    done = Cli("").run("restored", "--database-url", database, "--reason", "moved", "--by", "ops")
    assert done.code == 0, done.err
    for word in ("it is in PostgreSQL", "as ops has said", "1 operations"):
        assert word in done.out
    assert doctor.found()["incarnation"][0] == "ok"
    assert doctor.code == 0


def test_nobody_confirms_a_restore_without_a_reason(doctor: Doctor) -> None:
    done = Cli("").run("restored", "--database-url", doctor.url)
    assert (done.code, "--reason" in done.err) == (2, True)


def certified(folder: Path, days: float) -> tuple[str, str]:
    """The files of a certificate that expires in so many days, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ledger")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=30))
        .not_valid_after(now + timedelta(days=days))
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret = folder / "key.pem"
    secret.touch(mode=0o600)
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return str(folder / "cert.pem"), str(secret)


@pytest.mark.parametrize(("days", "level"), [(60, "ok"), (3, "warning"), (-1, "failed")])
def test_a_certificate_that_expires_soon_is_told(tmp_path: Path, days: int, level: str) -> None:
    certificate, key = certified(tmp_path, days)
    flags = ("--tls-cert-file", certificate, "--tls-key-file", key)
    doctor = Doctor("postgresql://someone@127.0.0.1:1/none")
    assert doctor.found(*flags)["certificate"][0] == level


def test_a_certificate_that_the_key_is_not_of_is_told(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    certificate, _ = certified(tmp_path / "one", 60)
    _, key = certified(tmp_path / "other", 60)
    flags = ("--tls-cert-file", certificate, "--tls-key-file", key)
    doctor = Doctor("postgresql://someone@127.0.0.1:1/none")
    level, said, _ = doctor.found(*flags)["certificate"]
    assert (level, "the key is not that of the certificate" in said) == ("failed", True)
