"""What the campaign rests on: that it leaves out no column, and that not every answer satisfies it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from peculium_server.core.verify import Finding
from peculium_server.signing import SigningKey
from peculium_server.store.schema import metadata
from tests.tampering.__main__ import Verdict, judged
from tests.tampering.auditing import Audited, Expected
from tests.tampering.scene import OF_TREES
from tests.tampering.tamperings import (
    BESIDE,
    NOWHERE,
    UNNOTICED,
    Tampering,
    Trace,
    all_tamperings,
)

PAGE = Path(__file__).parents[2] / "docs" / "operating" / "tampering.md"
TREE, OTHER, BUDGET = b"t" * 16, b"o" * 16, b"b" * 16
HERE = (TREE, BUDGET, 7)
NAMED = Finding(*HERE, "chain", "the hash is not that of the entry and the one before")
EXPECTED = [Expected(("chain", "digest"), {HERE}, "the hash")]


def test_every_column_is_tampered_with_or_carries_no_claim() -> None:
    keys: Sequence[SigningKey] = [None]  # type: ignore[list-item]
    names = {each.name for each in all_tamperings(keys, keys[0])}
    columns = {
        f"{name}.{column.name}"
        for name, table in metadata.tables.items()
        for column in table.c
        if name not in BESIDE
    }
    assert columns - names == UNNOTICED.keys()
    assert metadata.tables.keys() >= BESIDE.keys()
    assert all(len(why) > 20 for why in (*UNNOTICED.values(), *BESIDE.values()))


def test_rows_are_altered_that_are_not_like_others() -> None:
    keys: Sequence[SigningKey] = [None]  # type: ignore[list-item]
    names = {each.name for each in all_tamperings(keys, keys[0])}
    columns = [
        (f"{name}.{column.name}", name, column)
        for name in OF_TREES
        for column in metadata.tables[name].c
    ]
    wanted = {f"{full}, where there was none" for full, _, column in columns if column.nullable}
    wanted |= {f"{full}, of a later part" for full, table, _ in columns if table == "entries"}
    assert wanted <= names


def test_the_page_says_of_each_table_and_column_that_nobody_verifies_it() -> None:
    page = PAGE.read_text()
    assert [name for name in (*UNNOTICED, *BESIDE) if f"`{name}`" not in page] == []


def said(
    *findings: Finding, expected: Sequence[Expected] = EXPECTED, **how: object
) -> tuple[list[str], Tampering]:
    """What is wrong with an answer to a tampering."""
    tampering = Tampering("a hash", lambda _: Trace(set(), ()), **how)  # type: ignore[arg-type]
    trace = Trace({TREE}, expected)
    return list(judged(tampering, "online", trace, Audited(findings, 0.1), expected)), tampering


def test_a_finding_that_names_it_is_enough() -> None:
    problems, tampering = said(NAMED)
    assert (problems, tampering.found) == ([], ["online: chain"])


@pytest.mark.parametrize(
    "finding",
    [
        NAMED._replace(rule="fold"),
        NAMED._replace(seq=8),
        NAMED._replace(budget_id=TREE),
        NAMED._replace(root_id=OTHER),
        NAMED._replace(detail="something is wrong"),
        Finding(*NOWHERE, "refused", "INTERNAL"),
    ],
)
def test_that_something_was_found_is_not_enough(finding: Finding) -> None:
    [problem], tampering = said(finding)
    assert problem.startswith("online: it is not named; what is found is Finding(")
    assert tampering.found == []


def test_that_nothing_was_found_is_told() -> None:
    [problem], _ = said()
    assert problem.endswith("what is found is nothing")


def test_who_blames_another_tree_too_is_told() -> None:
    [problem], _ = said(NAMED, NAMED._replace(root_id=OTHER))
    assert problem.startswith("online: another tree is blamed")


@pytest.mark.parametrize("rule", ["position", "batch"])
def test_an_operation_behind_a_gap_and_one_of_a_batch_may_be_named_whosever_it_is(
    rule: str,
) -> None:
    assert said(NAMED, NAMED._replace(root_id=OTHER, rule=rule))[0] == []


def test_what_only_a_published_hash_tells_is_told_by_nothing_else() -> None:
    told = Finding(*NOWHERE, "checkpoint", "checkpoint 3: it was published, and is missing")
    expected = [Expected(("checkpoint",), {NOWHERE}, "published")]
    assert said(told, expected=expected, published=True)[0] == []
    [problem], _ = said(told, NAMED, expected=expected, published=True)
    assert problem.startswith("online: it is found without what was published")


def test_what_cannot_be_found_is_not() -> None:
    assert said(expected=[], lost="nobody can")[0] == []
    [problem], _ = said(NAMED, expected=[], lost="nobody can")
    assert problem.startswith("online: it is found, which nobody thought")


def test_the_verdict_is_clean_only_if_all_was_found_and_nothing_else() -> None:
    clean = Verdict(entries=10, tamperings=3, found=3)
    assert clean.clean
    assert list(json.loads(clean.line())) == [
        *("entries", "verify_online_s", "verify_offline_s", "tamperings", "found", "false_alarms"),
    ]
    assert not Verdict(tamperings=3, found=2).clean
    assert not Verdict(tamperings=3, found=3, false_alarms=1).clean
    assert not Verdict(tamperings=3, found=3, problems=["something"]).clean
