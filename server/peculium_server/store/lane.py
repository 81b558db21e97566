"""The one way to change the ledger: a transaction on a lane that loads, decides and saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from peculium_server.core.footprint import Footprint
from peculium_server.core.state import Accepted, Tree


class Loaded(NamedTuple):
    """What the ledger knows of the rows that were named, at one instant."""

    trees: dict[bytes, Tree]
    """By root id: one for each footprint."""
    now: int
    """The database's clock, read after everything else. Microseconds since the Unix epoch."""
    position: int
    """Operations committed in the lane so far."""


class LaneWriter:
    """Commits to one lane, a batch at a time; a second `run` waits for the first."""

    async def run(
        self,
        footprints: Mapping[bytes, Footprint],
        decide: Callable[[Loaded], Sequence[Accepted]],
        deadline: float | None,
    ) -> int:
        """Load what the footprints name, decide, and save what was accepted, as one transaction.

        Args:
            footprints: By root id; all roots belong to this lane.
            decide: Pure. Called again, with everything loaded anew, if the transaction has to be
                repeated; operations of a run whose commit was in doubt are then found as recorded.
            deadline: On the event loop's clock; None: no other bound than the number of retries.

        Returns:
            The lane's position afterwards.

        Raises:
            StoreUnavailable: The database could not be reached, or not in time; says whether
                something may have been saved.
            StoreContended: Aborted in favour of other writers too often; nothing was saved.
            LedgerCorrupt: Rows contradict each other; nothing was saved.
        """
        raise NotImplementedError
