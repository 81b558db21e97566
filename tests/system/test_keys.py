"""API keys of a ledger with two servers: made by the command line and the SDK, rotated, revoked, recorded."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import grpc
import psycopg
import pytest

import peculium
from peculium import ApiKey, BudgetFilter, Client, KeyState, Role
from peculium._ids import new_id
from peculium.errors import (
    KeyEnded,
    KeyUnknown,
    Malformed,
    PermissionDenied,
    Refused,
    Unauthenticated,
)
from peculium.v1 import admin_service_pb2 as admin, audit_service_pb2 as audit
from tests.certificates import Authority
from tests.cli.test_cli import Cli, Finished
from tests.forked import Forked
from tests.postgres import Server as PostgresServer
from tests.server import RunningServer, StartServer, starting
from tests.system.wire import Told, Wire
from tests.system.world import ADMIN, AUDIT, dump

pytestmark = pytest.mark.timeout(240)


@dataclass
class Fleet:
    """Two servers of one ledger, whose first key was made by the command line."""

    first: RunningServer
    second: RunningServer
    database: str
    key: str
    folder: Path

    def connect(self, key: str | None = None, server: RunningServer | None = None) -> Client:
        return peculium.connect((server or self.first).address, api_key=key or self.key)

    def cli(self, *arguments: str) -> Finished:
        return command_line(
            *arguments, PECULIUM_TARGET=self.first.address, PECULIUM_API_KEY=self.key
        )


def command_line(*arguments: str, **variables: str) -> Finished:
    return Cli(variables.pop("PECULIUM_TARGET", ""), **variables).run(*arguments)


@pytest.fixture(scope="module")
def fleet(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("keys")
    with (
        postgres.fresh_database(postgres.migrated_template()) as database,
        starting(folder, Forked) as start,
    ):
        first, second = (start("--database-url", database) for _ in range(2))
        made = command_line("keys", "bootstrap", "ops", "--database-url", database)
        assert made.code == 0, made.err
        until_known(second, made.out.strip())
        until_known(first, made.out.strip())
        yield Fleet(first, second, database, made.out.strip(), folder)


@pytest.fixture
def ops(fleet: Fleet) -> Iterator[Client]:
    with fleet.connect() as client:
        yield client


def until_known(server: RunningServer, key: str) -> None:
    """Ask until the server asks for a key, and knows this one."""
    request = audit.ListBudgetsRequest()
    with Wire(server.address) as nobody, Wire(server.address, key) as somebody:
        while not isinstance(nobody.send(AUDIT + "ListBudgets", request), Told):
            pass
        while isinstance(somebody.send(AUDIT + "ListBudgets", request), Told):
            pass


def until_refused(server: RunningServer, key: str) -> Told:
    """Ask until the server refuses the key; it has read meanwhile what was done elsewhere."""
    with Wire(server.address, key) as wire:
        while True:
            answer = wire.send(AUDIT + "ListBudgets", audit.ListBudgetsRequest())
            if isinstance(answer, Told):
                return answer


def test_the_first_key_ends_development_on_every_server(fleet: Fleet) -> None:
    for server in (fleet.first, fleet.second):
        with peculium.connect(server.address) as nobody, pytest.raises(Unauthenticated):
            nobody.open("anything")
        assert any("may do everything" in line for line in server.said)
        assert any("has its first key" in line for line in server.said)


def test_the_first_key_is_recorded_under_the_databases_user(fleet: Fleet, ops: Client) -> None:
    [first] = [key for key in ops.admin.keys.list("ops") if key.label == "bootstrap"]
    assert first.roles == (Role.ADMIN,)
    [act] = first.acts
    with psycopg.connect(fleet.database) as connection:
        user = connection.execute("SELECT current_user").fetchone()
    assert user is not None
    assert (act.kind, act.by, act.by_key) == ("CREATE", f"database:{user[0]}", None)


def test_a_key_is_revoked_at_once_here_and_soon_elsewhere(fleet: Fleet, ops: Client) -> None:
    made = ops.admin.keys.create("crawler", roles=[Role.AUDITOR])
    text = made.key.reveal()
    until_known(fleet.second, text)
    with fleet.connect(text) as crawler:
        list(crawler.audit.budgets())
        ended = ops.admin.keys.revoke(made.info.key_id, "it leaked")
        # The answer is there: no call begun from now on is served by this server.
        with pytest.raises(Unauthenticated):
            list(crawler.audit.budgets())
    assert ended.state is KeyState.REVOKED
    refused = until_refused(fleet.second, text)
    assert refused.code is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(KeyEnded) as again:
        ops.admin.keys.revoke(made.info.key_id)
    assert again.value.revoked_by == "ops"


def test_a_stream_ends_with_the_key_that_it_began_with(fleet: Fleet, ops: Client) -> None:
    made = ops.admin.keys.create("follower", roles=[Role.AUDITOR])
    with Wire(fleet.first.address, made.key.reveal()) as wire:
        watch = wire.audit.WatchEntries(audit.WatchEntriesRequest())
        next(watch)
        ops.admin.keys.revoke(made.info.key_id)
        # What happens next is not told any more.
        ops.admin.grant("unseen", unit="calls", amount=1, holder="ops")
        with pytest.raises(grpc.RpcError) as ended:
            next(message for message in watch if message.entries)
        error: grpc.Call = ended.value  # type: ignore[assignment]
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED


def test_rotated_a_key_has_two_texts_until_the_overlap_is_over(fleet: Fleet, ops: Client) -> None:
    made = ops.admin.keys.create("gateway", roles=[Role.AUDITOR], lifetime=timedelta(days=1))
    rotated = ops.admin.keys.rotate(made.info.key_id, overlap=3600, lifetime=timedelta(days=90))
    assert rotated.key.key_id == made.key.key_id
    assert made.info.expires_at is not None
    assert rotated.info.expires_at is not None
    assert rotated.info.expires_at > made.info.expires_at
    assert rotated.info.overlap_until is not None
    for key in (made.key, rotated.key):
        with fleet.connect(key.reveal()) as client:
            list(client.audit.budgets())
    at_once = ops.admin.keys.rotate(made.info.key_id, overlap=0)
    for key in (made.key, rotated.key):
        with fleet.connect(key.reveal()) as client, pytest.raises(Unauthenticated):
            list(client.audit.budgets())
    with fleet.connect(at_once.key.reveal()) as client:
        list(client.audit.budgets())


def test_a_key_expires(fleet: Fleet, ops: Client) -> None:
    made = ops.admin.keys.create("brief", roles=[Role.AUDITOR], lifetime=1)
    refused = until_refused(fleet.first, made.key.reveal())
    assert refused.code is grpc.StatusCode.UNAUTHENTICATED
    found = ops.admin.keys.show(made.info.key_id)
    assert found.state is KeyState.EXPIRED
    with pytest.raises(KeyEnded):
        ops.admin.keys.rotate(found.key_id, overlap=0)


def test_what_was_done_to_a_key_names_who_did_it_with_which_key(fleet: Fleet, ops: Client) -> None:
    boss = ops.admin.keys.create("boss", roles=[Role.ADMIN])
    made = ops.admin.keys.create("told", label="for the story")
    with fleet.connect(boss.key.reveal()) as other:
        other.admin.keys.rotate(made.info.key_id, overlap=60)
        other.admin.keys.revoke(made.info.key_id, "no longer needed")
    acts = ops.admin.keys.show(made.info.key_id).acts
    assert [(act.kind, act.by, act.reason) for act in acts] == [
        ("CREATE", "ops", ""),
        ("ROTATE", "boss", ""),
        ("REVOKE", "boss", "no longer needed"),
    ]
    assert acts[0].by_key is not None
    assert acts[1].by_key == acts[2].by_key == boss.info.key_id


def test_auditors_see_who_has_keys_and_agents_do_not(fleet: Fleet, ops: Client) -> None:
    auditor, agent = (
        ops.admin.keys.create("seer", roles=[role]).key.reveal()
        for role in (Role.AUDITOR, Role.AGENT)
    )
    with fleet.connect(auditor) as client:
        assert {"ops", "seer"} <= {key.principal for key in client.admin.keys.list(page_size=1)}
        with pytest.raises(PermissionDenied):
            client.admin.keys.create("mine", roles=[Role.ADMIN])
    with fleet.connect(agent) as client, pytest.raises(PermissionDenied):
        list(client.admin.keys.list())


def test_the_same_request_is_done_once_and_answered_again(fleet: Fleet) -> None:
    key = ApiKey.new()
    request = admin.CreateKeyRequest(
        operation_id=new_id(),
        key_id=key.key_id,
        principal="twice",
        roles=[admin.ROLE_AGENT],
        all_roots=True,
        digest=key.digest,
    )
    with (
        Wire(fleet.first.address, fleet.key) as first,
        Wire(fleet.second.address, fleet.key) as second,
    ):
        made = first.admin.CreateKey(request)
        again = second.admin.CreateKey(request)
        assert (made.replayed, again.replayed) == (False, True)
        assert again.key == made.key
        request.label = "other"
        answer = first.send(ADMIN + "CreateKey", request)
    assert isinstance(answer, Told)
    assert (answer.reason, answer.facts["field"]) == ("OPERATION_ID_REUSED", "label")


MALFORMED = {
    "operation_id": admin.CreateKeyRequest(operation_id=b"x"),
    "key_id": admin.CreateKeyRequest(key_id=b"x"),
    "principal": admin.CreateKeyRequest(principal="system"),
    "roles": admin.CreateKeyRequest(roles=[admin.ROLE_AGENT, admin.ROLE_AGENT]),
    "digest": admin.CreateKeyRequest(digest=b"x"),
}


@pytest.mark.parametrize("field", MALFORMED)
def test_a_request_that_is_not_as_it_has_to_be_is_refused_by_field(
    fleet: Fleet, field: str
) -> None:
    request = admin.CreateKeyRequest(
        operation_id=new_id(),
        key_id=new_id(),
        principal="wrong",
        all_roots=True,
        roles=[admin.ROLE_AGENT] if field != "roles" else [],
        digest=ApiKey.new().digest,
    )
    request.MergeFrom(MALFORMED[field])
    with Wire(fleet.first.address, fleet.key) as wire:
        answer = wire.send(ADMIN + "CreateKey", request)
    assert isinstance(answer, Told)
    assert (answer.reason, answer.facts["field"]) == ("MALFORMED", field)


@pytest.mark.parametrize(("all_roots", "root_ids"), [(False, []), (True, [bytes(16)])])
def test_for_which_roots_a_key_is_has_to_be_said(
    fleet: Fleet, all_roots: bool, root_ids: list[bytes]
) -> None:
    request = admin.CreateKeyRequest(
        operation_id=new_id(),
        key_id=new_id(),
        principal="wrong",
        roles=[admin.ROLE_AGENT],
        digest=ApiKey.new().digest,
        all_roots=all_roots,
        root_ids=root_ids,
    )
    with Wire(fleet.first.address, fleet.key) as wire:
        answer = wire.send(ADMIN + "CreateKey", request)
    assert isinstance(answer, Told)
    assert (answer.reason, answer.facts["field"]) == ("MALFORMED", "root_ids")


def test_a_key_that_there_is_not_is_told_so(ops: Client) -> None:
    for call in (
        lambda: ops.admin.keys.show(new_id()),
        lambda: ops.admin.keys.revoke(new_id()),
        lambda: ops.admin.keys.rotate(new_id(), overlap=0),
    ):
        with pytest.raises(KeyUnknown):
            call()
    with pytest.raises(Malformed):
        ops.admin.keys.revoke("no id")


# -- The command line --------------------------------------------------------------------------------


def test_create_prints_the_key_alone_and_it_works(fleet: Fleet) -> None:
    made = fleet.cli("keys", "create", "printed", "--role", "auditor", "--expires", "90d")
    assert made.code == 0, made.err
    text = made.out.removesuffix("\n")
    assert ApiKey.parse(text).reveal() == text
    assert text not in made.err
    with fleet.connect(text) as client:
        list(client.audit.budgets(selected=BudgetFilter()))


def test_create_writes_the_key_to_a_file_of_its_own_and_prints_it_nowhere(fleet: Fleet) -> None:
    path = fleet.folder / "written.key"
    made = fleet.cli("keys", "create", "written", "--out", str(path))
    assert made.code == 0, made.err
    text = path.read_text().strip()
    assert ApiKey.parse(text).reveal() == text
    assert text not in made.out + made.err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = fleet.cli("keys", "create", "written", "--out", str(path))
    assert again.code == 2
    assert "is there already" in again.err
    nowhere = fleet.cli("keys", "create", "written", "--out", str(fleet.folder / "no" / "file"))
    assert nowhere.code == 2
    # A key that could not be written was not made.
    listed = fleet.cli("keys", "list", "--principal", "written", "--json")
    assert len(listed.out.splitlines()) == 1
    rotated = fleet.cli("keys", "rotate", text, "--overlap", "0s", "--out", str(path))
    assert rotated.code == 0, rotated.err
    assert path.read_text().strip() != text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_keys_are_listed_shown_and_revoked(fleet: Fleet, ops: Client) -> None:
    ops.admin.grant("scoped", unit="calls", amount=1, holder="ops")
    made = fleet.cli("keys", "create", "shown", "--root", "scoped", "--label", "a label", "--json")
    assert made.code == 0, made.err
    told = json.loads(made.out)
    root = ops.audit.budget("scoped").ref.root_id
    assert [uuid.replace("-", "") for uuid in told["roots"]] == [root.hex()]
    assert (told["state"], told["roles"], told["label"]) == ("active", ["agent"], "a label")
    listed = fleet.cli("keys", "list", "--principal", "shown")
    assert told["key_id"] in listed.out
    assert told["key"] not in listed.out
    revoked = fleet.cli("keys", "revoke", told["key"], "--reason", "over")
    assert revoked.code == 0, revoked.err
    shown = fleet.cli("keys", "show", told["key_id"])
    assert "revoke" in shown.out
    assert "over" in shown.out
    assert told["key_id"] not in fleet.cli("keys", "list", "--principal", "shown").out
    assert told["key_id"] in fleet.cli("keys", "list", "--principal", "shown", "--all").out
    again = fleet.cli("keys", "revoke", told["key_id"])
    assert again.code == 1
    assert "was revoked" in again.err


@pytest.mark.parametrize("wrong", ["90", "d", "-1d", "1y", "99999999999d"])
def test_a_duration_that_is_none_is_wrong_usage(wrong: str) -> None:
    ended = command_line("keys", "create", "x", f"--expires={wrong}")
    assert ended.code == 2
    assert "is no duration" in ended.err


def test_new_makes_a_key_and_the_lines_for_a_key_file(
    start_server: StartServer, database: str, tmp_path: Path
) -> None:
    made = command_line("keys", "new")
    assert made.code == 0
    file = tmp_path / "keys.toml"
    lines = made.err[made.err.index("[[keys]]") :].splitlines()[:4]
    file.write_text("\n".join(lines).replace('"…"', '"somebody"') + "\n")
    server = start_server("--database-url", database, "--keys-file", str(file))
    with (
        peculium.connect(server.address, api_key=made.out.strip()) as client,
        pytest.raises(Refused),
    ):
        client.open("nothing")


def test_no_key_is_to_be_found_in_the_database_or_the_log(fleet: Fleet, ops: Client) -> None:
    made = ops.admin.keys.create("quiet", roles=[Role.AUDITOR])
    text = made.key.reveal()
    with fleet.connect(text) as client:
        list(client.audit.budgets())
    with psycopg.connect(fleet.database) as connection:
        rows = [row for table in dump(connection).values() for row in table]
    for key in (text, fleet.key):
        secret = key[-40:]
        assert not [row for row in rows if secret in row or secret.encode().hex() in row]
        for server in (fleet.first, fleet.second):
            assert not [line for line in server.said if secret in line]


# -- TLS, from the command line to the database ---------------------------------------------------------


def test_the_command_line_and_the_sdk_speak_tls_and_certificates_name_them(
    start_server: StartServer, served_database: str, tmp_path: Path
) -> None:
    authority = Authority()
    certificate, key = authority.server("ledger.example").write(tmp_path)
    ca = tmp_path / "ca.crt"
    ca.write_bytes(authority.pem)
    spiffe = "spiffe://example.org/ops"
    own_certificate, own_key = authority.client(spiffe).write(tmp_path, "client")
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[certificates]]\nspiffe = "{spiffe}"\nrole = "admin"\n')
    flags = {
        "--database-url": served_database,
        "--keys-file": str(keys),
        "--tls-cert-file": str(certificate),
        "--tls-key-file": str(key),
        "--tls-client-ca-file": str(ca),
        "--tls-client-listen": "127.0.0.1:0",
    }
    server = start_server(*(word for pair in flags.items() for word in pair), listen="0.0.0.0:0")
    assert not [line for line in server.said if line.startswith("WARNING: connections")]
    [ready] = tmp_path.glob("ready-*.json")
    apart = json.loads(ready.read_text())["listening_with_certificate"]
    own = {
        "PECULIUM_TLS_CA_FILE": str(ca),
        "PECULIUM_TLS_CLIENT_CERT_FILE": str(own_certificate),
        "PECULIUM_TLS_CLIENT_KEY_FILE": str(own_key),
    }
    granted = command_line(
        *("--tls-server-name", "ledger.example", "grant", "acme", "5usd", "--holder", spiffe),
        *("--target", apart),
        **own,
    )
    assert granted.code == 0, granted.err
    tls = peculium.Tls.of_files(
        ca_file=str(ca),
        cert_file=str(own_certificate),
        key_file=str(own_key),
        server_name="ledger.example",
    )
    with peculium.connect(apart, tls=tls) as client:
        client.open("acme").spend(1)
        assert [entry.actor for entry in client.audit.entries("acme")] == [spiffe, spiffe]
        made = client.admin.keys.create("by-key", roles=[Role.AUDITOR])
    # At the other address nobody is asked for a certificate, and a key is needed.
    port = server.address.rpartition(":")[2]
    plain = peculium.Tls.of_files(ca_file=str(ca))
    target = f"127.0.0.1:{port}"
    with peculium.connect(target, api_key=made.key.reveal(), tls=plain) as client:
        assert client.audit.budget("acme").balances.spent == 1
    with peculium.connect(target, tls=plain) as client, pytest.raises(Unauthenticated):
        client.audit.budget("acme")


async def test_the_client_for_asyncio_has_the_same_verbs(fleet: Fleet) -> None:
    async with peculium.aio.connect(fleet.first.address, api_key=fleet.key) as client:
        made = await client.admin.keys.create("aio")
        assert made.info.key_id in [key.key_id async for key in client.admin.keys.list("aio")]
        await client.admin.keys.rotate(made.info.key_id, overlap=1)
        await client.admin.keys.revoke(made.info.key_id)
        assert (await client.admin.keys.show(made.info.key_id)).state is KeyState.REVOKED
