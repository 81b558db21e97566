"""API keys on the wire: making, listing, rotating and revoking them."""

from __future__ import annotations

from typing import TypeVar

from peculium.v1 import admin_service_pb2 as admin
from peculium_server.core.keys import Key, KeyActKind, KeyRequest, check_key_request
from peculium_server.core.limits import ID_BYTES
from peculium_server.core.operations import Role
from peculium_server.core.refusals import Refused
from peculium_server.identity import Identities
from peculium_server.rpc.calls import CALL, CallRefused, actor
from peculium_server.rpc.pages import fitting, page_token, read_page
from peculium_server.rpc.requests import read_duration
from peculium_server.rpc.responses import write_time
from peculium_server.store.store import Store

Response = TypeVar(
    "Response", admin.CreateKeyResponse, admin.RotateKeyResponse, admin.RevokeKeyResponse
)

_WIRE_ROLES = {
    admin.ROLE_AGENT: Role.AGENT,
    admin.ROLE_ADMIN: Role.ADMIN,
    admin.ROLE_AUDITOR: Role.AUDITOR,
}


class Keyring:
    """Answers about API keys."""

    def __init__(self, store: Store, identities: Identities) -> None:
        self._store = store
        self._identities = identities

    async def create(self, request: admin.CreateKeyRequest) -> admin.CreateKeyResponse:
        """Make a key.

        Raises:
            CallRefused: MALFORMED; OPERATION_ID_REUSED; ID_TAKEN; TOKEN_ID_REUSED.
        """
        if request.all_roots == bool(request.root_ids):
            raise CallRefused.malformed("root_ids", "must be said, or else all_roots")
        unknown = [role for role in request.roles if role not in _WIRE_ROLES]
        if unknown:
            raise CallRefused.malformed("roles", "must be of agent, admin, auditor")
        asked = KeyRequest(
            kind=KeyActKind.CREATE,
            operation_id=request.operation_id,
            key_id=request.key_id,
            principal=request.principal,
            roles=tuple(sorted(_WIRE_ROLES[role] for role in request.roles)),
            roots=None if request.all_roots else tuple(sorted(request.root_ids)),
            label=request.label,
            digest=request.digest,
            lifetime_us=read_duration(request, "lifetime"),
        )
        return await self._do(asked, admin.CreateKeyResponse())

    async def rotate(self, request: admin.RotateKeyRequest) -> admin.RotateKeyResponse:
        """Give a key a new text.

        Raises:
            CallRefused: MALFORMED; KEY_UNKNOWN; OPERATION_ID_REUSED; TOKEN_ID_REUSED; KEY_ENDED.
        """
        asked = KeyRequest(
            kind=KeyActKind.ROTATE,
            operation_id=request.operation_id,
            key_id=request.key_id,
            digest=request.digest,
            overlap_us=read_duration(request, "overlap"),
            lifetime_us=read_duration(request, "lifetime"),
        )
        return await self._do(asked, admin.RotateKeyResponse())

    async def revoke(self, request: admin.RevokeKeyRequest) -> admin.RevokeKeyResponse:
        """End a key: on this server from the answer on.

        Raises:
            CallRefused: MALFORMED; KEY_UNKNOWN; OPERATION_ID_REUSED; KEY_ENDED.
        """
        asked = KeyRequest(
            kind=KeyActKind.REVOKE,
            operation_id=request.operation_id,
            key_id=request.key_id,
            reason=request.reason,
        )
        return await self._do(asked, admin.RevokeKeyResponse())

    async def listed(self, request: admin.ListKeysRequest) -> admin.ListKeysResponse:
        """A page of the keys.

        Raises:
            CallRefused: MALFORMED.
        """
        if request.key_id and len(request.key_id) != ID_BYTES:
            raise CallRefused.malformed("key_id", f"must be {ID_BYTES} bytes")
        scope = b"keys" + request.key_id + request.principal.encode()
        asked = read_page(scope, request.page_size, request.page_token)
        await self._identities.refresh()
        now = self._identities.now()
        found = [
            _written(key, now, admin.ApiKey())
            for key in self._identities.keys
            if (asked.after is None or key.key_id > asked.after)
            and request.principal in ("", key.principal)
            and request.key_id in (b"", key.key_id)
        ]
        page = fitting(found[: asked.size], admin.ApiKey.ByteSize)
        last = page[-1].key_id if len(page) < len(found) else None
        return admin.ListKeysResponse(keys=page, next_page_token=page_token(scope, last))

    async def _do(self, asked: KeyRequest, response: Response) -> Response:
        wrong = check_key_request(asked)
        if wrong is not None:
            raise CallRefused(wrong)
        done = await self._store.keys.do(asked, actor().principal, CALL.get().key_id)
        if isinstance(done, Refused):
            raise CallRefused(done)
        # Before it is told that it is so, it is so here.
        await self._identities.refresh()
        _written(done.key, done.now, response.key)
        response.replayed = done.replayed
        return response


def _written(key: Key, now: int, message: admin.ApiKey) -> admin.ApiKey:
    """Write a key, without its digests."""
    message.key_id = key.key_id
    message.principal = key.principal
    message.roles.extend(wire for wire, role in _WIRE_ROLES.items() if role in key.roles)
    message.all_roots = key.roots is None
    message.root_ids.extend(key.roots or ())
    message.label = key.label
    message.state = key.state(now)  # type: ignore[assignment]
    if key.expires_at is not None:
        write_time(key.expires_at, message.expires_at)
    overlap_until = key.overlap_until(now)
    if overlap_until is not None:
        write_time(overlap_until, message.overlap_until)
    for act in key.acts:
        told = message.acts.add(
            kind=act.asked.kind,
            operation_id=act.asked.operation_id,
            by=act.by,
            by_key=act.by_key or b"",
            reason=act.asked.reason,
        )
        write_time(act.at, told.at)
    return message
