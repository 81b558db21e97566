"""The SDK and the command line, used well and badly, and everything that they say about it."""

from __future__ import annotations

import io
import logging
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import peculium
from peculium import AlertKind, ApiKey, Capability, Child, Client, Usage
from tests.alerts.receiver import Receiver
from tests.cli.test_cli import Cli
from tests.leaks.calling import changed

CRASH = "import peculium; peculium.connect = None; from peculium_server.cli import main; main()"


@dataclass
class Said:
    """What a program has said of its errors."""

    errors: list[bytes] = field(default_factory=list)

    def of(self, ask: Callable[[], object]) -> None:
        """Do what has to fail, and keep what could be told of that."""
        try:
            ask()
        except Exception as error:  # noqa: BLE001 - whatever it is, somebody will log it
            texts = [repr(error), str(error), *traceback.format_exception(error)]
            self.errors += [text.encode(errors="surrogateescape") for text in texts]
            if isinstance(error, peculium.PeculiumError):
                self.errors += [pickle.dumps(error), repr(vars(error)).encode()]
            return
        raise AssertionError("it was not refused")


@contextmanager
def logged() -> Iterator[io.StringIO]:
    """All that this process logs, at the lowest level."""
    stream, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(stream), root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


def use(client: Client, receiver: Receiver, planted: str, said: Said) -> list[str]:
    """An agent's life, with the mistakes that there are, and what webhooks are sent of it."""
    made = client.admin.grant("sdk", unit="calls", amount=1_000)
    text = made.capability.reveal()
    _mistake(client, text, said)
    budget = client.accept(text)
    said.of(lambda: client.accept(text))
    key = client.admin.keys.create("gateway", label="of a test").key
    _mistake_keys(client, key, said)
    [child] = budget.delegate([Child("child", 100, holder="dev", token=True)])
    own = client.accept(child.capability)
    hold = own.reserve(10, labels={"team": "a"})
    said.of(lambda: own.reserve(10**6))
    said.of(lambda: own.spend(1, reference=text))
    said.of(lambda: own.reserve(1, labels={"team": key.reveal()}))
    said.of(lambda: own.delegate([Child(text, 1)]))
    said.of(lambda: own.spend(1, timeout=1e-6))
    again = client.recover("sdk/child")
    said.of(lambda: own.spend(1))
    hold.settle(7, usage=Usage(model="small"), reference="req-1")
    said.of(lambda: pickle.dumps(again))
    moved = again.hand_over()
    said.of(lambda: pickle.dumps(moved))
    said.of(lambda: again.spend(1))
    client.accept(moved).give_back()
    client.admin.grant(planted, unit="calls", amount=5, holder="dev")
    said.of(lambda: client.admin.grant(planted, unit="calls", amount=5))
    return _be_told(client, receiver, planted, said)


def _mistake(client: Client, text: str, said: Said) -> None:
    """A capability where a path belongs, and texts that are nearly one."""
    wrong = Capability.parse(text)
    wrong._secret = bytes(32)
    for ask in (client.open, client.recover, client.audit.budget):
        said.of(partial(ask, text))
    said.of(lambda: list(client.alerts.rules(text)))
    for nearly in (
        changed(text),
        text[:-1],
        text + "x",
        text.upper(),
        f"Bearer {text}",
        repr(text),
    ):
        said.of(partial(client.accept, nearly))
    said.of(lambda: client.accept(wrong))
    said.of(lambda: client.admin.freeze("sdk", f"found {text}"))
    said.of(lambda: client.admin.grant(text, unit="calls", amount=1))
    said.of(lambda: client.webhooks.create(f"https://receiver.example/{text}"))


def _mistake_keys(client: Client, key: ApiKey, said: Said) -> None:
    """A key where an id belongs, and in what is recorded."""
    text = key.reveal()
    for ask in (client.admin.keys.show, client.admin.keys.revoke):
        said.of(partial(ask, text))
    said.of(lambda: client.admin.keys.create(text))
    said.of(lambda: client.admin.keys.create("someone", label=text))
    said.of(lambda: client.admin.keys.revoke(key.key_id, f"{text} was found"))
    said.of(lambda: ApiKey.parse(changed(text)))
    client.admin.keys.rotate(key.key_id, overlap=60)
    client.admin.keys.revoke(key.key_id, "found in a repository")


def _be_told(client: Client, receiver: Receiver, planted: str, said: Said) -> list[str]:
    webhook = client.webhooks.create(receiver.url("status/200"), budget=planted)
    said.errors.append(repr(webhook).encode())
    client.alerts.create(planted, AlertKind.FREEZE)
    client.webhooks.test(webhook.webhook_id)
    client.admin.freeze(planted, "why")
    return [repr(receiver.next()) for _ in range(2)]


def refused_connections(target: str, key: str, folder: Path, said: Said) -> None:
    """Who is not let in."""
    pem = (folder / "client.key").read_text()
    tls = peculium.Tls.of_files(ca_file=str(folder / "ca.pem"))
    for wrong in (changed(key), f" {key}", key[:-1]):
        said.of(partial(peculium.connect, target, api_key=wrong, tls=tls))
    with peculium.connect(target, api_key=ApiKey.new().reveal(), tls=tls) as stranger:
        said.of(lambda: stranger.open("sdk"))
    said.of(lambda: peculium.connect("ledger.example:7415", api_key=key, tls=False))
    said.of(lambda: peculium.Tls.of_files(cert_file=str(folder / "client.crt"), key_file=pem))
    said.of(lambda: peculium.Tls(private_key=pem.encode()))


def run_commands(
    target: str, key: str, folder: Path, database: str, capability: str, planted: str
) -> list[str]:
    """What the command line says when secrets are in the wrong places, and when it crashes."""
    pem = (folder / "client.key").read_text()
    variables = {"PECULIUM_TLS_CA_FILE": str(folder / "ca.pem")}
    cli = Cli(target, PECULIUM_API_KEY=key, **variables)
    spoilt = database.replace("@", "%zz@", 1)
    said = []
    for arguments in (
        ("budget", "show", planted),
        ("tree", capability),
        ("keys", "revoke", key[:-1]),
        ("--tls-client-key-file", pem, "--tls-client-cert-file", pem, "tree"),
        ("migrate", "--database-url", spoilt),
        ("doctor", "--database-url", database),
    ):
        finished = cli.run(*arguments)
        said += [finished.out, finished.err]
    crashed = subprocess.run(
        [sys.executable, "-c", CRASH, "tree"],
        env={**os.environ, **variables, "PECULIUM_API_KEY": key},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" in crashed.stderr
    return [*said, crashed.stdout, crashed.stderr]
