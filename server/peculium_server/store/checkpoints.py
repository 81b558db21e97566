"""The statements about checkpoints: what is to be sealed, what was, and how it is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Executable,
    LargeBinary,
    Select,
    SmallInteger,
    any_,
    bindparam,
    cast,
    func,
    insert,
    literal_column,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY

from peculium_server.core.checkpoint import Checkpoint, Leaf, Sealed
from peculium_server.store import rows
from peculium_server.store.clauses import (
    AFTER,
    BUDGET,
    ID,
    LANE,
    LIMIT,
    UNTIL,
    chained,
    columns,
    first,
    in_positions,
    in_tree,
    to_chained_entry,
)
from peculium_server.store.schema import (
    checkpoint_keys,
    checkpoint_leaves,
    checkpoints,
    entries,
    ledger,
    seq_group,
)
from peculium_server.store.statements import CLOCK, compiled, inserted
from peculium_server.store.wire import Statement

_LANES = bindparam("lanes", type_=ARRAY(SmallInteger))
_SEQ = bindparam("seq", type_=BigInteger)

LEAF_COLUMNS = ("root_id", "budget_id", "seq", "head")


class Kept(NamedTuple):
    """A checkpoint, and the public key that the ledger has for it."""

    sealed: Sealed
    public_key: bytes
    """Empty if there is none."""


class Covered(NamedTuple):
    """How far some operations of a lane reach."""

    until: int | None
    """The position of the last one; None if there is none."""
    positions: int
    """How many there are up to there."""
    operations: int
    """As many, if each position has one."""
    rows: int


# -- What was sealed ---------------------------------------------------------------------------------


def _kept() -> Select[Any]:
    """Checkpoints with their incarnation, which their hashes cover, and with their keys."""
    return select(
        checkpoints.c.number,
        checkpoints.c.sealed_at,
        # Those of before there could be several are of the first one.
        func.coalesce(checkpoints.c.incarnation, ledger.c.incarnation),
        checkpoints.c.positions,
        checkpoints.c.merkle_root,
        checkpoints.c.leaves,
        checkpoints.c.previous_hash,
        checkpoints.c.hash,
        checkpoints.c.key_id,
        checkpoints.c.signature,
        checkpoint_keys.c.public_key,
    ).select_from(
        checkpoints.join(ledger, true()).outerjoin(
            checkpoint_keys, checkpoint_keys.c.key_id == checkpoints.c.key_id
        )
    )


def _to_kept(row: Sequence[Any]) -> Kept:
    checkpoint = Checkpoint._make((*row[:3], tuple(row[3]), *row[4:7]))
    return Kept(Sealed(checkpoint, *row[7:10]), row[10] or b"")


def _last_checkpoint() -> Executable:
    return _kept().order_by(checkpoints.c.number.desc()).limit(literal_column("1"))


def _list_checkpoints(*, descending: bool) -> Executable:
    number = checkpoints.c.number
    if descending:
        return _kept().where(number < AFTER).order_by(number.desc()).limit(LIMIT)
    return _kept().where(number > AFTER).order_by(number).limit(LIMIT)


def _leaf_columns() -> list[ColumnElement[Any]]:
    return columns(checkpoint_leaves, ("number", *LEAF_COLUMNS))


def _to_leaf(row: Sequence[Any]) -> tuple[int, Leaf]:
    return row[0], Leaf._make(row[1:])


def _first_leaf_over() -> Executable:
    """The first leaf that seals an entry of a budget."""
    leaf = checkpoint_leaves.c
    return (
        select(*_leaf_columns())
        .where(*in_tree(checkpoint_leaves), leaf.budget_id == BUDGET, leaf.seq >= _SEQ)
        .order_by(leaf.seq)
        .limit(literal_column("1"))
    )


def _last_leaf() -> Executable:
    """The last leaf that seals anything of a budget."""
    leaf = checkpoint_leaves.c
    return (
        select(*_leaf_columns())
        .where(*in_tree(checkpoint_leaves), leaf.budget_id == BUDGET)
        .order_by(leaf.seq.desc())
        .limit(literal_column("1"))
    )


def _chain() -> Executable:
    """A budget's entries by seq, group for group, as the index has them."""
    entry, group = entries.c, seq_group(entries.c.seq)
    return (
        chained()
        .where(
            *in_tree(entries),
            entry.budget_id == BUDGET,
            group >= seq_group(AFTER),
            entry.seq > AFTER,
        )
        .order_by(group, entry.seq)
        .limit(LIMIT)
    )


def _operation() -> Executable:
    """All parts of an operation."""
    return (
        select(*columns(entries, rows.ENTRY_COLUMNS))
        .where(
            *in_tree(entries),
            entries.c.operation_id == bindparam("operation_id", type_=ID),
        )
        .order_by(entries.c.part)
    )


def _leaves() -> Executable:
    """The leaves of some checkpoints, in order. All lanes are named, as the index begins with them."""
    leaf = checkpoint_leaves.c
    return (
        select(*_leaf_columns())
        .where(leaf.lane == any_(_LANES), leaf.number > AFTER, leaf.number <= UNTIL)
        .order_by(leaf.number, leaf.root_id, leaf.budget_id)
    )


def _leaves_of_tree() -> Executable:
    leaf = checkpoint_leaves.c
    return (
        select(*_leaf_columns())
        .where(*in_tree(checkpoint_leaves))
        .order_by(leaf.number, leaf.budget_id)
    )


def _public_keys() -> Executable:
    key = checkpoint_keys.c
    return select(key.key_id, key.public_key).order_by(key.key_id)


# -- What is to be sealed ----------------------------------------------------------------------------

_BETWEEN = (entries.c.lane == LANE, *in_positions())


def _decided_at() -> Executable:
    """When the operation at a position was decided."""
    return select(entries.c.at).where(
        *_BETWEEN,
        entries.c.part == literal_column("0"),
    )


def _covered() -> Executable:
    """How far the first entries of a lane behind a position reach: so many rows at most are looked at."""
    some = (
        select(entries.c.position, entries.c.part)
        .where(*_BETWEEN)
        .order_by(entries.c.position, entries.c.part)
        .limit(LIMIT)
        .subquery("some")
    )
    return select(
        func.max(some.c.position),
        func.count(some.c.position.distinct()),
        func.count().filter(some.c.part == literal_column("0")),
        func.count(),
    ).select_from(some)


def _heads() -> Executable:
    """Of each budget with an entry between two positions of a lane, the last one."""
    entry = entries.c
    return (
        select(entry.root_id, entry.budget_id, entry.seq, entry.hash)
        .distinct(entry.root_id, entry.budget_id)
        .where(*_BETWEEN)
        .order_by(entry.root_id, entry.budget_id, entry.seq.desc())
    )


# -- Recording it ------------------------------------------------------------------------------------


def _add_key() -> Executable:
    """Add a public key, unless it is there."""
    key_id = cast(bindparam("key_id", type_=LargeBinary), LargeBinary)
    given = select(key_id, cast(bindparam("public_key", type_=LargeBinary), LargeBinary))
    there = checkpoint_keys.c.key_id == key_id
    absent = ~select(checkpoint_keys.c.key_id).where(there).exists()
    return insert(checkpoint_keys).from_select(["key_id", "public_key"], given.where(absent))


_CHECKPOINT_COLUMNS = (
    "number",
    "leaves",
    "sealed_at",
    "merkle_root",
    "previous_hash",
    "hash",
    "key_id",
    "signature",
    "positions",
    "incarnation",
)


def _add_checkpoint() -> Executable:
    values = {name: bindparam(name, type_=checkpoints.c[name].type) for name in _CHECKPOINT_COLUMNS}
    return insert(checkpoints).values(values)


def checkpoint_values(sealed: Sealed) -> dict[str, Any]:
    """What `add_checkpoint` takes."""
    checkpoint = sealed.checkpoint
    told = checkpoint._asdict() | sealed._asdict()
    return {name: told[name] for name in _CHECKPOINT_COLUMNS}


def leaf_values(lane: int, number: int, leaves: Sequence[Leaf]) -> dict[str, Any]:
    """What `add_leaves` takes: leaves of one lane."""
    columns = dict(zip(LEAF_COLUMNS, zip(*leaves, strict=True), strict=True))
    return {"lane": lane, "number": [number] * len(leaves), **columns}


RECIPES: dict[str, tuple[Executable, Callable[[Sequence[Any]], Any]]] = {
    "sealing_clock": (select(CLOCK), first),
    "last_checkpoint": (_last_checkpoint(), _to_kept),
    "list_checkpoints": (_list_checkpoints(descending=False), _to_kept),
    "list_checkpoints_descending": (_list_checkpoints(descending=True), _to_kept),
    "first_leaf_over": (_first_leaf_over(), _to_leaf),
    "last_leaf": (_last_leaf(), _to_leaf),
    "chain": (_chain(), to_chained_entry),
    "operation": (_operation(), rows.to_entry),
    "leaves": (_leaves(), _to_leaf),
    "leaves_of_tree": (_leaves_of_tree(), _to_leaf),
    "public_keys": (_public_keys(), tuple),
    "decided_at": (_decided_at(), first),
    "covered": (_covered(), Covered._make),
    "heads": (_heads(), Leaf._make),
    "add_key": (_add_key(), tuple),
    "add_checkpoint": (_add_checkpoint(), tuple),
    "add_leaves": (inserted(checkpoint_leaves, ("number", *LEAF_COLUMNS), LANE), tuple),
}

STATEMENTS: dict[str, Statement] = {
    name: compiled(name, executable, row) for name, (executable, row) in RECIPES.items()
}
