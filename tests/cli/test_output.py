"""How findings are told, whether a server or an export has them."""

from __future__ import annotations

import pytest

from peculium_server.cli.output import finding_json, print_findings
from peculium_server.core.refusals import id_text
from peculium_server.core.verify import Finding

TREE, BUDGET = b"t" * 16, b"b" * 16


@pytest.mark.parametrize(
    ("tree", "budget", "seq", "where"),
    [
        (TREE, BUDGET, 7, f"{id_text(TREE)}/{id_text(BUDGET)} entry 7: "),
        (TREE, b"", 0, f"{id_text(TREE)}: "),
        (b"\x01", b"\x02\x03", 0, "01/0203: "),
        (b"", b"", 0, ""),
    ],
)
def test_a_finding_is_told_with_its_place_even_if_what_is_in_a_file_is_no_id(
    tree: bytes, budget: bytes, seq: int, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding(tree, budget, seq, "chain", "broken")
    print_findings("8 entries", [finding])
    assert capsys.readouterr().out.splitlines() == [
        "NOT verified: 8 entries; the first finding of each tree:",
        f"  {where}chain: broken",
    ]
    told = finding_json(finding)
    ids = [told[name] for name in ("root_id", "budget_id") if told[name] is not None]
    assert where.startswith("/".join(ids))
