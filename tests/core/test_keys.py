"""What may be done to an API key, and what becomes of it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from peculium_server.core.keys import (
    Key,
    KeyAct,
    KeyActKind,
    KeyRequest,
    KeyState,
    check_key_request,
    decide,
    fold,
)
from peculium_server.core.limits import KEY_ROOTS_MAX, SECOND_US
from peculium_server.core.operations import Role
from peculium_server.core.refusals import Refusal, Refused

NOW = 1_800_000_000 * SECOND_US
HOUR = 3_600 * SECOND_US


def id_of(number: int) -> bytes:
    return (number << 80 | 7 << 76 | 2 << 62).to_bytes(16)


def digest_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


CREATE = KeyRequest(
    kind=KeyActKind.CREATE,
    operation_id=id_of(1),
    key_id=id_of(2),
    principal="svc",
    roles=(Role.AGENT,),
    roots=(id_of(3), id_of(4)),
    label="for the gateway",
    digest=digest_of("first"),
    lifetime_us=24 * HOUR,
)
ROTATE = KeyRequest(
    kind=KeyActKind.ROTATE,
    operation_id=id_of(5),
    key_id=id_of(2),
    digest=digest_of("second"),
    overlap_us=HOUR,
)
REVOKE = KeyRequest(
    kind=KeyActKind.REVOKE, operation_id=id_of(6), key_id=id_of(2), reason="it leaked"
)


class Keyring:
    """Acts on keys, as the ledger would decide them."""

    def __init__(self) -> None:
        self.acts: list[KeyAct] = []

    def ask(self, asked: KeyRequest, at: int = NOW, by: str = "ops") -> Key | Refused | None:
        decision = decide(
            asked,
            by,
            recorded=next(
                (act for act in self.acts if act.asked.operation_id == asked.operation_id), None
            ),
            key=self.keys.get(asked.key_id),
            digest_seen=any(
                act.asked.digest == asked.digest for act in self.acts if act.asked.digest
            ),
            now=at,
        )
        if decision is None:
            self.acts.append(KeyAct(len(self.acts) + 1, at, by, None, asked))
        return decision

    @property
    def keys(self) -> dict[bytes, Key]:
        return fold({}, self.acts)

    @property
    def key(self) -> Key:
        [key] = self.keys.values()
        return key


@pytest.fixture
def ring() -> Keyring:
    ring = Keyring()
    assert ring.ask(CREATE) is None
    return ring


def refused(ring: Keyring, asked: KeyRequest, **options: Any) -> tuple[Refusal, dict[str, str]]:
    decision = ring.ask(asked, **options)
    assert isinstance(decision, Refused)
    return decision.reason, decision.facts


def test_a_key_is_what_was_asked_for(ring: Keyring) -> None:
    key = ring.key
    assert (key.principal, key.roles, key.roots, key.label) == (
        "svc",
        (Role.AGENT,),
        (id_of(3), id_of(4)),
        "for the gateway",
    )
    assert [secret.digest for secret in key.secrets] == [CREATE.digest]
    assert key.overlap_until(NOW) is None


def test_it_expires_at_that_very_time_and_not_before(ring: Keyring) -> None:
    assert ring.key.state(NOW + 24 * HOUR - 1) is KeyState.ACTIVE
    assert ring.key.state(NOW + 24 * HOUR) is KeyState.EXPIRED


def test_rotated_it_has_the_old_text_until_the_overlap_is_over(ring: Keyring) -> None:
    assert ring.ask(ROTATE, NOW + 5) is None
    assert [(secret.digest, secret.until) for secret in ring.key.secrets] == [
        (CREATE.digest, NOW + 5 + HOUR),
        (ROTATE.digest, None),
    ]
    assert ring.key.overlap_until(NOW + 5) == NOW + 5 + HOUR
    assert ring.key.overlap_until(NOW + 5 + HOUR) is None
    # The key's own end is as it was.
    assert ring.key.expires_at == NOW + 24 * HOUR


def test_rotated_again_no_text_lives_longer_than_the_second_overlap(ring: Keyring) -> None:
    ring.ask(ROTATE)
    again = replace(ROTATE, operation_id=id_of(7), digest=digest_of("third"), overlap_us=0)
    assert ring.ask(again, NOW + 9) is None
    assert [secret.until for secret in ring.key.secrets] == [NOW + 9, NOW + 9, None]
    longer = replace(ROTATE, operation_id=id_of(8), digest=digest_of("fourth"), overlap_us=9 * HOUR)
    ring.ask(longer, NOW + 10)
    # What was over is not brought back.
    assert [secret.until for secret in ring.key.secrets][:2] == [NOW + 9, NOW + 9]


def test_a_rotation_may_give_it_a_new_end(ring: Keyring) -> None:
    ring.ask(replace(ROTATE, lifetime_us=2 * HOUR), NOW + HOUR)
    assert ring.key.expires_at == NOW + 3 * HOUR


def test_revoked_it_is_over_whatever_else_it_was(ring: Keyring) -> None:
    ring.ask(ROTATE)
    assert ring.ask(REVOKE, NOW + 1) is None
    assert ring.key.state(NOW) is KeyState.REVOKED
    assert ring.key.overlap_until(NOW + 2) is None


def test_what_is_over_is_neither_rotated_nor_revoked_again(ring: Keyring) -> None:
    ring.ask(REVOKE, NOW + 1, by="boss")
    for asked in (ROTATE, replace(REVOKE, operation_id=id_of(9))):
        reason, facts = refused(ring, asked)
        assert reason is Refusal.KEY_ENDED
        assert facts["revoked_by"] == "boss"
        assert facts["revoked_at"].startswith("2027-01-15T08:00:00.000001")


def test_what_has_expired_is_not_rotated_but_may_be_revoked(ring: Keyring) -> None:
    reason, facts = refused(ring, ROTATE, at=NOW + 24 * HOUR)
    assert (reason, facts["principal"]) == (Refusal.KEY_ENDED, "svc")
    assert "expired_at" in facts
    assert ring.ask(REVOKE, NOW + 25 * HOUR) is None


@pytest.mark.parametrize("asked", [ROTATE, REVOKE])
def test_a_key_that_there_is_not_is_told_so(asked: KeyRequest) -> None:
    reason, facts = refused(Keyring(), asked)
    assert reason is Refusal.KEY_UNKNOWN
    assert facts == {"key": "00000000-0002-7000-8000-000000000000"}


def test_the_same_request_again_is_answered_as_it_was_then(ring: Keyring) -> None:
    ring.ask(ROTATE)
    ring.ask(REVOKE)
    for asked, secrets, revoked in ((CREATE, 1, False), (ROTATE, 2, False), (REVOKE, 2, True)):
        then = ring.ask(asked, NOW + 99)
        assert isinstance(then, Key)
        assert (len(then.secrets), then.revoked_at is not None) == (secrets, revoked)
    assert len(ring.acts) == 3


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (replace(CREATE, principal="other"), "principal"),
        (replace(CREATE, roles=(Role.ADMIN,)), "roles"),
        (replace(CREATE, roots=None), "roots"),
        (replace(CREATE, roots=(id_of(3),)), "roots"),
        (replace(CREATE, label="other"), "label"),
        (replace(CREATE, digest=digest_of("other")), "digest"),
        (replace(CREATE, lifetime_us=None), "lifetime_us"),
        (replace(CREATE, key_id=id_of(8)), "key_id"),
        (replace(REVOKE, operation_id=CREATE.operation_id), "kind"),
    ],
)
def test_its_id_with_other_content_names_what_differs(
    ring: Keyring, asked: KeyRequest, field: str
) -> None:
    reason, facts = refused(ring, asked)
    assert (reason, facts["field"]) == (Refusal.OPERATION_ID_REUSED, field)


def test_its_id_is_the_principals_who_used_it(ring: Keyring) -> None:
    reason, facts = refused(ring, CREATE, by="somebody")
    assert (reason, facts["field"]) == (Refusal.OPERATION_ID_REUSED, "by")


def test_no_two_keys_have_one_id_or_one_text(ring: Keyring) -> None:
    other = replace(CREATE, operation_id=id_of(20), digest=digest_of("other"))
    assert refused(ring, other)[0] is Refusal.ID_TAKEN
    same = replace(CREATE, operation_id=id_of(21), key_id=id_of(22))
    assert refused(ring, same)[0] is Refusal.TOKEN_ID_REUSED
    # Nor is a text that was replaced used again.
    ring.ask(ROTATE)
    back = replace(ROTATE, operation_id=id_of(23), digest=CREATE.digest)
    assert refused(ring, back)[0] is Refusal.TOKEN_ID_REUSED


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (replace(CREATE, operation_id=bytes(16)), "operation_id"),
        (replace(CREATE, operation_id=b"short"), "operation_id"),
        (replace(CREATE, key_id=bytes(16)), "key_id"),
        (replace(CREATE, principal=""), "principal"),
        (replace(CREATE, principal="é" * 129), "principal"),
        (replace(CREATE, principal="a\nb"), "principal"),
        (replace(CREATE, principal="system"), "principal"),
        (replace(CREATE, principal="database:postgres"), "principal"),
        (replace(CREATE, roles=()), "roles"),
        (replace(CREATE, roles=(Role.AGENT, Role.AGENT)), "roles"),
        (replace(CREATE, roles=(Role.SYSTEM,)), "roles"),
        (replace(CREATE, roots=()), "root_ids"),
        (replace(CREATE, roots=(b"short",)), "root_ids"),
        (replace(CREATE, roots=(id_of(3), id_of(3))), "root_ids"),
        (replace(CREATE, roots=tuple(map(id_of, range(KEY_ROOTS_MAX + 1)))), "root_ids"),
        (replace(CREATE, label="l" * 257), "label"),
        (replace(CREATE, digest=None), "digest"),
        (replace(CREATE, digest=b"short"), "digest"),
        (replace(CREATE, lifetime_us=SECOND_US - 1), "lifetime"),
        (replace(CREATE, lifetime_us=2**62), "lifetime"),
        (replace(ROTATE, overlap_us=None), "overlap"),
        (replace(ROTATE, overlap_us=-1), "overlap"),
        (replace(ROTATE, overlap_us=30 * 24 * HOUR + 1), "overlap"),
        (replace(ROTATE, digest=b""), "digest"),
        (replace(ROTATE, lifetime_us=0), "lifetime"),
        (replace(REVOKE, reason="r" * 513), "reason"),
    ],
)
def test_what_is_malformed_is_told_by_its_field(asked: KeyRequest, field: str) -> None:
    wrong = check_key_request(asked)
    assert wrong is not None
    assert (wrong.reason, wrong.facts["field"]) == (Refusal.MALFORMED, field)


@pytest.mark.parametrize(
    "asked",
    [
        CREATE,
        replace(CREATE, roots=None, lifetime_us=None, label=""),
        replace(CREATE, roots=tuple(map(id_of, range(KEY_ROOTS_MAX)))),
        ROTATE,
        replace(ROTATE, overlap_us=0),
        replace(ROTATE, overlap_us=30 * 24 * HOUR),
        REVOKE,
        replace(REVOKE, reason=""),
    ],
)
def test_what_is_well_formed_is_not_refused(asked: KeyRequest) -> None:
    assert check_key_request(asked) is None


@pytest.mark.parametrize("first", [ROTATE, REVOKE])
def test_acts_that_are_no_history_are_not_folded(first: KeyRequest) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        fold({}, [KeyAct(1, NOW, "ops", None, first)])
    twice = [KeyAct(number, NOW, "ops", None, CREATE) for number in (1, 2)]
    with pytest.raises(ValueError, match="does not fit"):
        fold({}, twice)
