"""A Prometheus of the test's own, as Debian has it: it comes to a server's page, and is asked by HTTP."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

ANSWER_SECONDS_MAX = 30
_POLL_SECONDS = 0.05

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs prometheus and promtool (apt-get install prometheus)",
)


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Prometheus:
    """The running program."""

    process: subprocess.Popen[str]
    port: int

    def get(self, path: str, **parameters: str) -> Any:
        """What its API answers; None while it does not."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS_MAX)
        try:
            connection.request("GET", f"/api/v1/{path}?{urlencode(parameters)}")
            answer = json.loads(connection.getresponse().read())
        except (OSError, ValueError):
            return None
        finally:
            connection.close()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> dict[tuple[str, ...], float]:
        """The values of an expression by those of its labels; nothing while it does not answer."""
        data = self.get("query", query=expression) or {"result": []}
        return {
            tuple(value for name, value in sorted(each["metric"].items())): float(each["value"][1])
            for each in data["result"]
        }

    def wait(self, found: Callable[[], Any]) -> Any:
        """What is found as soon as it is anything: it comes to servers in its own time, and tells nobody."""
        deadline = time.monotonic() + ANSWER_SECONDS_MAX
        while not (result := found()):
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(_POLL_SECONDS)
        return result


@contextmanager
def scraping(target: str, rules: Path, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that comes to one page several times a second, and evaluates rules as often."""
    config = folder / "prometheus.json"
    often = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}
    config.write_text(
        json.dumps(
            {
                "global": often,
                "rule_files": [str(rules)],
                "scrape_configs": [
                    {"job_name": "peculium", "static_configs": [{"targets": [target]}]}
                ],
            }
        )
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
        "--enable-feature=exemplar-storage",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield Prometheus(process, port)
        finally:
            process.terminate()
