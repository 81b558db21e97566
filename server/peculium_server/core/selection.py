"""Which entries somebody wants to see: those for which everything holds that is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from peculium_server.core import cbor
from peculium_server.core.encoding import REQUEST_KEYS
from peculium_server.core.operations import Kind, Labels
from peculium_server.core.state import Entry

_LABELS: Final = REQUEST_KEYS["labels"]
_REFERENCE: Final = REQUEST_KEYS["reference"]


class Period(NamedTuple):
    """A time: decided from the first instant on, and before the last. Microseconds since the epoch."""

    since: int | None = None
    """None: from the beginning."""
    until: int | None = None
    """None: without end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is said of an entry and of its operation; nothing selects all."""

    kinds: frozenset[Kind] = frozenset()
    """Of any of these kinds."""
    principals: frozenset[str] = frozenset()
    """By any of these."""
    operation_id: bytes | None = None
    trace_id: bytes | None = None
    labels: Labels = ()
    """Whose operation has all of these."""
    hold_id: bytes | None = None
    """That tell of this hold."""
    reference: str = ""

    def selects(self, entry: Entry, request: bytes | None) -> bool:
        """Say whether an entry is wanted.

        Args:
            entry: Any part of an operation.
            request: The operation as recorded, in its part 0.

        Raises:
            ValueError: The request is not as the ledger records it.
        """
        hold = entry.effect.hold
        return (
            (not self.kinds or entry.kind in self.kinds)
            and (not self.principals or entry.principal in self.principals)
            and self.operation_id in (None, entry.operation_id)
            and self.trace_id in (None, entry.trace_id)
            and (self.hold_id is None or (hold is not None and hold.hold_id == self.hold_id))
            and (not (self.labels or self.reference) or self._is_asked(request))
        )

    def _is_asked(self, request: bytes | None) -> bool:
        said: Any = None if request is None else cbor.read(request)
        if not isinstance(said, dict):
            raise ValueError("an operation is a map, in part 0 of its entries")  # noqa: TRY004 - of bytes
        labels: Any = said.get(_LABELS, {})
        return set(self.labels) <= labels.items() and self.reference in ("", said.get(_REFERENCE))
