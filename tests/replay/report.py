"""The page about incidents, from a replay's JSON: `python -m tests.replay.report FILE`.

Nothing in it is written by hand but words.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.bench.report import table, text
from tests.replay import catalogue, charts
from tests.replay.figures import OURS, Cell, Replay, wilson
from tests.replay.findings import KEY, REDIS, findings

__all__ = ["text", "write"]

ROOT = Path(__file__).parents[2]

METHOD = """\
- The **oracle** is a provider's process of its own, which speaks HTTP, keeps the true bill, and knows nothing of
  budgets. Overshoot is its bill less the cap, never what anybody's books say. A token costs one unit.
- **Agents** run in four processes and begin at the same moment, apart by up to 3 ms by chance from a fixed seed.
  Each makes its calls one after the other until one is refused. Its provider's client tries again by itself where
  the scenario says so.
- A call is **useful** if its answer reached an agent that lived to use it, also beyond the cap: whoever is over has
  more of them. A refusal is **false** if at the end the call would have fitted into what was not billed.
- **Stranded** is money that is neither billed nor free by the contestant's own books: at the end, and in brackets
  after holds have lapsed and the provider's bill was gone through, which only a ledger of holds can do.
  **Invented** is what the books call free and is not there.
- **p50** and **p99** are what permission and settlement of a call take beside the provider's part. All processes
  share one small machine, with the data in memory, and four trials run at a time, so these compare contestants in this run, and nothing else; see
  [performance](performance.md).
- Intervals are Wilson's, 95 %. With none of 30 trials over the cap, up to 11 % would still be within the interval.

The contestants, each as its users would write it: a store that cannot be reached permits nothing; a lost connection
is made again and what was asked is asked once more; a call that failed is not charged for; usage that is missing
counts as nothing."""

METHOD_LITELLM = """\
LiteLLM's proxy is the real one, from its package, with its own defaults but that it leaves trying again to the agents' client, in
front of the same provider and with a Redis if there is one; agents call it in place of the provider, with a key. Keys come from `custom_auth`, since its own need its
database, and all that follows is its code: `max_budget` of the key, which `custom_auth_run_common_checks` asks for; the same with
`fail_closed_budget_enforcement`; and `model_max_budget` of the key. An agent's estimate is the `max_tokens` of its call, and only
what is written has a price, so that LiteLLM's estimate is the agent's. It plays those scenarios that need neither a restart,
which takes it many seconds, nor shares of a budget, which it does not have; its p50 and p99 have its own part of
passing the call on."""

_NOT_RUN = (
    (
        "- LiteLLM's budgets of virtual keys, teams and users as they are kept in its database, and its restart: its client for"
        " PostgreSQL, prisma, downloads a program when it is first used, and where that cannot be had the proxy does not"
        " start with a database. `litellm_settings.max_budget` for the whole proxy is read from that database, too. Its"
        " provider and tag budgets, and those of its Router in each process, are the same code as a key's budget for a model."
    ),
    (
        "- A ledger that was restored to its past, and failing over to an asynchronous replica: clients that lived"
        " through it [refuse to go on](reference/recovery.md#the-ledger); what was acknowledged since may be spent again"
        " by others."
    ),
    (
        "- Tokens of an older epoch, after Recover: there is nothing to compare with. The rule is in"
        " [authority](concepts/authority.md#fencing), and tested."
    ),
)

AGAIN = """\
## Again

    make replay             # everything, half an hour; writes this page, and goes on where it was broken off
    make replay SLICE=1     # see that it runs
    make replay ONLY=S1,D2  # some scenarios, with LITELLM=1 against LiteLLM, too; this page stays as it is

Every trial: [replay.json](incidents/replay.json). Redis takes part if there is a `redis-server` on
the path; LiteLLM is installed from `tests/replay/litellm.lock` into an environment of its own."""


def write(file: Path, docs: Path) -> None:
    """Write the page, its charts and its figures from a run's JSON."""
    replay = Replay(json.loads(file.read_text()), catalogue.rows())
    folder = docs / "incidents"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "replay.json").write_text(text(replay.data))
    (folder / "overshoot.svg").write_text(charts.overshoot(replay))
    (folder / "utilisation.svg").write_text(charts.utilisation(replay))
    (folder / "stranded.svg").write_text(charts.stranded(replay.data["stranded"]))
    (docs / "incidents.md").write_text(page(replay))


def page(replay: Replay) -> str:
    """The whole page."""
    return (
        "\n\n".join(
            [
                "<!-- Written by `python -m tests.replay.report`; do not edit. -->\n# Incidents, replayed",
                *_summary(replay),
                "## Findings\n\n" + "\n\n".join(findings(replay)),
                *_pictures(),
                "## Method\n\n" + METHOD,
                *([METHOD_LITELLM] if KEY in replay.contestants else []),
                *_cells(replay),
                *_margins(replay),
                *_catalogue(replay),
                *_not_run(replay),
                AGAIN,
            ]
        )
        + "\n"
    )


def _summary(replay: Replay) -> Iterator[str]:
    data, machine = replay.data, replay.data["machine"]
    rows = len(replay.rows)
    yield (
        f"The {rows} incidents of the catalogue of arXiv 2606.04056, and faults of a fleet that the study does not"
        f" have, as {len(replay.scenarios)} scenarios, each played {data['trials']} times against what people use today. Run: {data['begun']}, {data['seconds']:,.0f} s,"
        f" {machine['cores']} cores, {machine['processor']}, Python {machine['python']}, PostgreSQL"
        f" {machine['postgresql']['server_version']}."
    )
    line = replay.line()
    preventable = [name for name in replay.scenarios if replay.preventable(name)]
    lines = []
    for name, title in data["contestants"]:
        over = line["overshoot_trials"][name]
        trials = sum(
            replay.cells[each, name].trials for each in preventable if (each, name) in replay.cells
        )
        cells = [cell for (_, who), cell in replay.cells.items() if who == name]
        kept = any(cell.kept for cell in cells)
        low, high = wilson(over, trials)
        lines.append(
            [
                title,
                f"{over:,} of {trials:,} ({low:.1%} … {high:.1%})",
                f"{replay.total(name, preventable=False):,}",
                f"{line['useful_calls'][name]:,}",
                f"{sum(cell.false_refusals * cell.trials for cell in cells):,.0f}",
                (
                    f"{sum(cell.stranded * cell.trials for cell in cells):,.0f}"
                    f" ({line['stranded'][name]:,})"
                    if kept
                    else "no books"
                ),
                f"{sum(cell.invented * cell.trials for cell in cells):,.0f}"
                if kept
                else "no books",
            ]
        )
    yield table(
        [
            "contestant",
            "trials over the cap, where a ledger can prevent it",
            "over the cap where none can",
            "useful calls",
            "false refusals",
            "stranded (after the bill)",
            "invented",
        ],
        lines,
    )
    problems = replay.problems
    yield (
        "In every scenario that a ledger can prevent Peculium stayed within the cap, and in the others within"
        " its documented bound."
        if not problems
        else "**Peculium let through more than it says:** " + "; ".join(problems) + "."
    )


def _pictures() -> Iterator[str]:
    for name, words in (
        ("overshoot", "overshoot against agents"),
        ("utilisation", "use of the cap against the cap"),
        ("stranded", "money stranded after a crash"),
    ):
        yield f"![{words}](incidents/{name}.svg)"
    yield (
        "In the last, holds lapse after one second, the lease of a share ends after two, and the bill is gone through at three;"
        " what would lie on each other is drawn a little apart in all of them."
    )


def _cells(replay: Replay) -> Iterator[str]:
    yield "## Every scenario"
    cited = catalogue.cited(list(replay.rows))
    for name, scenario in replay.scenarios.items():
        bound = scenario["bound"]
        words = [f"### {name}: {scenario['title']}", f"Cap {scenario['cap']:,}."]
        if bound != 0:
            limit = "without a bound" if bound is None else f"at most {bound:,} over"
            words.append(f"Not preventable by a ledger, {limit}: {scenario['why']}.")
        if name in cited:
            ids = ", ".join(f"[{row.id}]({row.url})" for row in cited[name])
            words.append(f"Stands for {ids}.")
        elif name.startswith("D"):
            words.append("A fault of a fleet; the catalogue has none of it.")
        yield words[0] + "\n\n" + " ".join(words[1:])
        lines = [
            _line(replay.cells[name, who])
            for who in replay.contestants
            if (name, who) in replay.cells
        ]
        yield table(
            [
                "",
                "over the cap",
                "by (median, most)",
                "useful calls",
                "cap used",
                "false refusals",
                "stranded (after the bill)",
                "invented",
                "p50 / p99 ms",
            ],
            lines,
        )


def _line(cell: Cell) -> list[str]:
    low, high = wilson(cell.over, cell.trials)
    times = "-"
    if cell.p50_ms is not None and cell.p99_ms is not None:
        times = f"{cell.p50_ms:.1f} / {cell.p99_ms:.1f}"
    return [
        f"**{cell.contestant}**" if cell.contestant == OURS else cell.contestant,
        f"{cell.over} of {cell.trials} ({low:.0%} … {high:.0%})",
        f"{cell.overshoot:,.0f}, {cell.overshoot_most:,}" if cell.over else "-",
        f"{cell.calls:.1f}",
        f"{cell.used:.0%}",
        f"{cell.false_refusals:.1f}",
        f"{cell.stranded:.0f} ({cell.stranded_later:.0f})" if cell.kept else "-",
        f"{cell.invented:.0f}" if cell.kept else "-",
        times,
    ]


def _margins(replay: Replay) -> Iterator[str]:
    outcomes = replay.data["margins"]
    caps = [each["calls"] for each in outcomes[0]["capped"]]
    yield (
        "## How much to reserve\n\n"
        "Margins on a real trace of 8,819 requests ([its source](../server/peculium_server/demo/data/README.md)). The trace"
        " tells tokens and no text: the prompt is counted exactly, but for the first row, which has four bytes for a token and"
        " reserves one token for each. `max_tokens` is 2,048. *Set aside* is the money reserved for each that was billed; the mean"
        " over calls of the same is beside it. *Short* is what calls cost beyond their holds, as a share of all."
        " The last columns are the share of a cap that was used when the first call was refused, with 32 calls in flight, for caps of so many"
        " calls of the mean cost; nothing was overrun by more than shown in brackets."
    )
    yield table(
        ["margin", "set aside", "mean over calls", "enough for", "short"]
        + [f"used of a cap of {calls} calls" for calls in caps],
        [
            [
                outcome["name"],
                f"{outcome['over_reservation']:.2f}",
                f"{outcome['over_reservation_per_call']:.2f}",
                f"{outcome['coverage']:.2%}",
                f"{outcome['short']:.2%}",
                *(f"{each['used']:.0%} ({each['overrun']:.1%})" for each in outcome["capped"]),
            ]
            for outcome in outcomes
        ],
    )
    twice = next(each for each in outcomes if each["name"].startswith("twice"))
    alike, together = replay.margin("coverage"), replay.margin("together")
    yield (
        f"The study's margin of two sets {twice['over_reservation_per_call']:.2f} aside in the mean over calls (the study says 2.11) and"
        f" {twice['over_reservation']:.2f} of the money, is enough for {twice['coverage']:.2%} of calls and short by {twice['short']:.2%}."
        f" By the study's own measure, the mean over calls, the estimator that covers all sizes together sets"
        f" **{together['over_reservation_per_call']:.2f}** aside, told to cover {replay.data['together']:.1%}: it covers"
        f" {together['coverage']:.2%}, and sets {together['over_reservation']:.2f} of the money aside. What its misses cost is"
        f" {together['short']:.2%} of all. Who wants to be short by less, too, has each size covered alike: told {replay.data['coverage']:.1%}, it"
        f" covers {alike['coverage']:.2%}, is short by {alike['short']:.2%}, and sets {alike['over_reservation']:.2f} of the money aside, but"
        f" {alike['over_reservation_per_call']:.2f} in the mean over calls: small calls, which cost next to nothing, get relatively large holds,"
        " since what is written does not depend on the prompt in this trace. Money is what a cap is made of, so that decides how many"
        " calls fit at once. No margin is the best by every measure; the rows are the frontier. Of the adaptive ones all count"
        " that they begin with the limit, since they know nothing at first."
    )


def _catalogue(replay: Replay) -> Iterator[str]:
    rows = list(replay.rows)
    yield (
        "## The catalogue\n\n"
        f"{len(rows)} rows, of which {sum(row.bug for row in rows)} are labelled bugs; the study's headline count is 63. Each was read and"
        " mapped by hand."
    )
    lines = []
    for cluster, count in catalogue.clusters(rows).most_common():
        inside = [row for row in rows if row.cluster == cluster]
        mapped = [row for row in inside if row.scenario]
        scenarios = sorted({row.scenario for row in mapped})
        lines.append([cluster, count, len(mapped), len(inside) - len(mapped), ", ".join(scenarios)])
    yield table(["cluster", "rows", "replayed", "a ledger cannot help", "scenarios"], lines)
    yield "Where a ledger cannot help:"
    yield table(
        ["reason", "rows"],
        [
            [words, ", ".join(f"[{row.id}]({row.url})" for row in rows if row.reason == reason)]
            for reason, words in catalogue.REASONS.items()
        ],
    )


def _not_run(replay: Replay) -> Iterator[str]:
    words = [*_NOT_RUN]
    if KEY not in replay.contestants:
        words.insert(0, "- LiteLLM: it was not asked to take part.")
    if REDIS not in replay.contestants:
        words.insert(0, "- Redis: there was no `redis-server` on the path.")
    yield "## Not run\n\n" + "\n".join(words)


def main() -> int:
    """Write the page from a file."""
    parser = argparse.ArgumentParser(prog="python -m tests.replay.report", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    given = parser.parse_args()
    write(given.file, given.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
