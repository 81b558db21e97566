"""What a client writes down, if anything, before it sends and after it is answered."""

from __future__ import annotations

from peculium._requests import Operation
from peculium.v1 import types_pb2

Subject = tuple[bytes, bytes, bytes]
"""Whose token it is: root id, budget id and, of a hold, its id; otherwise nothing."""


def subject_of(operation: Operation) -> Subject:
    """Whose token an operation presents and renews."""
    of_hold = operation.kind in {"settle", "release", "extend"}
    return operation.root_id, operation.budget_id, operation.hold_id if of_hold else b""


class Recorder:
    """Writes nothing down. A journal does."""

    durable = False
    """Whether there is anything to flush."""

    def sending(self, name: str, operation: Operation, /, *, secret: bytes | None) -> None:
        """An operation is about to be sent; the secret is the one that its line has now, if any."""

    def accepted(
        self,
        name: str,
        operation: Operation,
        outcome: types_pb2.Outcome,
        /,
        *,
        secret: bytes | None,
        alone: bool,
    ) -> None:
        """It happened: this is the secret that its line has now; `alone`: nothing refused may win late."""

    def refused(self, operation: Operation) -> None:
        """It was refused, and a duplicate may win late."""

    def ended(self, operation: Operation) -> None:
        """It did not happen, and never will."""

    def outrun(self, operation: Operation) -> None:
        """Its token is another's: nothing that was refused for it may win late."""

    def keep(self, subject: Subject, secret: bytes, name: str, *, capability: bool) -> None:
        """A token is in a handle here, or in a capability that was not handed over yet."""

    def leave(self, subject: Subject, secret: bytes) -> None:
        """A token leaves this process now.

        Raises:
            OSError: It cannot be written.
        """

    def flush(self) -> None:
        """Return when everything that was said is on the disk.

        Raises:
            OSError: It cannot be written.
        """

    def close(self) -> None:
        """Nothing more is said."""
