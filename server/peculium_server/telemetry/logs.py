"""The server's log: lines for people, or one JSON object per line for machines.

Lines are written by a thread of their own, some at a time: whoever reads the error stream slowly, or not at
all, never holds up a call. What cannot be kept any more is dropped, and the log says how much that was.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from opentelemetry import trace

FACTS: Final = "peculium_facts"
"""The attribute of a record that has its facts, by name."""
LINES_MAX: Final = 10_000
"""That wait to be written."""
FLUSH_SECONDS: Final = 0.2

_WARNING: Final = "WARNING: "


class _Writer(logging.Handler):
    """Keeps formatted lines, and has a thread write them."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._wanted = threading.Event()
        self._writing = threading.Lock()
        self._over = False
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's line, or count it if too many wait."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - as of any handler: what is logged never fails
            self.handleError(record)
            return
        if len(self._lines) >= LINES_MAX:
            self._dropped += 1
            return
        self._lines.append(line)
        if self._thread is None:
            self._begin()
        if record.levelno >= logging.WARNING:
            # It may be the last that is ever said.
            self._wanted.set()

    def _begin(self) -> None:
        """Start the thread; not before the first line, since who has threads cannot be forked any more."""
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Write what waits."""
        with self._writing:
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            dropped, self._dropped = self._dropped, 0
            if dropped:
                lines.append(self.format(_dropped(dropped)))
            if lines:
                self._stream.write("\n".join(lines) + "\n")
                self._stream.flush()

    def close(self) -> None:
        """Write what waits, and nothing more."""
        self._over = True
        self._wanted.set()
        self.flush()
        super().close()

    def _run(self) -> None:
        while not self._over:
            self._wanted.wait(FLUSH_SECONDS)
            self._wanted.clear()
            try:
                self.flush()
            except (OSError, ValueError):
                # Nobody reads the stream any more, or it is closed.
                return


class TextFormatter(logging.Formatter):
    """A line for people: what is said, and the facts behind it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """One line, and more if there is a traceback."""
        line = super().format(record)
        facts = getattr(record, FACTS, None)
        if not facts:
            return line
        return f"{line} {' '.join(f'{name}={value}' for name, value in facts.items())}"


class JsonFormatter(logging.Formatter):
    """A JSON object for machines, with the span that the event belongs to."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever there is to be said."""
        at = datetime.fromtimestamp(record.created, UTC)
        said: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            said["trace_id"] = f"{context.trace_id:032x}"
            said["span_id"] = f"{context.span_id:016x}"
        said |= getattr(record, FACTS, None) or {}
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


@contextmanager
def written(format_: str, level: str) -> Iterator[None]:
    """Have everything that is logged written to the error stream, the last of it at the end of the block.

    Args:
        format_: "text" or "json".
        level: "debug", "info", "warning" or "error": what is less important is not logged.
    """
    writer = _Writer(sys.stderr)
    writer.setFormatter(JsonFormatter() if format_ == "json" else TextFormatter())
    logging.basicConfig(handlers=[writer], level=level.upper(), force=True)
    # Those of libraries that tell every step are for whoever debugs them.
    for name in ("grpc", "asyncio", "opentelemetry", "alembic"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    try:
        yield
    finally:
        writer.close()


def tell(line: str) -> None:
    """Log a step of starting or stopping, whatever the level: as the server tells it to people otherwise."""
    level = logging.WARNING if line.startswith(_WARNING) else logging.INFO
    record = logging.LogRecord(
        "peculium_server", level, __file__, 0, line.removeprefix(_WARNING).strip(), (), None
    )
    logging.getLogger().handle(record)


def _dropped(number: int) -> logging.LogRecord:
    message = "%d lines were not logged: nobody read the log fast enough"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, (number,), None)
