"""What a server is made of that nobody is to see: its files with secrets, its process, and what surrounds both."""

from __future__ import annotations

import contextlib
import json
import resource
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from peculium import ApiKey
from peculium._limits import SECRET_BYTES
from peculium_server.signing import SigningKey
from peculium_server.webhooks.keys import WebhookKeys
from tests.certificates import Authority, Pair
from tests.leaks.marks import Marks
from tests.server import Process
from tests.telemetry.receiver import Receiver

OBSERVED = Path(__file__).with_name("observed.py")
NOT_SECRET = {"_renew"}
"""Draws the salt of a journal, which is in the file for all to see."""


@contextmanager
def recorded(marks: Marks) -> Iterator[None]:
    """Remember every secret that this process makes: nothing else draws so many bytes at once."""
    draw = secrets.token_bytes

    def drawn(size: int | None = None) -> bytes:
        made = draw(size)
        if size is not None and size >= SECRET_BYTES:
            by, above = sys._getframe(1), sys._getframe(2)
            if by.f_code.co_name not in NOT_SECRET:
                marks.add(f"{len(marks)}: {by.f_code.co_name} of {above.f_code.co_name}", made)
        return made

    with mock.patch.object(secrets, "token_bytes", drawn):
        yield


class Backstage:
    """Files with secrets, and what keeps running."""

    def __init__(self, folder: Path, marks: Marks, planted: str) -> None:
        """Make everything in a folder; the second key is of a principal with the planted name."""
        self.folder = folder
        authority = Authority()
        (folder / "ca.pem").write_bytes(authority.pem)
        self._pair(authority.server(), "tls", marks)
        self._pair(authority.client("spiffe://example.org/agent"), "client", marks)
        SigningKey.make(folder / "signing.pem")
        signing = _private(folder / "signing.pem")
        marks.add("signing key", signing.private_bytes_raw())
        # The drawing of it is recorded.
        WebhookKeys.make(folder / "webhook-key")
        self.key, self.other = ApiKey.new(), ApiKey.new()
        (folder / "keys.toml").write_text(
            "".join(
                f'[[keys]]\nprincipal = "{principal}"\nrole = "admin"\nsha256 = "{key.digest.hex()}"\n'
                for principal, key in (("dev", self.key), (planted, self.other))
            )
            + '[[certificates]]\nspiffe = "spiffe://example.org/agent"\nrole = "agent"\n'
        )

    def _pair(self, pair: Pair, name: str, marks: Marks) -> None:
        _, key = pair.write(self.folder, name)
        private = _private(key)
        assert isinstance(private, EllipticCurvePrivateKey)
        marks.add(f"{name} key", private.private_numbers().private_value.to_bytes(32))

    @property
    def flags(self) -> tuple[str, ...]:
        """The server's settings; its database is in the environment, as it should be."""
        of = {
            "keys-file": "keys.toml",
            "tls-cert-file": "tls.crt",
            "tls-key-file": "tls.key",
            "tls-client-ca-file": "ca.pem",
            "signing-key-file": "signing.pem",
            "webhook-key-file": "webhook-key",
        }
        files = [
            part for name, file in of.items() for part in (f"--{name}", str(self.folder / file))
        ]
        told = ("--log-level", "debug", "--log-format", "json")
        often = ("--seal-seconds", "1", "--alert-seconds", "1")
        return (*files, "--tls-client-listen", "127.0.0.1:0", "--webhook-loopback", *told, *often)

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        """Of whoever trusts the server."""
        return grpc.ssl_channel_credentials((self.folder / "ca.pem").read_bytes())

    @property
    def with_certificate(self) -> str:
        """Where clients with certificates are served."""
        [ready] = self.folder.glob("ready-*.json")
        address: str = json.loads(ready.read_text())["listening_with_certificate"]
        return address


def _private(path: Path) -> Any:
    return serialization.load_pem_private_key(path.read_bytes(), None)


class Observed:
    """Starts the server with its observer, and asks that."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def launch(
        self, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> AbstractContextManager[Process]:
        """Start it."""
        self.process = subprocess.Popen(
            [sys.executable, str(OBSERVED), *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    def ask(self, file: Path) -> bytes:
        """What the server's objects say of themselves just now."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{file}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "observed\n"
        return file.read_bytes()

    def rest(self) -> bytes:
        """What else it has written to standard output."""
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout.read().encode()


@contextmanager
def core_dumps() -> Iterator[None]:
    """What is started meanwhile would leave them behind, unless it sees to that itself."""
    before, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (before, most))


@contextmanager
def traced(collector: Receiver) -> Iterator[None]:
    """The SDK's spans go to the same collector."""
    provider = TracerProvider()
    exporter = OTLPSpanExporter(endpoint=f"http://{collector.address}", insecure=True)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # A process can be given a provider only once, so it is lent one.
    with mock.patch.object(trace, "get_tracer_provider", return_value=provider):
        yield
    provider.shutdown()


def files_in(folder: Path) -> Iterable[bytes]:
    """Everything in a cluster: tables, indexes, the write-ahead log."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.read_bytes()


def free_port() -> int:
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
