"""The page that Prometheus comes for, as whoever asks for it reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from http.client import HTTPConnection

from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.server import RunningServer

OPENMETRICS = "application/openmetrics-text"
_AT = re.compile(r"metrics are told at http://(\S+)/metrics")


def page_of(server: RunningServer) -> str:
    """Where a server's page is, as host:port."""
    [address] = [found[1] for line in server.said if (found := _AT.search(line))]
    return address


def ask(address: str, path: str = "/metrics", accept: str = OPENMETRICS) -> tuple[int, str, str]:
    """The status, the type and the text of an answer."""
    connection = HTTPConnection(address, timeout=30)
    try:
        connection.request("GET", path, headers={"Accept": accept})
        answer = connection.getresponse()
        return answer.status, answer.headers["content-type"], answer.read().decode()
    finally:
        connection.close()


def families(address: str) -> Iterator[Metric]:
    """What the page tells."""
    status, kind, text = ask(address)
    assert status == 200
    assert kind.startswith(OPENMETRICS)
    yield from text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
