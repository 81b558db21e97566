"""API keys in the store: what was done to them, and doing more of it.

Acts are numbered without a gap, and one is visible only after all before it: whoever knows the acts up to a
number misses none of those. They are few, so no lane is concerned: the key of the table is the number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import psycopg
from sqlalchemy import (
    Executable,
    LargeBinary,
    Select,
    Text,
    bindparam,
    cast,
    func,
    or_,
    select,
)

from peculium_server.core.keys import (
    OWNER_PREFIX,
    Key,
    KeyAct,
    KeyActKind,
    KeyRequest,
    decide,
    fold,
)
from peculium_server.core.operations import Role
from peculium_server.core.refusals import Refused
from peculium_server.store.clauses import AFTER, ID, columns
from peculium_server.store.connect import Readers
from peculium_server.store.errors import (
    LedgerCorrupt,
    StoreContended,
    is_contention,
    is_lost,
    translate,
)
from peculium_server.store.reading import BEGIN, COMMIT, ROLLBACK, fetch_together, reading
from peculium_server.store.schema import key_acts
from peculium_server.store.statements import CLOCK, compiled, inserted
from peculium_server.store.wire import Connection, Statement, Step

_ATTEMPTS_MAX: Final = 10
"""Somebody else's act comes between seldom: each attempt that fails is one of theirs that was done."""

_COLUMNS: Final = (
    "number",
    "at",
    "by_principal",
    "by_key",
    "kind",
    "operation_id",
    "key_id",
    "principal",
    "roles",
    "roots",
    "label",
    "digest",
    "lifetime_us",
    "overlap_us",
    "reason",
)


class KeysSince(NamedTuple):
    """What was done to keys after some act."""

    now: int
    """The database's clock. Microseconds since the Unix epoch."""
    last: int
    """The number of the last act; 0 if there is none."""
    acts: tuple[KeyAct, ...]
    """In order; at least up to that number."""


class KeyDone(NamedTuple):
    """A key, as what was asked for has left it."""

    key: Key
    now: int
    """The database's clock."""
    replayed: bool


class Keys:
    """The API keys of an open ledger."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers

    async def since(self, number: int) -> KeysSince:
        """What was done after an act.

        Raises:
            StoreError: The database does not say.
        """
        async with reading(self._readers) as connection:
            [(now, last)], acts = await fetch_together(
                connection,
                # First how far they go: those that are read afterwards go at least as far.
                Step(STATEMENTS["last_key_act"]),
                Step(STATEMENTS["key_acts_after"], {"after": number}),
            )
        return KeysSince(now, last or 0, tuple(acts))

    async def do(
        self, asked: KeyRequest, by: str | None = None, by_key: bytes | None = None
    ) -> KeyDone | Refused:
        """Do something to a key, if that may be done, and record it.

        Args:
            asked: What; it is well-formed.
            by: The principal; None: the user of this database connection.
            by_key: The key that the principal has called with.

        Raises:
            StoreError: It was not done, or nobody knows: asked again, it is done once.
        """
        for _ in range(_ATTEMPTS_MAX):
            try:
                async with self._readers.connection() as connection:
                    return await _done(connection, asked, by, by_key)
            except psycopg.Error as error:
                if not is_contention(error):
                    raise translate(error, outcome_unknown=is_lost(error)) from error
        raise StoreContended(_ATTEMPTS_MAX)


async def _done(
    connection: Connection, asked: KeyRequest, by: str | None, by_key: bytes | None
) -> KeyDone | Refused:
    concerned = {
        "key_id": asked.key_id,
        "operation_id": asked.operation_id,
        # No digest is empty.
        "digest": asked.digest or b"",
    }
    _, [user], [(now, last)], acts = await fetch_together(
        connection,
        BEGIN,
        Step(STATEMENTS["database_user"]),
        Step(STATEMENTS["last_key_act"]),
        Step(STATEMENTS["key_acts_concerned"], concerned),
    )
    who = by or user
    try:
        key = fold({}, [act for act in acts if act.asked.key_id == asked.key_id]).get(asked.key_id)
    except ValueError as error:
        raise LedgerCorrupt(str(error)) from error
    decision = decide(
        asked,
        who,
        recorded=next((act for act in acts if act.asked.operation_id == asked.operation_id), None),
        key=key,
        digest_seen=any(
            asked.digest is not None and act.asked.digest == asked.digest for act in acts
        ),
        now=now,
    )
    if decision is not None:
        await fetch_together(connection, ROLLBACK)
        return decision if isinstance(decision, Refused) else KeyDone(decision, now, replayed=True)
    act = KeyAct((last or 0) + 1, now, who, by_key, asked)
    await fetch_together(connection, Step(STATEMENTS["add_key_act"], _values(act)))
    await fetch_together(connection, COMMIT)
    before = {} if key is None else {key.key_id: key}
    return KeyDone(fold(before, [act])[asked.key_id], now, replayed=False)


_ROLES: Final = {int(role): role for role in Role}


def _to_act(row: Sequence[Any]) -> KeyAct:
    number, at, by, by_key, kind, operation_id, key_id, principal, roles, roots, *rest = row
    label, digest, lifetime_us, overlap_us, reason = rest
    try:
        asked = KeyRequest(
            kind=KeyActKind(kind),
            operation_id=operation_id,
            key_id=key_id,
            principal=principal,
            roles=tuple(_ROLES[role] for role in roles),
            roots=None if roots is None else tuple(roots),
            label=label,
            digest=digest,
            lifetime_us=lifetime_us,
            overlap_us=overlap_us,
            reason=reason,
        )
    except (KeyError, ValueError) as error:
        raise LedgerCorrupt(f"act {number} on a key is unreadable") from error
    return KeyAct(number, at, by, by_key, asked)


def _values(act: KeyAct) -> dict[str, list[Any]]:
    """One row, as a list for each column; arrays are texts."""
    asked = act.asked
    row: dict[str, Any] = {
        "number": act.number,
        "at": act.at,
        "by_principal": act.by,
        "by_key": act.by_key,
        "kind": asked.kind,
        "operation_id": asked.operation_id,
        "key_id": asked.key_id,
        "principal": asked.principal,
        "roles": _array(str(int(role)) for role in asked.roles),
        "roots": (
            None if asked.roots is None else _array(str(UUID(bytes=root)) for root in asked.roots)
        ),
        "label": asked.label,
        "digest": asked.digest,
        "lifetime_us": asked.lifetime_us,
        "overlap_us": asked.overlap_us,
        "reason": asked.reason,
    }
    return {name: [value] for name, value in row.items()}


def _array(items: Iterable[str]) -> str:
    return "{" + ",".join(items) + "}"


# -- Statements -----------------------------------------------------------------------------------------


def _acts() -> Select[Any]:
    return select(*columns(key_acts, _COLUMNS)).order_by(key_acts.c.number)


def _acts_concerned() -> Executable:
    """The acts on a key, the one with an operation id, and the one with a digest."""
    act = key_acts.c
    return _acts().where(
        or_(
            act.key_id == bindparam("key_id", type_=ID),
            act.operation_id == bindparam("operation_id", type_=ID),
            act.digest == bindparam("digest", type_=LargeBinary),
        )
    )


RECIPES: dict[str, tuple[Executable, Callable[[Sequence[Any]], Any]]] = {
    "database_user": (
        select(cast(func.current_user(), Text)),
        lambda row: f"{OWNER_PREFIX}{row[0]}",
    ),
    "last_key_act": (select(CLOCK, func.max(key_acts.c.number)), tuple),
    "key_acts_after": (_acts().where(key_acts.c.number > AFTER), _to_act),
    "key_acts_concerned": (_acts_concerned(), _to_act),
    "add_key_act": (inserted(key_acts, _COLUMNS), tuple),
}

STATEMENTS: dict[str, Statement] = {
    name: compiled(name, executable, row) for name, (executable, row) in RECIPES.items()
}
