"""What the command line prints of where a budget comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.text import Text

from peculium import Delegation, TokenStep
from peculium_server.cli.amounts import show_amount
from peculium_server.cli.output import new_table, print_line, time_text, wide_console
from peculium_server.core.refusals import id_text


def delegation_json(delegation: Delegation) -> dict[str, Any]:
    """A level of the line, for machines."""
    return {
        "path": delegation.budget.path,
        "budget_id": id_text(delegation.budget.ref.budget_id),
        "made_at": time_text(delegation.made_by.at),
        "kind": delegation.made_by.kind,
        "operation_id": delegation.made_by.operation_id,
        "amount": delegation.amount,
        "by": delegation.by,
        "right": delegation.right,
        "token": None if delegation.token is None else delegation.token.hex(),
    }


def token_step_json(step: TokenStep) -> dict[str, Any]:
    """A step of the token, for machines."""
    return {
        "seq": step.seq,
        "at": time_text(step.at),
        "kind": step.kind,
        "operation_id": step.operation_id,
        "by": step.by,
        "consumed": None if step.consumed is None else step.consumed.hex(),
        "produced_fingerprint": None if step.produced is None else step.produced.hex(),
        "holder": step.holder,
    }


def print_delegations(delegations: Sequence[Delegation]) -> None:
    """Print who made each level, from the root downwards."""
    table = new_table(
        *("budget", "made", "by", "by right of"), right=("with",), whole=("operation",)
    )
    for each in delegations:
        table.add_row(
            Text(each.budget.path),
            time_text(each.made_by.at),
            Text(each.by),
            Text(_right(each)),
            show_amount(each.amount, each.budget.unit),
            each.made_by.operation_id,
        )
    wide_console().print(table)


def print_token_steps(steps: Iterable[TokenStep]) -> None:
    """Print what was done to the token and the holder."""
    print_line("")
    table = new_table(
        *("at", "seq", "kind", "by", "consumed", "holder from then on"), whole=("operation",)
    )
    for step in steps:
        table.add_row(
            time_text(step.at),
            str(step.seq),
            step.kind.lower(),
            Text(step.by),
            "" if step.consumed is None else _short(step.consumed),
            Text(step.holder or "whoever has the token"),
            step.operation_id,
        )
    wide_console().print(table)


def _right(delegation: Delegation) -> str:
    if delegation.token is not None:
        return f"token {_short(delegation.token)}"
    return "the role admin" if delegation.right == "role" else f"holder {delegation.by}"


def _short(token_id: bytes) -> str:
    return f"{token_id[:6].hex()}…"
