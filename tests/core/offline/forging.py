"""A ledger in which everything has happened, exported, and one entry of it forged with all hashes made anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peculium_server.core import cbor
from peculium_server.core.encoding import decode_effect, encode_effect
from peculium_server.core.operations import Kind
from peculium_server.core.state import Entry
from peculium_server.core.verify import Finding
from tests.core.every_kind import lived
from tests.core.offline.exported import Exported
from tests.core.tampering import rehashed

LEDGER, ROOT = lived()
WHOLE = Exported.of(LEDGER)


def only(findings: Sequence[Finding]) -> Finding:
    assert len(findings) >= 1
    return findings[0]


def at(kind: Kind, part: int = 0, *, skip: int = 0, of: Sequence[Entry] = LEDGER.journal) -> int:
    """Where an entry of a kind is."""
    found = [i for i, entry in enumerate(of) if entry.kind is kind and entry.part == part]
    return found[skip]


def forged(index: int, **changes: Any) -> Exported:
    """An entry altered, and all hashes computed anew, as who knows the encoding could."""
    entries = list(LEDGER.journal)
    entries[index] = entries[index]._replace(**changes)
    return WHOLE._replace(entries=rehashed(entries))


def effect(index: int, **changes: Any) -> bytes:
    entry = LEDGER.journal[index]
    return encode_effect(decode_effect(entry.effect_bytes, entry.budget_id)._replace(**changes))


def request(index: int, keys: dict[int, Any]) -> bytes:
    """The request of an entry with other values of some keys; None: without it."""
    return asking(LEDGER.journal[index].request, keys)


def asking(asked: bytes | None, keys: dict[int, Any]) -> bytes:
    assert asked is not None
    said: Any = cbor.decode(asked)
    said.update(keys)
    return cbor.encode({key: value for key, value in said.items() if value is not None})


def breaks(exported: Exported, rule: str, index: int | None) -> Finding:
    """The first finding, which has to be of the rule and the entry."""
    finding = only(exported.findings())
    assert finding.rule == rule, finding
    if index is not None:
        entry = exported.entries[index]
        assert (finding.budget_id, finding.seq) == (entry.budget_id, entry.seq), finding
    return finding


def moved(index: int, also: Mapping[str, Any] | None = None, /, **by: int) -> Exported:
    """An entry after which the balances are others, as its changes say too; and more of its effect."""
    entry = LEDGER.journal[index]
    changes = decode_effect(entry.effect_bytes, entry.budget_id).changes
    told = changes._replace(**{name: getattr(changes, name) + more for name, more in by.items()})
    money = entry.money._replace(
        **{name: getattr(entry.money, name) + more for name, more in by.items()}
    )
    return forged(index, money=money, effect_bytes=effect(index, changes=told, **(also or {})))
