"""Everything that is done to the tables, one thing at a time, and what has to be said of it.

Each column of each table that the schema has is altered in a row that is chosen by lot: a column that is new is
altered, too, and one that nobody would notice has to be in `UNNOTICED`, with the reason why that does no
harm. After that come the forgeries of somebody who knows the format.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from sqlalchemy import Column

from peculium._ids import new_id
from peculium_server.core.operations import Kind
from peculium_server.core.refusals import id_text
from peculium_server.core.state import Balances
from peculium_server.signing import SigningKey
from tests.tampering.auditing import REFUSED, Expected, Place
from tests.tampering.scene import OF_ALL, TABLES, Row, Scene, other, place

UNNOTICED: Final[Mapping[str, str]] = {
    "ledger.created_at": "tells people when the ledger was made; nothing is decided or counted by it",
    "ledger.singleton": "keeps the table at one row; nothing reads it",
    "checkpoint_keys.added_at": "tells people since when a key is there; what it signed says when",
    "ledger.serves_from": "which servers suit the schema; they look at it when they start, and decide nothing by it",
    "collections.closed_at": "the order in which the sweeper looks; what it has to do, entries tell",
}
"""Columns that carry no claim, and why."""

BESIDE: Final[Mapping[str, str]] = {
    "key_acts": "API keys: no hash covers what was done to them, and no checkpoint seals it; what was done"
    " with a key is in the entries, by its principal's name",
    "alert_progress": "how far alerts were looked for: alerts are told, and decide nothing",
    "alert_rules": "what somebody wants to be told of",
    "alerts": "what was told; what it was told for is in the entries",
    "incarnations": "where the ledger is, and what became of it: servers compare that themselves, and stop",
    "refusals": "counts what was refused; nothing is decided by it, and it is forgotten after a while",
    "security_events": "who has shown whose secret: signs of theft, by which nothing is decided",
    "webhook_deliveries": "what was sent where, and is forgotten after a while",
    "webhooks": "where alerts are sent",
}
"""Tables of which no verification says anything, and why."""

NOWHERE: Final[Place] = (b"", b"", 0)
_ANY_RULE: Final = frozenset(
    {
        *("amount", "authority", "balances", "batch", "budget", "chain", "changes", "conservation"),
        *(
            "decision",
            "digest",
            "effect",
            "fold",
            "hold",
            "operation",
            "parts",
            "position",
            "request",
        ),
        *("seq", "time", "token", "versions"),
    }
)
_HASHED: Final = ("parts", "digest", "chain")
"""What a column breaks that the digest of its operation covers."""


@dataclass
class Trace:
    """What was done, and who has to say what of it."""

    trees: set[bytes]
    """Those in which something was changed: what is verified, and put back."""
    online: Sequence[Expected]
    offline: Sequence[Expected] = ()
    why: str = ""
    """Why an export does not tell, where nothing is expected of it."""
    whole: bool = False
    """It shows only if all trees are verified."""
    also: Collection[bytes] = ()
    """Other trees in which something of it may show."""


@dataclass
class Tampering:
    """One thing that is done to the tables."""

    name: str
    do: Callable[[Scene], Trace]
    published: bool = False
    """Nothing but a published checkpoint tells: without one it is not found."""
    noticed: bool = False
    """A server that has seen the lanes farther takes it for a restore and stops: a new one is asked."""
    stops: str = ""
    """No server serves such a ledger: what it says when it stops."""
    forger: bool = False
    """Nothing but the operator's public key tells: without it, it is not found."""
    lost: str = ""
    """It cannot be found at all, and why."""
    found: list[str] = field(default_factory=list)
    """By whom, and what they said."""


def all_tamperings(keys: Sequence[SigningKey], forger: SigningKey) -> Iterator[Tampering]:
    """Everything that is done.

    Args:
        keys: The operator's, the latest last.
        forger: Somebody else's key.
    """
    for name, table in TABLES.items():
        for column in table.c if name not in BESIDE else ():
            full_name = f"{name}.{column.name}"
            if full_name in UNNOTICED:
                continue
            for which, having in _rows_of(name, column).items():
                yield Tampering(
                    full_name + which,
                    partial(_column, name, column.name, having),
                    noticed=name == "lanes",
                )
    for name, do in _FORGERIES.items():
        yield Tampering(name, do)
    yield Tampering("a lane's row deleted", _lane_deleted, noticed=True, stops="lanes, and had")
    yield Tampering(
        "all checkpoints made anew over an altered entry, signed with another key",
        partial(_sealed_anew, forger),
        forger=True,
    )
    for name, do in _AGAINST_PUBLISHED.items():
        yield Tampering(name, do, published=True, noticed=do is _cut_off)
    yield Tampering(
        "all checkpoints made anew over an altered entry, signed with the stolen key",
        partial(_sealed_anew, keys[-1]),
        published=True,
    )
    for name, (do, why) in _LOST.items():
        yield Tampering(name, do, lost=why, noticed=do is _unsealed_cut_off)


# --- one column of one row ---


def _rows_of(table: str, column: Column[Any]) -> Mapping[str, str]:
    """The rows in which a column is altered, by what is said of it: one that has nothing there is not like others."""
    if table in OF_ALL:
        return {"": "true"}
    wanted = _WANTED.get(table, "true")
    rows = {"": wanted}
    if column.nullable:
        rows = {
            "": f"{wanted} AND r.{column.name} IS NOT NULL",
            ", where there was none": f"r.{column.name} IS NULL",
        }
    if table == "entries":
        rows[", of a later part"] = "r.part > 0"
    return rows


def _column(table: str, column: str, having: str, scene: Scene) -> Trace:
    if table in OF_ALL:
        row = scene.chance.choice(scene.all_kept(table))
    else:
        row = scene.victim(table, having)
    if (table, column) == ("lanes", "lane"):
        return _lanes_swapped(scene)
    value = other(TABLES[table].c[column], row[column], row, scene.chance)
    scene.change(table, row, **{column: value})
    trace = _OF_TABLE[table](scene, row, column, value)
    if "root_id" in row:
        trace.trees |= {row["root_id"].bytes}
    if column == "root_id":
        trace.trees |= {value.bytes}
    return trace


_WANTED: Final[Mapping[str, str]] = {
    # A tree without the row of its root cannot be named to a server; and only others have a parent.
    "budgets": "r.parent_id IS NOT NULL",
    # One on which something is waiting that nobody has collected yet.
    "collections": "EXISTS (SELECT FROM kept.budgets AS b WHERE b.root_id = r.root_id"
    " AND b.available > 0 AND r.budget_id = ANY(b.ancestors))",
}
"""Which rows are altered."""


def _entry(scene: Scene, row: Row, column: str, value: Any) -> Trace:
    tree, budget_id, seq = place(row)
    own = scene.operation(row)
    if column in ("lane", "root_id"):
        expected: list[Expected] = [*_gone(scene, row), Expected(("lane",), {(tree, b"", 0)})]
    elif column == "position":
        expected = [Expected(("position", "seq", *_HASHED), own | scene.following(row))]
    elif column in ("part", "parts", "operation_id"):
        rules = ("request", "operation", *_HASHED)
        expected = [Expected(rules, own | scene.following(row))]
    elif column == "seq":
        # Of several parts the first one is looked at first, and the digest covers all of them.
        expected = [Expected(("seq", *_HASHED), own | {(tree, budget_id, value)})]
    elif column == "budget_id":
        rules = ("seq", "budget", *_HASHED)
        expected = [Expected(rules, own | {(tree, value.bytes, seq)})]
    elif column == "hash":
        expected = [Expected(("chain",), {place(row)})]
    elif column == "request":
        expected = [Expected(("request", *_HASHED), own)]
    else:
        expected = [Expected(_HASHED, own)]
    return Trace({tree}, expected, expected)


def _gone(scene: Scene, entry: Row) -> list[Expected]:
    """What is said if an entry is not there any more: at it, behind it, or where it is missed first."""
    near = scene.operation(entry) | scene.following(entry)
    return [
        Expected(("parts", "seq", "fold", "budget", "checkpoint"), near),
        Expected(_ANY_RULE, scene.later(entry)),
    ]


def _budget(_: Scene, row: Row, column: str, value: Any) -> Trace:
    tree, budget_id = place(row)[:2]
    here = {(tree, budget_id, 0)}
    if column in ("lane", "root_id", "budget_id"):
        moved = {(tree, value.bytes, 0)} if column == "budget_id" else set()
        expected = [Expected(("fold",), here | moved, "row")]
    else:
        told = "money" if column in Balances._fields else column
        expected = [Expected(("fold",), here, told)]
    if column == "parent_id":
        return Trace({tree}, expected, why="it is not exported: its ancestors are")
    return Trace({tree}, expected, expected)


def _hold(_: Scene, row: Row, column: str, value: Any) -> Trace:
    tree, budget_id = place(row)[:2]
    ids = [row["hold_id"].bytes, value.bytes if column == "hold_id" else b""]
    at = {(tree, budget_id, 0)} | ({(tree, value.bytes, 0)} if column == "budget_id" else set())
    online = [Expected(("fold",), at, id_text(each)) for each in ids if each]
    return Trace({tree}, online, [Expected(("fold",), at, each.hex()) for each in ids if each])


def _root(_: Scene, row: Row, column: str, value: Any) -> Trace:
    tree = row["root_id"].bytes
    return Trace(
        {tree},
        [Expected(("name",), {(tree, tree, 0)}, "the root")],
        why="it only leads to the root, which is exported with the name that it has",
    )


def _collection(scene: Scene, row: Row, column: str, value: Any) -> Trace:
    tree, top, _ = place(row)
    waiting = {
        place(each | {"seq": 0})
        for each in scene.kept("budgets", row["root_id"])
        if each["available"] and row["budget_id"] in each["ancestors"]
    }
    assert waiting, top
    return Trace(
        {tree},
        [Expected(("collection",), waiting)],
        why="the list is not exported: it can be made again from the budgets",
    )


def _ledger(scene: Scene, row: Row, column: str, value: Any) -> Trace:
    tree = scene.victim("entries")["root_id"].bytes
    return Trace(
        {tree},
        [Expected(("ledger",), {NOWHERE}, column), Expected((REFUSED,), {NOWHERE}, "ledger")],
        why="what a server says of its ledger is what it was when it was opened",
    )


def _lane(scene: Scene, row: Row, column: str, value: Any) -> Trace:
    expected = [Expected(("position",), {NOWHERE}, f"lane {row['lane']}")]
    return Trace(set(), expected, expected, whole=True)


def _checkpoint(scene: Scene, row: Row, column: str, value: Any) -> Trace:
    expected = [Expected(("checkpoint",), {NOWHERE}, f"checkpoint {row['number']}")]
    return Trace({scene.victim("entries")["root_id"].bytes}, expected, expected)


def _key(scene: Scene, row: Row, column: str, value: Any) -> Trace:
    return Trace(
        {scene.victim("entries")["root_id"].bytes},
        [Expected(("checkpoint",), {NOWHERE}, row["key_id"].hex())],
        why="whoever says which public keys to trust does not ask the ledger for them",
    )


def _leaf(scene: Scene, row: Row, column: str, value: Any) -> Trace:
    scene.touch("checkpoint_leaves")
    tree, budget_id, seq = place(row)
    if column == "lane":
        return Trace(
            {tree},
            [Expected(("checkpoint",), scene.up_to(row))],
            why="an export says nothing of where leaves lay",
        )
    numbers = {row["number"], value if column == "number" else row["number"]}
    # Of a seq that is too high it is told that an entry is missing, of one too low that there are more.
    named = {NOWHERE, *((tree, budget_id, each) for each in (seq, seq + 1))}
    named |= {(value.bytes, budget_id, seq)} if column == "root_id" else set()
    named |= {(tree, value.bytes, seq)} if column == "budget_id" else set()
    expected = [Expected(("checkpoint",), named, f"checkpoint {number}") for number in numbers]
    return Trace({tree}, expected, expected)


_OF_TABLE: Final[Mapping[str, Callable[[Scene, Row, str, Any], Trace]]] = {
    "entries": _entry,
    "budgets": _budget,
    "holds": _hold,
    "roots": _root,
    "collections": _collection,
    "ledger": _ledger,
    "lanes": _lane,
    "checkpoints": _checkpoint,
    "checkpoint_keys": _key,
    "checkpoint_leaves": _leaf,
}


def _lanes_swapped(scene: Scene) -> Trace:
    """A lane has the number of another one, which has its: each of them has a row in any case."""
    lanes = sorted(scene.all_kept("lanes"), key=lambda row: int(row["position"]))
    fewest, most = lanes[0], lanes[-1]
    scene.change("lanes", fewest, position=most["position"])
    scene.change("lanes", most, position=fewest["position"])
    trace = _lane(scene, fewest, "lane", None)
    # Behind where a lane says that it stands, nothing is exported.
    trace.also = {
        each["root_id"].bytes
        for each in scene.all_kept("roots")
        if each["lane"] in (fewest["lane"], most["lane"])
    }
    return trace


# --- rows that are gone, put in, or changed places ---


def _entry_deleted(having: str, scene: Scene) -> Trace:
    entry = scene.victim("entries", having)
    scene.delete("entries", entry)
    expected = _gone(scene, entry)
    return Trace({entry["root_id"].bytes}, expected, expected)


def _operation_deleted(scene: Scene) -> Trace:
    entry = scene.victim("entries", "r.part = 0 AND r.seq > 1")
    scene.do(
        "DELETE FROM entries WHERE root_id = %s AND operation_id = %s",
        [entry["root_id"], entry["operation_id"]],
    )
    tree = entry["root_id"].bytes
    parts = [
        each
        for each in scene.kept("entries", entry["root_id"])
        if each["operation_id"] == entry["operation_id"]
    ]
    expected = [one for part in parts for one in _gone(scene, part)]
    return Trace({tree}, expected, expected)


def _lane_deleted(scene: Scene) -> Trace:
    row = scene.chance.choice(scene.all_kept("lanes"))
    scene.delete("lanes", row)
    return Trace(set(), ())


def _entry_inserted(scene: Scene) -> Trace:
    """As if its budget had done it once more."""
    entry = scene.victim(
        "entries",
        # Behind where the lane stands nothing is exported.
        "r.parts = 1 AND (SELECT max(position) FROM kept.entries AS l WHERE l.root_id = r.root_id)"
        " < (SELECT position FROM kept.lanes AS l WHERE l.lane = r.lane)",
    )
    entries = scene.kept("entries", entry["root_id"])
    last = max(each["position"] for each in entries)
    again = entry | {
        "operation_id": uuid.UUID(bytes=new_id()),
        "position": last + 1,
        "seq": 1 + max(e["seq"] for e in entries if e["budget_id"] == entry["budget_id"]),
    }
    scene.insert("entries", again)
    expected = [Expected(("chain", "digest", "operation", "seq"), {place(again)})]
    return Trace({entry["root_id"].bytes}, expected, expected)


def _swapped(column: str, scene: Scene) -> Trace:
    """Two entries of one budget, of an operation each, have each other's place."""
    first = scene.victim(
        "entries",
        "r.parts = 1 AND EXISTS (SELECT FROM kept.entries AS n WHERE n.root_id = r.root_id"
        " AND n.budget_id = r.budget_id AND n.seq = r.seq + 1 AND n.parts = 1)",
    )
    entries = scene.kept("entries", first["root_id"])
    second = next(
        each
        for each in entries
        if each["budget_id"] == first["budget_id"] and each["seq"] == first["seq"] + 1
    )
    scene.change("entries", first, **{column: second[column]})
    scene.change("entries", second, **{column: first[column]})
    expected = [
        Expected(("chain", "digest", "seq", "position"), {place(first), place(second)}),
    ]
    return Trace({first["root_id"].bytes}, expected, expected)


def _row_deleted(table: str, scene: Scene) -> Trace:
    row = scene.victim(table, _WANTED.get(table, "true"))
    scene.delete(table, row)
    trace = _OF_TABLE[table](scene, row, "", None)
    if table == "budgets":
        missing = [Expected(("fold",), {place(row | {"seq": 0})}, "no row")]
        trace = Trace(trace.trees, missing, missing)
    return trace


def _hold_inserted(scene: Scene) -> Trace:
    row = scene.victim("holds")
    made = row | {"hold_id": uuid.UUID(bytes=new_id()), "token": scene.chance.randbytes(32)}
    scene.insert("holds", made)
    return _hold(scene, made, "", None)


def _budget_inserted(scene: Scene) -> Trace:
    row = scene.victim("budgets", _WANTED["budgets"])
    made = row | {"budget_id": uuid.UUID(bytes=new_id()), "name": "forged", "seq": 0}
    scene.insert("budgets", made)
    expected = [Expected(("fold",), {place(made)}, "no entries")]
    return Trace({row["root_id"].bytes}, expected, expected)


def _name_inserted(scene: Scene) -> Trace:
    """Another name for a root: who opens it, spends what is not his."""
    row = scene.victim("roots")
    scene.insert("roots", row | {"name": "forged"})
    return _root(scene, row, "name", None)


def _name_of_nothing(scene: Scene) -> Trace:
    root_id = uuid.UUID(bytes=new_id())
    scene.insert("roots", {"name": "forged", "lane": 0, "root_id": root_id})
    return Trace(
        {root_id.bytes},
        [Expected(("name",), {(root_id.bytes, b"", 0)}, "forged")],
        why="it leads to no tree, and so to nothing that is exported",
        whole=True,
    )


def _balances_forged(table: str, scene: Scene, *, deep: bool = False) -> Trace:
    """More money than there was, which adds up."""
    row = scene.victim(table, _WANTED.get(table, "true"), deep=deep)
    scene.change(table, row, granted=row["granted"] + 1_000, available=row["available"] + 1_000)
    return _OF_TABLE[table](scene, row, "available", None)


# --- by somebody who knows the format ---


def _rehashed(scene: Scene, entry: Row) -> None:
    """Alter the trace of an operation, which no rule forbids, and make all hashes anew."""
    forged = [
        each._replace(trace_id=b"forged by nobody")
        if each.operation_id == entry["operation_id"].bytes
        else each
        for each in scene.entries(entry["root_id"])
    ]
    scene.rehash(entry["root_id"], forged)


def _chain_rehashed(scene: Scene, *, deep: bool = False) -> Trace:
    entry = scene.victim("entries", scene.is_sealed, deep=deep)
    _rehashed(scene, entry)
    expected = [Expected(("checkpoint",), scene.sealing(entry), "another hash")]
    return Trace({entry["root_id"].bytes}, expected, expected)


def _sealed_anew(key: SigningKey | None, scene: Scene) -> Trace:
    entry = scene.victim("entries", scene.is_sealed)
    _rehashed(scene, entry)
    scene.seal_anew(key)
    tree = entry["root_id"].bytes
    first = min(
        each["number"]
        for each in scene.checkpoints
        if each["positions"][entry["lane"]] >= entry["position"]
    )
    numbers = range(1, len(scene.checkpoints) + 1)
    if key is None:
        # The signature is over what it was before.
        expected = [Expected(("checkpoint",), {NOWHERE}, f"checkpoint {first}: it is not signed")]
    else:
        expected = [
            Expected(("checkpoint",), {NOWHERE}, f"checkpoint {number}: {words}")
            for number in numbers
            for words in ("it is signed with the key", "it has another hash than the one")
        ]
    return Trace({tree}, expected, expected)


def _root_forged(scene: Scene) -> Trace:
    """A Merkle root that is not that of the leaves, with the hash of a checkpoint that says so."""
    row = scene.chance.choice(scene.checkpoints)
    scene.change("checkpoints", row, merkle_root=scene.chance.randbytes(32))
    return _checkpoint(scene, row, "merkle_root", None)


def _checkpoint_deleted(scene: Scene) -> Trace:
    row = scene.chance.choice(scene.checkpoints[:-1])
    scene.delete("checkpoints", row)
    return _checkpoint(scene, row, "number", None)


def _last_checkpoint_deleted(scene: Scene) -> Trace:
    """Without its leaves."""
    row = scene.checkpoints[-1]
    scene.delete("checkpoints", row)
    leaf = scene.chance.choice(
        [each for each in scene.all_kept("checkpoint_leaves") if each["number"] == row["number"]]
    )
    tree = leaf["root_id"].bytes
    leaves = scene.kept("checkpoint_leaves", leaf["root_id"])
    last = {place(each) for each in leaves if each["number"] == row["number"]}
    return Trace(
        {tree},
        [Expected(("checkpoint",), last, "is missing")],
        why="leaves are exported with their checkpoints: published hashes tell, as below",
    )


def _checkpoints_swapped(scene: Scene) -> Trace:
    rows = scene.checkpoints
    at = scene.chance.randrange(len(rows) - 1)
    first, second = rows[at], rows[at + 1]
    scene.change("checkpoints", second, number=len(rows) + 1)
    scene.change("checkpoints", first, number=second["number"])
    scene.change("checkpoints", second | {"number": len(rows) + 1}, number=first["number"])
    return _checkpoint(scene, first, "number", None)


def _leaf_deleted(scene: Scene) -> Trace:
    scene.touch("checkpoint_leaves")
    row = scene.victim("checkpoint_leaves")
    scene.delete("checkpoint_leaves", row)
    return _leaf(scene, row, "", None)


def _tail_cut(scene: Scene) -> Trace:
    """A tree ends where it ended once: rows and all. What was cut off was sealed."""
    entry = scene.victim("entries", f"r.part = 0 AND r.seq > 1 AND {scene.is_sealed}")
    scene.truncate(entry["root_id"], entry["position"] - 1)
    rest = [
        place(each)
        for each in scene.kept("entries", entry["root_id"])
        if each["position"] >= entry["position"]
    ]
    expected = [Expected(("checkpoint",), set(rest), "is missing")]
    return Trace({entry["root_id"].bytes}, expected, expected)


def _unsealed_tail_cut(scene: Scene) -> Trace:
    """The same, with what nothing has sealed; the lane has counted it all the same."""
    entry = scene.victim("entries", f"NOT ({scene.is_sealed})")
    lane = entry["lane"]
    scene.truncate(entry["root_id"], scene.sealed_positions[lane])
    expected = [Expected(("position",), {NOWHERE}, f"lane {lane}")]
    # In an export the operation after a gap is the one that is named, whosever it is.
    behind = [
        each
        for each in scene.all_kept("entries")
        if each["lane"] == lane and each["position"] > scene.sealed_positions[lane]
    ]
    offline = [*expected, Expected(("position",), {place(each) for each in behind})]
    return Trace({entry["root_id"].bytes}, expected, offline, whole=True)


def _tree_gone(scene: Scene) -> Trace:
    """A tree with all that it has."""
    entry = scene.victim("entries", scene.is_sealed)
    for table in ("entries", "budgets", "holds", "roots", "collections"):
        scene.do(f"DELETE FROM {table} WHERE root_id = %s", [entry["root_id"]])
    root_id = entry["root_id"]
    leaves = [place(each) for each in scene.kept("checkpoint_leaves", root_id)]
    first = [(tree, budget, 1) for tree, budget, _ in leaves]
    expected = [Expected(("checkpoint",), {*leaves, *first}, "is missing")]
    return Trace({root_id.bytes}, expected, expected, whole=True)


def _tree_put_in(scene: Scene) -> Trace:
    """A root that was never granted, where something was sealed, and hashed accordingly."""
    entry = scene.victim("entries", f"r.kind = {Kind.GRANT:d} AND {scene.is_sealed}")
    root_id = scene.id_in(entry["lane"])
    made = {"root_id": root_id, "budget_id": root_id, "operation_id": uuid.UUID(bytes=new_id())}
    scene.insert("entries", entry | made)
    scene.rehash(root_id, scene.entries(root_id))
    scene.truncate(root_id, entry["position"])
    scene.insert("roots", {"name": "forged", "lane": entry["lane"], "root_id": root_id})
    tree = root_id.bytes
    expected = [Expected(("checkpoint",), {(tree, tree, 1)}, "is not sealed")]
    return Trace({tree}, expected, expected)


_FORGERIES: Final[Mapping[str, Callable[[Scene], Trace]]] = {
    "an entry deleted": partial(_entry_deleted, "r.parts = 1"),
    "one part of an operation deleted": partial(_entry_deleted, "r.parts > 1"),
    "an operation deleted": _operation_deleted,
    "an entry inserted": _entry_inserted,
    "two entries swapped, by position": partial(_swapped, "position"),
    "two entries swapped, by seq": partial(_swapped, "seq"),
    "a budget deleted": partial(_row_deleted, "budgets"),
    "a budget inserted": _budget_inserted,
    "a hold deleted": partial(_row_deleted, "holds"),
    "a hold inserted": _hold_inserted,
    "a root's name deleted": partial(_row_deleted, "roots"),
    "a second name for a root": _name_inserted,
    "a name that leads to nothing": _name_of_nothing,
    "a collection deleted": partial(_row_deleted, "collections"),
    "a forged balance of a budget, which adds up": partial(_balances_forged, "budgets"),
    "the same in a tree as deep as may be": partial(_balances_forged, "budgets", deep=True),
    "a forged balance in an entry, which adds up": partial(_balances_forged, "entries"),
    "the same entry in a tree as deep as may be": partial(_balances_forged, "entries", deep=True),
    "an entry altered, and the chain hashed again": _chain_rehashed,
    "the same chain in a tree as deep as may be": partial(_chain_rehashed, deep=True),
    "a truncated tail, rows and all, that was sealed": _tail_cut,
    "a truncated tail, rows and all, that was not": _unsealed_tail_cut,
    "a tree gone with all its rows": _tree_gone,
    "a tree put in, hashed accordingly": _tree_put_in,
    "a forged Merkle root": _root_forged,
    "a checkpoint deleted": _checkpoint_deleted,
    "the last checkpoint deleted": _last_checkpoint_deleted,
    "two checkpoints swapped": _checkpoints_swapped,
    "a leaf deleted": _leaf_deleted,
    "all checkpoints made anew over an altered entry, with the old signatures": partial(
        _sealed_anew, None
    ),
}


# --- what only a published checkpoint tells ---


def _last_checkpoint_gone(scene: Scene) -> Trace:
    """With its leaves: as if it had never been sealed."""
    row = scene.checkpoints[-1]
    scene.touch("checkpoint_leaves")
    scene.delete("checkpoints", row)
    scene.do("DELETE FROM checkpoint_leaves WHERE number = %s", [row["number"]])
    return _published(scene, row, {scene.victim("entries")["root_id"].bytes}, whole=False)


def _published(scene: Scene, row: Row, trees: set[bytes], *, whole: bool) -> Trace:
    words = f"checkpoint {row['number']}: it was published, and is missing"
    expected = [Expected(("checkpoint",), {NOWHERE}, words)]
    return Trace(trees, expected, expected, whole=whole)


def _cut_off(scene: Scene) -> Trace:
    """The last checkpoint with all that it has sealed, and all that came later: the ledger in its past."""
    *_, before, row = scene.checkpoints
    scene.touch("checkpoint_leaves", "lanes")
    scene.delete("checkpoints", row)
    scene.do("DELETE FROM checkpoint_leaves WHERE number = %s", [row["number"]])
    trees = _cut_lanes(scene, dict(enumerate(before["positions"])))
    return _published(scene, row, trees, whole=True)


def _cut_lanes(scene: Scene, positions: Mapping[int, int]) -> set[bytes]:
    """Take back everything behind some positions: the trees that it was in."""
    trees: set[uuid.UUID] = set()
    scene.touch("lanes")
    for lane, position in positions.items():
        found = scene.rows(
            "SELECT DISTINCT root_id FROM entries WHERE lane = %s AND position > %s",
            [lane, position],
        )
        for each in found:
            trees.add(each["root_id"])
            scene.truncate(each["root_id"], position)
        scene.do("UPDATE lanes SET position = %s WHERE lane = %s", [position, lane])
    return {tree.bytes for tree in trees}


_AGAINST_PUBLISHED: Final[Mapping[str, Callable[[Scene], Trace]]] = {
    "the last checkpoint deleted with its leaves": _last_checkpoint_gone,
    "the last checkpoint cut off with all that it has sealed, and all later": _cut_off,
}


# --- what nobody can tell ---


def _unsealed_rehashed(scene: Scene) -> Trace:
    entry = scene.victim("entries", f"NOT ({scene.is_sealed})")
    _rehashed(scene, entry)
    return Trace({entry["root_id"].bytes}, ())


def _unsealed_cut_off(scene: Scene) -> Trace:
    entry = scene.victim("entries", f"NOT ({scene.is_sealed})")
    lane = entry["lane"]
    return Trace(_cut_lanes(scene, {lane: scene.sealed_positions[lane]}), (), whole=True)


_LOST: Final[Mapping[str, tuple[Callable[[Scene], Trace], str]]] = {
    "an entry altered that nothing has sealed, and the chain hashed again": (
        _unsealed_rehashed,
        "until it is sealed, only those tell who were told its hash",
    ),
    "all of a lane cut off that nothing has sealed, rows and position too": (
        _unsealed_cut_off,
        "the ledger in its past: clients notice that were told a later position, and backups do",
    ),
}


def columns() -> Collection[str]:
    """All columns that the schema has."""
    return [f"{name}.{column.name}" for name, table in TABLES.items() for column in table.c]
