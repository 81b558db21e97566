"""A receiver of webhooks, as a program: it answers as the path says, and writes down what it was sent."""

from __future__ import annotations

import contextlib
import json
import select
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAIT_SECONDS_MAX = 30


class Handler(BaseHTTPRequestHandler):
    """Answers /status/NUMBER so, /redirect with another address, /slow never, and others in odd ways."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        told = {
            "path": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "body": body.decode(),
            "sni": getattr(self.server, "sni", None),
        }
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        what, _, argument = self.path.partition("?")[0].removeprefix("/").partition("/")
        match what:
            case "slow":
                self.rfile.read(1)
            case "redirect":
                self._answer(302, location=f"http://{self.headers['host']}/status/200")
            case "early":
                self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n")
                self._answer(200)
            case "long":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000)
            case "nonsense":
                self.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n")
            case "endless":
                self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n")
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(bytes(65_536))
            case "nothing":
                pass
            case _:
                self._answer(int(argument))
        self.close_connection = True

    def _answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main(certificate: str) -> None:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)

        def note(_: object, name: str, __: object) -> None:
            server.sni = name

        context.sni_callback = note
        server.socket = context.wrap_socket(server.socket, server_side=True)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


@dataclass
class Receiver:
    """The running program."""

    process: subprocess.Popen[str]
    port: int

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}/{path}"

    def next(self) -> dict[str, Any]:
        """What it was sent next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the receiver has ended"
        told: dict[str, Any] = json.loads(line)
        return told

    def has_more(self) -> bool:
        """Whether it was sent anything else by now."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], 0)
        return bool(readable)


@contextlib.contextmanager
def receiving(certificate: str = "") -> Iterator[Receiver]:
    """Start a receiver, with TLS if it has a certificate."""
    command = [sys.executable, "-m", "tests.alerts.receiver", certificate]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        assert process.stdout is not None
        yield Receiver(process, int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


if __name__ == "__main__":
    main(sys.argv[1])
