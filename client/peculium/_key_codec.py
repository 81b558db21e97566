"""Requests about API keys, checked so that a mistake costs no call, and what the ledger answers to them."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration

from peculium import _codec as codec, _limits as limits
from peculium._ids import id_bytes, id_text, new_id
from peculium._requests import duration, malformed, text
from peculium.apikeys import ApiKey, KeyAct, KeyInfo, KeyState, Role
from peculium.capability import BudgetRef
from peculium.v1 import admin_service_pb2 as admin
from peculium.values import Seconds

_ROLES = {
    Role.AGENT: admin.ROLE_AGENT,
    Role.ADMIN: admin.ROLE_ADMIN,
    Role.AUDITOR: admin.ROLE_AUDITOR,
}
_KIND_PREFIX = "KEY_ACT_KIND_"


def create(
    key: ApiKey,
    principal: str,
    roles: Sequence[Role],
    roots: Sequence[BudgetRef | bytes] | None,
    label: str,
    lifetime: Seconds | None,
) -> admin.CreateKeyRequest:
    """Make a key with a text that was made here."""
    if not roles:
        raise malformed("roles", "must be at least one")
    if roots is not None and not 1 <= len(roots) <= limits.KEY_ROOTS_MAX:
        raise malformed("roots", f"must be 1 to {limits.KEY_ROOTS_MAX}, or None for all")
    return admin.CreateKeyRequest(
        operation_id=new_id(),
        key_id=key.key_id,
        principal=text("principal", principal, limits.PRINCIPAL_BYTES_MAX, least=1),
        roles=[_ROLES[role] for role in roles],
        all_roots=roots is None,
        root_ids=[_root(root) for root in roots or ()],
        label=text("label", label, limits.KEY_LABEL_BYTES_MAX),
        digest=key.digest,
        lifetime=_lifetime(lifetime),
    )


def rotate(key: ApiKey, overlap: Seconds, lifetime: Seconds | None) -> admin.RotateKeyRequest:
    """Give a key a text that was made here."""
    return admin.RotateKeyRequest(
        operation_id=new_id(),
        key_id=key.key_id,
        digest=key.digest,
        overlap=duration("overlap", overlap, 0, limits.KEY_OVERLAP_US_MAX),
        lifetime=_lifetime(lifetime),
    )


def revoke(key_id: str | bytes, reason: str) -> admin.RevokeKeyRequest:
    """End a key."""
    return admin.RevokeKeyRequest(
        operation_id=new_id(),
        key_id=id_of(key_id),
        reason=text("reason", reason, limits.REASON_BYTES_MAX),
    )


def listed(
    principal: str | None, key_id: str | bytes | None, page_size: int
) -> admin.ListKeysRequest:
    """Ask for keys."""
    return admin.ListKeysRequest(
        principal=principal or "",
        key_id=b"" if key_id is None else id_of(key_id),
        page_size=page_size,
    )


def id_of(key_id: str | bytes) -> bytes:
    """The id of a key, as it is or as its text."""
    found = key_id if isinstance(key_id, bytes) else id_bytes(key_id)
    if found is None or len(found) != limits.ID_BYTES:
        raise malformed("key_id", "must be the id of an API key")
    return found


def _root(root: BudgetRef | bytes) -> bytes:
    if isinstance(root, bytes):
        return root
    if root.budget_id != root.root_id:
        raise malformed("roots", f"must be roots, and {root} is none")
    return root.root_id


def _lifetime(lifetime: Seconds | None) -> Duration | None:
    return duration("lifetime", lifetime, limits.KEY_LIFETIME_US_MIN, limits.KEY_LIFETIME_US_MAX)


def info(message: admin.ApiKey) -> KeyInfo:
    """A key."""
    return KeyInfo(
        key_id=id_text(message.key_id),
        principal=message.principal,
        roles=tuple(Role(role) for role in message.roles),
        roots=None if message.all_roots else tuple(message.root_ids),
        label=message.label,
        state=KeyState(message.state),
        expires_at=codec.at(message.expires_at) if message.HasField("expires_at") else None,
        overlap_until=(
            codec.at(message.overlap_until) if message.HasField("overlap_until") else None
        ),
        acts=tuple(_act(act) for act in message.acts),
    )


def _act(message: admin.KeyAct) -> KeyAct:
    return KeyAct(
        kind=admin.KeyActKind.Name(message.kind).removeprefix(_KIND_PREFIX),
        at=codec.at(message.at),
        by=message.by,
        by_key=id_text(message.by_key) if message.by_key else None,
        operation_id=id_text(message.operation_id),
        reason=message.reason,
    )
