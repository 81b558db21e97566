"""What proves a right is compared in constant time, or looked up by its digest, everywhere on the server."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = Path(__file__).resolve().parent.parent / "server" / "peculium_server"
PROOFS = {"secret", "token", "token_id", "consumed", "api_key", "signature", "mac"}
"""Names of what somebody presents, or of what it is compared with."""
BY_VALUE = (ast.Eq, ast.NotEq)


def compared(source: str) -> Iterator[str]:
    """Each comparison by value of something with such a name, as it is written."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Compare) or not any(
            isinstance(op, BY_VALUE) for op in node.ops
        ):
            continue
        sides = [node.left, *node.comparators]
        # To compare with what is written in the code, such as nothing, tells nothing.
        if any(isinstance(side, ast.Constant) for side in sides):
            continue
        if any(_name(side) in PROOFS for side in sides):
            yield ast.unparse(node)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        # A column of a table is looked up by its index.
        column = isinstance(node.value, ast.Attribute) and node.value.attr == "c"
        return "" if column else node.attr
    return node.id if isinstance(node, ast.Name) else ""


def test_no_proof_of_a_right_is_compared_byte_by_byte() -> None:
    found = [
        f"{path.relative_to(SERVER)}: {comparison}"
        for path in sorted(SERVER.rglob("*.py"))
        for comparison in compared(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "budget.token == proof.token_id",
        "x = token_id != hold.token",
        "if secret == given: pass",
    ],
)
def test_one_that_is_would_be_found(source: str) -> None:
    assert list(compared(source))


@pytest.mark.parametrize(
    "source",
    [
        "compare_digest(budget.token, token_id)",
        "token == b''",
        "token is None",
        "entries.c.token == keys.c.token",
    ],
)
def test_others_are_not(source: str) -> None:
    assert not list(compared(source))
