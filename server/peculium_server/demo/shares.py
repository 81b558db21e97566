"""How much to hand out at a time: the one rule of the coordinator and the workers' treasuries."""

from __future__ import annotations

from typing import Final

REQUESTS_LEAST: Final = 6
"""For about so many requests a share lasts while there is enough: making one and taking it back
takes about as long as two requests."""


def share(there: int, parts: int, need: int) -> int:
    """What somebody gets who needs `need`, out of what is there, which is at least that.

    One of `parts` equal parts, so that shares shrink with what there is and nobody sits on much when
    the money runs out; but, near the end, not so little that all time goes into sharing.
    """
    return max(there // parts, min(there, need * REQUESTS_LEAST))
