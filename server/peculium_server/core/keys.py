"""API keys: a key is what was done to it. Making, rotating and revoking one are acts, which are kept for ever.

Pure, as all of the core: frozen values in, a decision out. Times are integers of microseconds. A key's secret
never gets here: who presents one is known by its digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Final

from peculium_server.core.limits import (
    ID_BYTES,
    KEY_DIGEST_BYTES,
    KEY_LABEL_BYTES_MAX,
    KEY_LIFETIME_US_MAX,
    KEY_LIFETIME_US_MIN,
    KEY_OVERLAP_US_MAX,
    KEY_ROOTS_MAX,
    PRINCIPAL_BYTES_MAX,
    REASON_BYTES_MAX,
    SECOND_US,
)
from peculium_server.core.operations import SYSTEM, Role
from peculium_server.core.refusals import Refusal, Refused, id_text, time_text
from peculium_server.core.shape import Problem, text_problem, uuid_problem

KEY_ROLES: Final = (Role.AGENT, Role.ADMIN, Role.AUDITOR)
"""The roles that somebody may have."""


class KeyActKind(IntEnum):
    """What can be done to a key. Numbers are stored, and those of the wire."""

    CREATE = 1
    ROTATE = 2
    REVOKE = 3


class KeyState(IntEnum):
    """What a key is good for. Numbers are those of the wire."""

    ACTIVE = 1
    EXPIRED = 2
    REVOKED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRequest:
    """What is asked to be done to a key; what a kind does not need is left as it is here."""

    kind: KeyActKind
    operation_id: bytes
    """Made by the client: the same request with the same id is done once."""
    key_id: bytes
    principal: str = ""
    """CREATE: who calls with it."""
    roles: tuple[Role, ...] = ()
    """CREATE: as what, in order of their numbers."""
    roots: tuple[bytes, ...] | None = None
    """CREATE: the trees that it is limited to, in order; None: all, also those to come."""
    label: str = ""
    """CREATE: what it is for, in its maker's words."""
    digest: bytes | None = None
    """CREATE, ROTATE: of the new secret."""
    lifetime_us: int | None = None
    """CREATE: until it expires; None: never. ROTATE: until it expires, from now; None: as before."""
    overlap_us: int | None = None
    """ROTATE: how long the secret before stays valid."""
    reason: str = ""
    """REVOKE: why."""


@dataclass(frozen=True, slots=True)
class KeyAct:
    """What was done to a key, when and by whom: never changed, never taken away."""

    number: int
    """1, 2, 3, … in the whole ledger, without a gap."""
    at: int
    by: str
    """The principal that did it; see `store.keys.OWNER` for the database's own users."""
    by_key: bytes | None
    """The key that the principal called with; None: by a certificate, a key of a file, or the database's owner."""
    asked: KeyRequest


@dataclass(frozen=True, slots=True)
class KeySecret:
    """One of the secrets that a key has, or had."""

    digest: bytes
    until: int | None = None
    """When it was replaced and its overlap is over; None: it is the current one."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key, as its acts have left it."""

    key_id: bytes
    principal: str
    roles: tuple[Role, ...]
    roots: tuple[bytes, ...] | None
    label: str
    secrets: tuple[KeySecret, ...]
    """The current one last."""
    expires_at: int | None
    revoked_at: int | None
    acts: tuple[KeyAct, ...]

    def state(self, now: int) -> KeyState:
        """What it is good for at a time."""
        if self.revoked_at is not None:
            return KeyState.REVOKED
        if self.expires_at is not None and self.expires_at <= now:
            return KeyState.EXPIRED
        return KeyState.ACTIVE

    def overlap_until(self, now: int) -> int | None:
        """Until when a secret from before the last rotation is valid; None if none is."""
        if self.state(now) is not KeyState.ACTIVE:
            return None
        ends = [secret.until for secret in self.secrets if secret.until is not None]
        last = max(ends, default=now)
        return last if last > now else None


def made(act: KeyAct) -> Key:
    """The key that an act has made."""
    asked = act.asked
    return Key(
        key_id=asked.key_id,
        principal=asked.principal,
        roles=asked.roles,
        roots=asked.roots,
        label=asked.label,
        secrets=(KeySecret(_digest(asked)),),
        expires_at=_end(act.at, asked.lifetime_us),
        revoked_at=None,
        acts=(act,),
    )


def changed(key: Key, act: KeyAct) -> Key:
    """The key as an act on it has left it."""
    asked = act.asked
    acts = (*key.acts, act)
    if asked.kind is KeyActKind.REVOKE:
        return replace(key, revoked_at=act.at, acts=acts)
    overlap_ends = act.at + (asked.overlap_us or 0)
    # A shorter overlap than one that runs still ends that one, too: whoever rotates twice means the second.
    replaced = tuple(
        replace(
            secret,
            until=overlap_ends if secret.until is None else min(secret.until, overlap_ends),
        )
        for secret in key.secrets
    )
    expires_at = key.expires_at if asked.lifetime_us is None else _end(act.at, asked.lifetime_us)
    secrets = (*replaced, KeySecret(_digest(asked)))
    return replace(key, secrets=secrets, expires_at=expires_at, acts=acts)


def fold(keys: dict[bytes, Key], acts: Iterable[KeyAct]) -> dict[bytes, Key]:
    """All keys, after more acts in order of their numbers.

    Raises:
        ValueError: They are no history of keys.
    """
    folded = dict(keys)
    for act in acts:
        key = folded.get(act.asked.key_id)
        if (key is None) is not (act.asked.kind is KeyActKind.CREATE):
            raise ValueError(f"act {act.number} of key {id_text(act.asked.key_id)} does not fit")
        folded[act.asked.key_id] = made(act) if key is None else changed(key, act)
    return folded


def decide(
    asked: KeyRequest,
    by: str,
    *,
    recorded: KeyAct | None,
    key: Key | None,
    digest_seen: bool,
    now: int,
) -> Key | Refused | None:
    """May this be done?

    Args:
        asked: What.
        by: By which principal.
        recorded: The act that has this operation id already.
        key: The key that is named, if there is one.
        digest_seen: Some key has or had the secret that is to be the new one.
        now: The time of the decision.

    Returns:
        None: yes. A key: it was done before; this is how it was left then. Otherwise why not.
    """
    if recorded is not None:
        return _replay(asked, by, recorded, key)
    if asked.kind is KeyActKind.CREATE:
        if key is not None:
            return Refused(Refusal.ID_TAKEN, {"field": "key_id", "key": id_text(asked.key_id)})
    elif key is None:
        return Refused(Refusal.KEY_UNKNOWN, {"key": id_text(asked.key_id)})
    # What has expired may be revoked all the same: whoever does so wants to be sure of it.
    elif key.revoked_at is not None or (
        asked.kind is KeyActKind.ROTATE and key.state(now) is KeyState.EXPIRED
    ):
        return Refused(Refusal.KEY_ENDED, _ended(key))
    if digest_seen:
        return Refused(Refusal.TOKEN_ID_REUSED, {"field": "digest", "key": id_text(asked.key_id)})
    return None


def _replay(asked: KeyRequest, by: str, recorded: KeyAct, key: Key | None) -> Key | Refused:
    differing = next(
        (
            field.name
            for field in fields(asked)
            if getattr(asked, field.name) != getattr(recorded.asked, field.name)
        ),
        None if by == recorded.by else "by",
    )
    if differing is not None:
        facts = {"operation": id_text(asked.operation_id), "field": differing}
        return Refused(Refusal.OPERATION_ID_REUSED, facts)
    assert key is not None
    then = [act for act in key.acts if act.number <= recorded.number]
    return fold({}, then)[key.key_id]


def _ended(key: Key) -> dict[str, str]:
    facts = {"key": id_text(key.key_id), "principal": key.principal}
    if key.revoked_at is not None:
        revocation = key.acts[-1]
        return facts | {"revoked_at": time_text(revocation.at), "revoked_by": revocation.by}
    assert key.expires_at is not None
    return facts | {"expired_at": time_text(key.expires_at)}


def _end(at: int, lifetime_us: int | None) -> int | None:
    return None if lifetime_us is None else at + lifetime_us


def _digest(asked: KeyRequest) -> bytes:
    if asked.digest is None:
        raise ValueError(f"an act on key {id_text(asked.key_id)} has no digest")
    return asked.digest


# -- Is a request well-formed? --------------------------------------------------------------------------


def check_key_request(asked: KeyRequest) -> Refused | None:
    """Refuse a malformed request; the first problem in the order of fields is told."""
    found = (
        uuid_problem("operation_id", asked.operation_id)
        or uuid_problem("key_id", asked.key_id)
        or _OWN[asked.kind](asked)
    )
    if found is None:
        return None
    field, problem = found
    return Refused(Refusal.MALFORMED, {"field": field, "problem": problem})


def principal_problem(principal: str) -> str | None:
    """What is wrong with the name of somebody who is to call."""
    found = text_problem("principal", principal, PRINCIPAL_BYTES_MAX, least=1)
    if found is not None:
        return found[1]
    if principal == SYSTEM.principal or principal.startswith(OWNER_PREFIX):
        return "is reserved"
    return None


OWNER_PREFIX: Final = "database:"
"""Begins the name under which a user of the database has acted directly on it."""


def _create(asked: KeyRequest) -> Problem | None:
    wrong = principal_problem(asked.principal)
    return (
        (None if wrong is None else ("principal", wrong))
        or _roles(asked.roles)
        or _roots(asked.roots)
        or text_problem("label", asked.label, KEY_LABEL_BYTES_MAX)
        or _new_digest(asked.digest)
        or _lifetime(asked.lifetime_us)
    )


def _rotate(asked: KeyRequest) -> Problem | None:
    overlap = asked.overlap_us
    if overlap is None or not 0 <= overlap <= KEY_OVERLAP_US_MAX:
        most = KEY_OVERLAP_US_MAX // SECOND_US
        return "overlap", f"must be said, and be 0 to {most} seconds"
    return _new_digest(asked.digest) or _lifetime(asked.lifetime_us)


def _revoke(asked: KeyRequest) -> Problem | None:
    return text_problem("reason", asked.reason, REASON_BYTES_MAX)


_OWN = {
    KeyActKind.CREATE: _create,
    KeyActKind.ROTATE: _rotate,
    KeyActKind.REVOKE: _revoke,
}


def _roles(roles: Sequence[Role]) -> Problem | None:
    if not roles:
        return "roles", "must be at least one of agent, admin, auditor"
    if any(role not in KEY_ROLES for role in roles):
        return "roles", "must be of agent, admin, auditor"
    if len(set(roles)) != len(roles):
        return "roles", "must not be said twice"
    return None


def _roots(roots: Sequence[bytes] | None) -> Problem | None:
    if roots is None:
        return None
    if not 1 <= len(roots) <= KEY_ROOTS_MAX:
        return "root_ids", f"must be 1 to {KEY_ROOTS_MAX}, or say all_roots"
    if any(len(root) != ID_BYTES for root in roots):
        return "root_ids", f"must be of {ID_BYTES} bytes each"
    if len(set(roots)) != len(roots):
        return "root_ids", "must not be said twice"
    return None


def _new_digest(digest: bytes | None) -> Problem | None:
    if digest is None or len(digest) != KEY_DIGEST_BYTES:
        return "digest", f"must be {KEY_DIGEST_BYTES} bytes"
    return None


def _lifetime(lifetime_us: int | None) -> Problem | None:
    if lifetime_us is not None and not KEY_LIFETIME_US_MIN <= lifetime_us <= KEY_LIFETIME_US_MAX:
        least, most = KEY_LIFETIME_US_MIN // SECOND_US, KEY_LIFETIME_US_MAX // SECOND_US
        return "lifetime", f"must be {least} to {most} seconds"
    return None
