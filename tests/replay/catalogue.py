"""The incident catalogue, row by row: which scenario stands for it, or why a ledger cannot help.

Each row was read and judged by hand. Ids, clusters and whether a row is labelled a bug are the study's (arXiv
2606.04056); what an incident was is told behind its link.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("catalogue.csv")

REASONS = {
    "display": "A figure that is shown wrongly or not at all; nobody spends by it.",
    "counting": "Tokens are counted wrongly before a call, which fails or is trimmed; nothing is overspent.",
    "window": "A request exceeds the model's context window and is refused by the provider.",
    "truncated": "An answer, or a part of it, is cut off or lost: paid for once, and useless.",
    "no-spend": "Something is not done, or not done again, that should be; nothing more is spent.",
    "limit": "A limit is set too low: a ledger refuses as well.",
    "not-money": "Slow, or large on disk: what is used up is not billed by the call.",
    "parsing": "A message cannot be built or read; the call fails once.",
    "waiting": "Something hangs, or takes long; no call is made meanwhile.",
    "roadmap": "A wish without an incident.",
}
"""Why a ledger cannot help."""


@dataclass(frozen=True)
class Row:
    """An incident of the catalogue."""

    id: str
    cluster: str
    bug: bool
    url: str
    scenario: str
    """That stands for it; empty if a ledger cannot help."""
    reason: str
    """Why not; empty if it can."""


def rows() -> list[Row]:
    """All of them, in the catalogue's order."""
    with FILE.open(newline="", encoding="utf-8") as lines:
        return [
            Row(
                id=line["id"],
                cluster=line["cluster"],
                bug=line["bug"] == "1",
                url=line["url"],
                scenario="" if line["mapped_to"] in REASONS else line["mapped_to"],
                reason=line["mapped_to"] if line["mapped_to"] in REASONS else "",
            )
            for line in csv.DictReader(lines)
        ]


def clusters(found: list[Row]) -> Counter[str]:
    """How many there are of each cluster."""
    return Counter(row.cluster for row in found)


def cited(found: list[Row]) -> dict[str, list[Row]]:
    """The incidents that each scenario stands for."""
    by_scenario: dict[str, list[Row]] = {}
    for row in found:
        if row.scenario:
            by_scenario.setdefault(row.scenario, []).append(row)
    return by_scenario
