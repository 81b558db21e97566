"""One message to one receiver, a program of its own: signed, to what was looked at, and without waiting for ever."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from peculium_server.webhooks.addresses import Allowed
from peculium_server.webhooks.keys import WebhookKeys
from peculium_server.webhooks.sending import Sender, Sent
from tests.alerts.documented import verified
from tests.alerts.receiver import Receiver, receiving

LEDGER, WEBHOOK = bytes(16), bytes(range(16))
NAME = "receiver.example"
HERE = Allowed(loopback=True)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture
def keys(tmp_path: Path) -> WebhookKeys:
    return WebhookKeys.make(tmp_path / "key")


class Resolver:
    """Names lead where the test says, each time somewhere else."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def __call__(self, host: str, _: int) -> Sequence[str]:
        assert host == NAME
        self.asked += 1
        return self.answers.pop(0)


async def send(sender: Sender, url: str, **said: Any) -> Sent:
    given: dict[str, Any] = {
        "incarnation": LEDGER,
        "webhook_id": WEBHOOK,
        "message_id": "alert-1",
        "at": int(time.time() * 1_000_000),
        "document": {"type": "webhook.test", "é": "ü"},
    }
    return await sender.send(url, **given | said)


async def test_a_message_arrives_as_it_was_signed(receiver: Receiver, keys: WebhookKeys) -> None:
    sent = await send(Sender(keys, HERE), receiver.url("status/204?x=y"))
    assert sent == Sent(204, "")
    told = receiver.next()
    assert told["path"] == "/status/204?x=y"
    assert json.loads(told["body"]) == {"type": "webhook.test", "é": "ü"}
    assert told["headers"]["content-type"] == "application/json"
    assert told["headers"]["webhook-id"] == "alert-1"
    secret = keys.secret(LEDGER, WEBHOOK)
    assert verified(secret, told["headers"], told["body"].encode(), time.time())
    assert not verified(secret, told["headers"], told["body"].encode() + b" ", time.time())
    assert secret not in json.dumps(told)


@pytest.mark.parametrize("status", [200, 201, 299])
async def test_what_the_receiver_takes_is_taken(
    receiver: Receiver, keys: WebhookKeys, status: int
) -> None:
    assert (await send(Sender(keys, HERE), receiver.url(f"status/{status}"))).taken
    receiver.next()


@pytest.mark.parametrize("status", [300, 304, 400, 401, 404, 410, 429, 500, 503])
async def test_what_it_does_not_take_is_not(
    receiver: Receiver, keys: WebhookKeys, status: int
) -> None:
    sent = await send(Sender(keys, HERE), receiver.url(f"status/{status}"))
    assert sent == Sent(status, f"answered {status}")
    receiver.next()


async def test_a_redirect_is_not_followed(receiver: Receiver, keys: WebhookKeys) -> None:
    assert await send(Sender(keys, HERE), receiver.url("redirect")) == Sent(302, "answered 302")
    assert receiver.next()["path"] == "/redirect"
    assert await send(Sender(keys, HERE), receiver.url("status/200")) == Sent(200, "")
    assert receiver.next()["path"] == "/status/200"
    assert not receiver.has_more()


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("early", Sent(200, "")),
        ("endless", Sent(200, "")),
        ("long", Sent(0, "the head of the answer is too long")),
        ("nonsense", Sent(0, "the answer is not HTTP/1.1")),
        ("nothing", Sent(0, "the receiver ended the connection without an answer")),
    ],
)
async def test_odd_answers_are_told_and_no_more_is_read_than_a_head(
    receiver: Receiver, keys: WebhookKeys, path: str, sent: Sent
) -> None:
    assert await send(Sender(keys, HERE), receiver.url(path)) == sent
    receiver.next()


async def test_a_receiver_that_does_not_answer_is_not_waited_for(
    receiver: Receiver, keys: WebhookKeys
) -> None:
    sent = await send(Sender(keys, HERE, seconds_max=0.5), receiver.url("slow"))
    assert sent == Sent(0, "no answer in 0.5 s")
    receiver.next()


async def test_nobody_there_is_told(keys: WebhookKeys, unused_tcp_port: int) -> None:
    sent = await send(Sender(keys, HERE), f"http://127.0.0.1:{unused_tcp_port}/")
    assert sent.status == 0
    assert sent.problem.startswith("no connection: ")


async def test_a_resolver_that_hangs_or_fails_is_told(keys: WebhookKeys) -> None:
    async def hang(_: str, __: int) -> Sequence[str]:
        return await asyncio.Future()

    async def fail(_: str, __: int) -> Sequence[str]:
        raise OSError(-2, "Name or service not known")

    for resolve, problem in ((hang, "no answer"), (fail, "cannot be resolved")):
        sender = Sender(keys, HERE, resolve=resolve, seconds_max=0.2)
        assert problem in (await send(sender, f"https://{NAME}/")).problem


@pytest.mark.parametrize(
    "addresses",
    [("127.0.0.1",), ("93.184.216.34", "127.0.0.1"), ("10.0.0.1",), ("::ffff:127.0.0.1",)],
)
async def test_nothing_is_sent_to_a_name_that_leads_to_what_must_not_be_reached(
    receiver: Receiver, keys: WebhookKeys, addresses: Sequence[str]
) -> None:
    sender = Sender(keys, Allowed(), resolve=Resolver(addresses))
    sent = await send(sender, receiver.url("status/200", NAME, "https"))
    assert sent.status == 0
    assert sent.problem.startswith(f"not allowed: {NAME} leads to ")
    assert not receiver.has_more()


# -- With TLS -----------------------------------------------------------------------------------------


def certificate(path: Path, name: str) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    named = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(named)
        .issuer_name(named)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(pem)
    )
    return path


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("tls") / "receiver.pem", NAME)


@pytest.fixture(scope="module")
def secure(trusted: Path) -> Iterator[Receiver]:
    with receiving(str(trusted)) as running:
        yield running


@pytest.fixture
def sender_to(keys: WebhookKeys, trusted: Path) -> Callable[[Resolver], Sender]:
    tls = ssl.create_default_context(cafile=str(trusted))
    return lambda resolve: Sender(keys, Allowed.of(NAME), resolve=resolve, tls=tls)


async def test_the_connection_is_made_to_the_address_that_was_looked_at_and_names_the_host(
    secure: Receiver, sender_to: Callable[[Resolver], Sender]
) -> None:
    """A name that leads elsewhere a moment later is not asked again."""
    resolver = Resolver(["127.0.0.1"], ["127.0.0.9"])
    sent = await send(sender_to(resolver), secure.url("status/200", NAME, "https"))
    assert sent == Sent(200, "")
    assert resolver.asked == 1
    told = secure.next()
    assert told["sni"] == NAME
    assert told["headers"]["host"] == f"{NAME}:{secure.port}"


async def test_the_next_address_is_tried_if_nobody_is_at_the_first(
    secure: Receiver, sender_to: Callable[[Resolver], Sender]
) -> None:
    resolver = Resolver(["127.0.0.77", "127.0.0.1"])
    sent = await send(sender_to(resolver), secure.url("status/200", NAME, "https"))
    assert sent == Sent(200, "")
    secure.next()


async def test_a_receiver_without_a_certificate_for_the_name_is_sent_nothing(
    secure: Receiver, keys: WebhookKeys, tmp_path: Path
) -> None:
    other = certificate(tmp_path / "other.pem", "other.example")
    contexts = [ssl.create_default_context(), ssl.create_default_context(cafile=str(other))]
    for tls in contexts:
        sender = Sender(keys, Allowed.of(NAME), resolve=Resolver(["127.0.0.1"]), tls=tls)
        sent = await send(sender, secure.url("status/200", NAME, "https"))
        assert sent.problem == "TLS failed: CERTIFICATE_VERIFY_FAILED"
    with receiving(str(other)) as wrong:
        tls = ssl.create_default_context(cafile=str(other))
        sender = Sender(keys, Allowed.of(NAME), resolve=Resolver(["127.0.0.1"]), tls=tls)
        sent = await send(sender, wrong.url("status/200", NAME, "https"))
        assert sent.problem.startswith("TLS failed: ")
        assert not wrong.has_more()
    assert not secure.has_more()
