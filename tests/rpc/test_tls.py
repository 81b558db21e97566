"""TLS on real sockets: whom a server lets connect, who that is then, and what becomes of new certificates."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import cast

import grpc
import pytest

from peculium._ids import new_id
from peculium.v1 import admin_service_pb2 as admin, types_pb2
from peculium.v1.admin_service_pb2_grpc import AdminServiceStub
from peculium_server.identity import Identities
from peculium_server.keyfile import KeyFile
from peculium_server.lanes.ledger import Ledger
from peculium_server.rpc.server import Server
from peculium_server.rpc.tls import Tls, TlsFiles, TlsInvalid
from peculium_server.store.keys import KeysSince
from peculium_server.store.store import Store
from tests.certificates import Authority, Pair
from tests.lanes.memory import MemoryStore
from tests.rpc.wire import info_of

GATEWAY = "spiffe://example.org/gateway"
RULES = f"""
[[certificates]]
spiffe = "{GATEWAY}"
role = "admin"

[[certificates]]
spiffe = "spiffe://example.org/agents/*"
role = "agent"

[[keys]]
principal = "by-key"
role = "admin"
sha256 = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"
"""
KEY = "key"
OVER = timedelta(days=-3)


class Clock:
    """A ledger without keys, which has a clock."""

    async def since(self, _number: int, /) -> KeysSince:
        return KeysSince(1_700_000_000_000_000, 0, ())


@dataclass(frozen=True)
class Encrypted:
    """A running server, and what belongs to it."""

    port: int
    folder: Path
    authority: Authority
    tls: Tls

    def channel(
        self, pair: Pair | None = None, authority: Authority | None = None
    ) -> grpc.aio.Channel:
        """A connection of its own, with the client's certificate."""
        credentials = grpc.ssl_channel_credentials(
            (authority or self.authority).pem,
            None if pair is None else pair.key,
            None if pair is None else pair.certificate,
        )
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        return grpc.aio.secure_channel(f"localhost:{self.port}", credentials, options=options)

    async def called(
        self,
        pair: Pair | None = None,
        authority: Authority | None = None,
        *,
        key: str | None = None,
    ) -> grpc.StatusCode | str:
        """What a new connection is answered: the principal if a root was granted, or else the status."""
        async with self.channel(pair, authority) as channel:
            return await granted(channel, key)


async def granted(channel: grpc.aio.Channel, key: str | None = None) -> grpc.StatusCode | str:
    root_id = new_id()
    header = types_pb2.OperationHeader(operation_id=new_id(), root_id=root_id, budget_id=root_id)
    request = admin.GrantRequest(
        header=header, name=root_id.hex(), unit="calls", amount=1, holder="somebody"
    )
    metadata = [("authorization", f"Bearer {key}")] if key else []
    try:
        await AdminServiceStub(channel).Grant(request, metadata=metadata, timeout=10)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.PERMISSION_DENIED:
            return info_of(error).metadata["principal"]
        return error.code()
    return "granted"


@contextlib.asynccontextmanager
async def encrypted(folder: Path, *, client_certificates: bool) -> AsyncIterator[Encrypted]:
    authority = Authority()
    certificate, key = authority.server().write(folder)
    (folder / "ca.crt").write_bytes(authority.pem)
    (folder / "keys.toml").write_text(RULES)
    tls = Tls(TlsFiles(certificate, key, folder / "ca.crt"))
    identities = Identities(KeyFile.load(folder / "keys.toml"), Clock())
    await identities.refresh()
    store = MemoryStore()
    server = Server(
        Ledger(store, queue_rows_max=100),
        cast("Store", store),
        identities,
        message_bytes_max=1 << 20,
        call_seconds_max=30,
    )
    credentials = tls.credentials(client_certificates=client_certificates)
    port = await server.start("127.0.0.1:0", credentials)
    try:
        yield Encrypted(port, folder, authority, tls)
    finally:
        await server.stop(0)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Encrypted]:
    """Clients need no certificate."""
    async with encrypted(tmp_path, client_certificates=False) as running:
        yield running


@pytest.fixture
async def mutual(tmp_path: Path) -> AsyncIterator[Encrypted]:
    """Clients need a certificate."""
    async with encrypted(tmp_path, client_certificates=True) as running:
        yield running


UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


async def test_a_client_that_knows_the_authority_is_served_by_its_key(server: Encrypted) -> None:
    assert await server.called(key=KEY) == "granted"
    assert await server.called() is UNAUTHENTICATED


async def test_a_client_trusts_no_server_of_another_authority(server: Encrypted) -> None:
    assert await server.called(authority=Authority(), key=KEY) is UNAVAILABLE


async def test_what_speaks_no_tls_is_not_served(server: Encrypted) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert await granted(channel, KEY) is UNAVAILABLE


async def test_a_certificate_names_the_caller(mutual: Encrypted) -> None:
    assert await mutual.called(mutual.authority.client(GATEWAY)) == "granted"
    # An agent, who may not grant, is told its own name.
    agent = "spiffe://example.org/agents/seven"
    assert await mutual.called(mutual.authority.client(agent)) == agent
    # So is one whom no rule gives a role.
    stranger = "spiffe://example.org/stranger"
    assert await mutual.called(mutual.authority.client(stranger)) == stranger


async def test_without_a_good_certificate_nobody_connects(mutual: Encrypted) -> None:
    assert await mutual.called(key=KEY) is UNAVAILABLE
    assert await mutual.called(Authority().client(GATEWAY), key=KEY) is UNAVAILABLE
    expired = mutual.authority.client(GATEWAY, since=OVER)
    assert await mutual.called(expired, key=KEY) is UNAVAILABLE


@pytest.mark.parametrize(
    "uris",
    [
        (),
        (GATEWAY, "spiffe://example.org/agents/seven"),
        (GATEWAY, GATEWAY),
        ("https://example.org/gateway",),
        ("spiffe://example.org/a%2f..",),
    ],
)
async def test_a_certificate_has_to_name_exactly_one_caller(
    mutual: Encrypted, uris: tuple[str, ...]
) -> None:
    pair = mutual.authority.client(*uris, dns="gateway.example.org")
    async with mutual.channel(pair) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await AdminServiceStub(channel).Grant(admin.GrantRequest(), timeout=10)
    assert refused.value.code() is UNAUTHENTICATED
    assert "URI" in info_of(refused.value).metadata["certificate"]
    # The same connection is of use to whoever has a key.
    assert await mutual.called(pair, key=KEY) == "granted"


async def test_a_key_that_nobody_has_is_refused_whatever_the_certificate(mutual: Encrypted) -> None:
    pair = mutual.authority.client(GATEWAY)
    assert await mutual.called(pair, key="guessed") is UNAUTHENTICATED


async def test_a_new_certificate_is_for_new_connections_and_old_ones_go_on(
    server: Encrypted,
) -> None:
    async with server.channel() as before:
        assert await granted(before, KEY) == "granted"
        other = Authority()
        other.server().write(server.folder)
        assert await server.called(authority=other, key=KEY) == "granted"
        assert await server.called(key=KEY) is UNAVAILABLE
        assert await granted(before, KEY) == "granted"


async def test_new_authorities_for_clients_are_for_new_connections(mutual: Encrypted) -> None:
    pair = mutual.authority.client(GATEWAY)
    async with mutual.channel(pair) as before:
        assert await granted(before) == "granted"
        other = Authority()
        (mutual.folder / "ca.crt").write_bytes(other.pem)
        assert await mutual.called(pair) is UNAVAILABLE
        assert await mutual.called(other.client(GATEWAY)) == "granted"
        assert await granted(before) == "granted"


async def test_a_pair_that_does_not_fit_changes_nothing_and_is_told_once(
    server: Encrypted, caplog: pytest.LogCaptureFixture
) -> None:
    renewed = server.authority.server()
    certificate = server.folder / "tls.crt"
    certificate.write_bytes(renewed.certificate)
    for _ in range(3):
        assert await server.called(key=KEY) == "granted"
    told = [record.message for record in caplog.records if "CANNOT BE USED" in record.message]
    assert len(told) == 1
    assert "the key is not that of the certificate" in told[0]
    # With the other half of it in place, it is used.
    renewed.write(server.folder)
    assert await server.called(key=KEY) == "granted"
    assert [record for record in caplog.records if "were read again" in record.message]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tls.crt", b"", "the certificate is not one as PEM"),
        ("tls.key", b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n", "not a private key as PEM"),
        ("ca.crt", b"nonsense", "no certificate of an authority"),
    ],
)
def test_files_that_cannot_be_used_are_told_by_name_and_without_their_content(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    authority = Authority()
    certificate, key = authority.server().write(tmp_path)
    (tmp_path / "ca.crt").write_bytes(authority.pem)
    files = TlsFiles(certificate, key, tmp_path / "ca.crt")
    Tls(files)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TlsInvalid, match=problem) as caught:
        Tls(files)
    assert name in str(caught.value)
    assert "c2VjcmV0" not in str(caught.value)
    (tmp_path / name).unlink()
    with pytest.raises(TlsInvalid, match=rf"{name}: cannot be read: No such file"):
        Tls(files)


def test_a_key_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    certificate, key = Authority().server().write(tmp_path)
    key.chmod(0o644)
    with pytest.raises(TlsInvalid, match="others may use it"):
        Tls(TlsFiles(certificate, key, None))
