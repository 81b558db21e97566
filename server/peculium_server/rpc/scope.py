"""The trees that a caller is limited to: the only place where that is decided.

A caller without limits is told what there is. One with limits is told the same of every tree that is not one of
its own, whether it exists or not.
"""

from __future__ import annotations

from peculium_server.core.limits import ID_BYTES
from peculium_server.core.refusals import Refusal, Refused, id_text
from peculium_server.rpc.calls import CALL, CallRefused, actor

_ONE = "a key for this root"
_ALL = "a key for all roots"


def roots() -> frozenset[bytes] | None:
    """The trees that the caller of the call that is being served is limited to; None: all."""
    return CALL.get().roots


def outside(root_id: bytes) -> Refused | None:
    """Why the caller may not act on a tree; None: it may."""
    limited = roots()
    if limited is None or root_id in limited:
        return None
    return _refused(id_text(root_id) if len(root_id) == ID_BYTES else "", _ONE)


def check_root(root_id: bytes | None, said: str) -> None:
    """Make sure that the caller may see a tree.

    Args:
        root_id: Which; None: there is none.
        said: How the caller has named it.

    Raises:
        CallRefused: PERMISSION_DENIED.
    """
    limited = roots()
    if limited is not None and root_id not in limited:
        raise CallRefused(_refused(said, _ONE))


def check_all_roots() -> None:
    """Make sure that the caller may see all trees, also those to come.

    Raises:
        CallRefused: PERMISSION_DENIED.
    """
    if roots() is not None:
        raise CallRefused(_refused("", _ALL))


def _refused(root: str, needs: str) -> Refused:
    facts = {"principal": actor().principal, **({"root": root} if root else {}), "needs": needs}
    return Refused(Refusal.PERMISSION_DENIED, facts)
