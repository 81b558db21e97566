"""API keys in a real database: acts are numbered without a gap, done once, and never changed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from peculium._ids import new_id
from peculium_server.core.keys import KeyActKind, KeyRequest, KeyState
from peculium_server.core.limits import SECOND_US
from peculium_server.core.operations import Role
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.store import roles
from peculium_server.store.errors import StoreError
from peculium_server.store.keys import KeyDone
from peculium_server.store.store import Store
from tests.postgres import as_role

HOUR = 3_600 * SECOND_US


def create(**fields: Any) -> KeyRequest:
    asked: dict[str, Any] = {
        "operation_id": new_id(),
        "key_id": new_id(),
        "principal": "svc",
        "roles": (Role.AGENT, Role.AUDITOR),
        "roots": tuple(sorted((new_id(), new_id()))),
        "label": 'with "quotes", {braces} and é',
        "digest": secrets.token_bytes(32),
        "lifetime_us": HOUR,
    }
    return KeyRequest(kind=KeyActKind.CREATE, **(asked | fields))


def rotate(key_id: bytes) -> KeyRequest:
    return KeyRequest(
        kind=KeyActKind.ROTATE,
        operation_id=new_id(),
        key_id=key_id,
        digest=secrets.token_bytes(32),
        overlap_us=HOUR,
    )


def revoke(key_id: bytes) -> KeyRequest:
    return KeyRequest(
        kind=KeyActKind.REVOKE, operation_id=new_id(), key_id=key_id, reason="it leaked"
    )


@pytest.fixture
async def store(served_database: str) -> AsyncIterator[Store]:
    """With the rights of a server, and no others."""
    opened = await Store.open(served_database)
    yield opened
    await opened.close()


async def done(store: Store, asked: KeyRequest, **by: Any) -> KeyDone:
    answer = await store.keys.do(asked, **({"by": "ops"} | by))
    assert isinstance(answer, KeyDone)
    return answer


async def test_what_was_done_is_read_as_it_was_asked(store: Store) -> None:
    by_key, unlimited = new_id(), create(roots=None, label="", lifetime_us=None)
    asked = [create(), unlimited]
    asked += [rotate(asked[0].key_id), revoke(asked[0].key_id)]
    for each in asked:
        await done(store, each, by_key=by_key)
    since = await store.keys.since(0)
    assert [act.asked for act in since.acts] == asked
    assert [act.number for act in since.acts] == [1, 2, 3, 4]
    assert {(act.by, act.by_key) for act in since.acts} == {("ops", by_key)}
    times = [act.at for act in since.acts]
    assert times == sorted(times)
    assert times[-1] <= since.now
    assert since.last == 4
    assert (await store.keys.since(3)).acts == since.acts[3:]
    assert (await store.keys.since(4)).acts == ()


async def test_a_ledger_without_keys_says_so(store: Store) -> None:
    since = await store.keys.since(0)
    assert (since.last, since.acts) == (0, ())


async def test_the_answer_is_the_key_as_it_was_left(store: Store) -> None:
    asked = create()
    made = await done(store, asked)
    assert (made.replayed, made.key.expires_at) == (False, made.now + HOUR)
    rotation = rotate(asked.key_id)
    rotated = await done(store, rotation)
    assert [secret.digest for secret in rotated.key.secrets] == [asked.digest, rotation.digest]
    ended = await done(store, revoke(asked.key_id))
    assert ended.key.state(ended.now) is KeyState.REVOKED
    again = await done(store, rotation)
    assert again.replayed
    assert again.key == rotated.key
    assert (await store.keys.since(0)).last == 3


async def test_a_refusal_writes_nothing(store: Store) -> None:
    asked = create()
    await done(store, asked)
    for wrong, reason in (
        (replace(asked, principal="other"), Refusal.OPERATION_ID_REUSED),
        (rotate(new_id()), Refusal.KEY_UNKNOWN),
        (create(digest=asked.digest), Refusal.TOKEN_ID_REUSED),
        (create(key_id=asked.key_id), Refusal.ID_TAKEN),
    ):
        refused = await store.keys.do(wrong, "ops")
        assert isinstance(refused, Refused)
        assert refused.reason is reason
    assert (await store.keys.since(0)).last == 1


async def test_of_many_at_once_each_is_done_once_and_has_a_number_of_its_own(
    store: Store, served_database: str
) -> None:
    other = await Store.open(served_database)
    try:
        asked = [create() for _ in range(6)]
        # Each through two servers at once, as a client may that got no answer.
        answers = await asyncio.gather(
            *(done(each, one) for one in asked for each in (store, other))
        )
    finally:
        await other.close()
    assert sorted(answer.replayed for answer in answers) == [False] * 6 + [True] * 6
    acts = (await store.keys.since(0)).acts
    assert [act.number for act in acts] == list(range(1, 7))
    assert {act.asked.key_id for act in acts} == {one.key_id for one in asked}


async def test_of_two_who_revoke_one_key_the_second_is_told_so(
    store: Store, served_database: str
) -> None:
    asked = create()
    await done(store, asked)
    other = await Store.open(served_database)
    try:
        answers = await asyncio.gather(
            store.keys.do(revoke(asked.key_id), "ops"),
            other.keys.do(revoke(asked.key_id), "boss"),
        )
    finally:
        await other.close()
    [refused] = [answer for answer in answers if isinstance(answer, Refused)]
    assert refused.reason is Refusal.KEY_ENDED
    assert refused.facts["revoked_by"] in {"ops", "boss"}


async def test_who_acts_on_the_database_itself_is_recorded_by_that_name(
    store: Store, database: str
) -> None:
    asked = create()
    await done(store, asked, by=None)
    [act] = (await store.keys.since(0)).acts
    with psycopg.connect(as_role(database, roles.SERVER)) as connection:
        user = connection.execute("SELECT current_user").fetchone()
    assert user is not None
    assert act.by == f"database:{user[0]}" == f"database:{roles.SERVER}"


async def test_a_database_that_is_gone_is_told_so(store: Store, database: str) -> None:
    await store.keys.since(0)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ALTER TABLE key_acts RENAME TO gone")
    with pytest.raises(StoreError):
        await store.keys.since(0)
    with pytest.raises(StoreError):
        await store.keys.do(create(), "ops")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE key_acts SET kind = 1, digest = sha256('x') WHERE kind = 3",
        "DELETE FROM key_acts WHERE kind = 3",
        "TRUNCATE key_acts",
    ],
)
async def test_a_server_cannot_undo_a_revocation(
    store: Store, served_database: str, change: str
) -> None:
    asked = create()
    await done(store, asked)
    await done(store, revoke(asked.key_id))
    with (
        psycopg.connect(served_database) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(change.encode())


async def test_an_auditor_sees_who_has_keys_and_no_digest(store: Store, database: str) -> None:
    asked = create()
    await done(store, asked)
    await done(store, rotate(asked.key_id))
    await done(store, revoke(asked.key_id))
    query = "SELECT * FROM audit.key_acts ORDER BY number"
    with psycopg.connect(as_role(database, roles.AUDITOR)) as connection:
        with connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
            made, rotated, revoked = cursor.execute(query).fetchall()
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT digest FROM key_acts")
    assert (made["kind"], made["principal"], made["by_principal"]) == ("CREATE", "svc", "ops")
    assert made["roles"] == ["AGENT", "AUDITOR"]
    assert [root.bytes for root in made["roots"]] == list(asked.roots or ())
    assert (made["expires_at"] - made["at"]).total_seconds() == 3600
    assert (rotated["kind"], rotated["roles"], rotated["expires_at"]) == ("ROTATE", None, None)
    assert (rotated["overlap_until"] - rotated["at"]).total_seconds() == 3600
    assert (revoked["kind"], revoked["reason"]) == ("REVOKE", "it leaked")
    shown = str([made, rotated, revoked])
    assert asked.digest is not None
    assert not [form for form in (repr(asked.digest), asked.digest.hex()) if form in shown]
