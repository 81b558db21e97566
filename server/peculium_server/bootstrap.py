"""The first key of a ledger, straight to its database: nobody could ask a server for it."""

from __future__ import annotations

from typing import Final

from peculium_server.core.keys import KeyActKind, KeyRequest, check_key_request
from peculium_server.core.operations import Role
from peculium_server.core.refusals import Refused
from peculium_server.store.store import Store

LABEL: Final = "bootstrap"


class BootstrapRefused(Exception):
    """The key was not made; says why."""


async def add_admin(
    dsn: str, key_id: bytes, digest: bytes, principal: str, lifetime_us: int | None
) -> None:
    """Make an admin's key.

    Args:
        dsn: The ledger's database.
        key_id: Of the new key, a UUIDv7. The request has the same id: there is no other for this key.
        digest: Of its text.
        principal: Who is to call with it.
        lifetime_us: How long it is valid, in microseconds; None: until it is revoked.

    Raises:
        BootstrapRefused: Something is wrong with what is asked.
        StoreError: The database cannot be used.
    """
    asked = KeyRequest(
        kind=KeyActKind.CREATE,
        operation_id=key_id,
        key_id=key_id,
        principal=principal,
        roles=(Role.ADMIN,),
        label=LABEL,
        digest=digest,
        lifetime_us=lifetime_us,
    )
    refused = check_key_request(asked)
    if refused is None:
        # Whether it is durable, the servers look at.
        store = await Store.open(dsn, unsafe_settings_allowed=True)
        try:
            done = await store.keys.do(asked)
        finally:
            await store.close()
        refused = done if isinstance(done, Refused) else None
    if refused is not None:
        raise BootstrapRefused(refused.message)
