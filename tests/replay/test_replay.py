"""The catalogue is whole, scenarios say what they claim, and figures are those of the trials."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random

import httpx
import pytest
from hypothesis import given, strategies as st

from tests.replay import catalogue, litellm, margins, report
from tests.replay.agents import told_usage
from tests.replay.counters import Budgets
from tests.replay.figures import Cell, Replay, fitting, wilson
from tests.replay.kept import Kept
from tests.replay.plays import Custody, Scenario
from tests.replay.pool import Pool
from tests.replay.provider import Fate, Script
from tests.replay.scenarios import SLICE, all_scenarios

DOCS = Path(__file__).parents[2] / "docs"
CLUSTERS = {
    "M-retry-loop": 27,
    "M-cost-observability": 22,
    "M-context-amplification": 13,
    "M-storage-amplification": 13,
    "M-budget-primitive-missing": 12,
    "M-delegation-fanout": 11,
    "providerOptions-silently-dropped": 6,
    "M-multimodal-cost-amplification": 6,
}
"""As the study's catalogue has them."""


def scenario(name: str) -> Scenario:
    return next(each for each in all_scenarios() if each.name == name)


# --- the catalogue ---


def test_every_row_is_there_once_and_clusters_have_as_many_as_the_study_counts() -> None:
    rows = catalogue.rows()
    assert len({row.id for row in rows}) == len(rows) == 110
    assert catalogue.clusters(rows) == CLUSTERS
    assert sum(row.bug for row in rows) == 82


def test_every_row_leads_to_a_scenario_or_to_a_reason() -> None:
    names = {each.name for each in all_scenarios()}
    for row in catalogue.rows():
        assert bool(row.scenario) != bool(row.reason), row
        assert not row.scenario or row.scenario in names, row
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", row.url), row


def test_every_reason_is_some_rows() -> None:
    assert {row.reason for row in catalogue.rows() if row.reason} == catalogue.REASONS.keys()


# --- scenarios ---


def test_scenarios_have_names_of_their_own_and_the_slice_is_among_them() -> None:
    names = [each.name for each in all_scenarios()]
    assert len(set(names)) == len(names)
    assert set(SLICE) <= set(names)


def test_all_eight_clusters_and_the_faults_are_played() -> None:
    names = [each.name for each in all_scenarios()]
    for family in (*(f"S{number}" for number in range(1, 9)), *(f"D{n}" for n in range(1, 13))):
        assert any(re.match(rf"{family}\b|{family}[a-z-]", name) for name in names), family


@pytest.mark.parametrize("each", all_scenarios(), ids=lambda each: each.name)
def test_what_a_ledger_cannot_prevent_says_why(each: Scenario) -> None:
    assert each.preventable == (each.why == "")
    assert all(agent.name for act in each.acts for agent in act.agents)
    assert len({agent.name for act in each.acts[:1] for agent in act.agents}) == len(
        each.acts[0].agents
    )


def test_a_share_that_is_handed_out_twice_is_used_by_two_processes() -> None:
    twice = scenario("D7")
    assert twice.custody is Custody.TWICE
    assert {agent.process for agent in twice.acts[0].agents} == {0, 1}


# --- figures ---


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(0, 30, 0.0, 0.1135), (30, 30, 0.8865, 1.0), (15, 30, 0.3315, 0.6685)],
)
def test_the_interval_is_wilsons(hits: int, trials: int, low: float, high: float) -> None:
    assert list(wilson(hits, trials)) == pytest.approx([low, high], abs=1e-3)


@given(st.lists(st.integers(1, 50), max_size=8), st.integers(-20, 200))
def test_a_refusal_is_false_if_it_would_have_fitted_beside_the_others(
    refused: list[int], rest: int
) -> None:
    count = fitting(refused, rest)
    fits = sorted(refused)
    assert sum(fits[:count]) <= max(rest, 0)
    assert count == len(fits) or sum(fits[: count + 1]) > rest


def trial(billed: int, left: int | None, **more: object) -> dict[str, object]:
    return {
        "billed": billed,
        "calls": 1,
        "refused": [],
        "left": left,
        "left_later": left,
        "lapse_seconds": None,
        **more,
    }


def cell(*trials: dict[str, object], cap: int = 100) -> Cell:
    told = {"scenario": "s", "contestant": "c", "p50_s": None, "p99_s": None, "trials": trials}
    return Cell.of(told, cap)


def test_overshoot_is_what_the_provider_has_billed_beyond_the_cap() -> None:
    found = cell(trial(100, 0), trial(101, 0), trial(140, 0), trial(20, 80))
    assert (found.over, found.overshoot, found.overshoot_most) == (2, 20.5, 40)
    assert found.used == pytest.approx((1 + 1 + 1 + 0.2) / 4)


def test_money_is_stranded_if_neither_billed_nor_free_and_invented_if_free_and_gone() -> None:
    stranded = cell(trial(20, 50, left_later=75))
    assert (stranded.stranded, stranded.stranded_later, stranded.invented) == (30, 5, 0)
    invented = cell(trial(90, 40))
    assert (invented.stranded, invented.invented) == (0, 30)
    over = cell(trial(130, 5))
    assert (over.stranded, over.invented) == (0, 5)
    assert not cell(trial(20, None)).kept


def replayed(billed: int, bound: int | None) -> Replay:
    told = {
        "scenarios": [{"name": "s", "cap": 100, "bound": bound}],
        "contestants": [["Peculium", "P"]],
        "cells": [
            {
                "scenario": "s",
                "contestant": "Peculium",
                "p50_s": None,
                "p99_s": None,
                "trials": [trial(billed, 0)],
            }
        ],
    }
    return Replay(told, [])


def test_more_than_the_documented_bound_is_a_problem() -> None:
    assert replayed(100, 0).problems == []
    assert len(replayed(101, 0).problems) == 1
    assert replayed(101, 1).problems == []
    assert len(replayed(102, 1).problems) == 1
    assert replayed(10**9, None).problems == []


# --- what is played with ---


def test_a_script_survives_its_way_and_other_words_are_a_call_of_which_nothing_is_known() -> None:
    sent = Script(trial="t", call="c", estimate=1, cost=2, reports=None, fates=(Fate.CUT,))
    assert Script.parsed(sent.prompt()) == sent
    assert Script.parsed("Hello!").trial == ""


def test_the_pool_refuses_what_does_not_fit_and_takes_back_what_was_not_used() -> None:
    pool = Pool()
    assert pool.do("make", "n", 60) == 60
    assert pool.do("reserve", "n", 31) == 29
    assert pool.do("reserve", "n", 31) == -1
    assert pool.do("refund", "n", 8) == 37
    assert pool.do("make", "n", 60) == 37
    assert pool.do("stop", "n", 0) == 0


@given(st.integers(0, 2**32))
def test_the_pool_never_gives_more_than_it_has(seed: int) -> None:
    chance, pool = Random(seed), Pool()
    pool.do("make", "n", 100)
    held: list[int] = []
    for _ in range(50):
        amount = chance.randrange(1, 40)
        if pool.do("reserve", "n", amount) >= 0:
            held.append(amount)
        elif held:
            pool.do("refund", "n", held.pop())
        assert pool.do("look", "n", 0) + sum(held) == 100


# --- margins ---


@pytest.fixture(scope="module")
def outcomes() -> Sequence[margins.Outcome]:
    return margins.measure(caps=())


def test_the_adaptive_margin_is_safer_than_twice_the_cost_and_sets_less_aside(
    outcomes: Sequence[margins.Outcome],
) -> None:
    by_name = {outcome.name: outcome for outcome in outcomes}
    twice = by_name["twice the expected cost"]
    ours = by_name[f"adaptive, coverage {margins.COVERAGE:g}"]
    assert ours.coverage >= max(twice.coverage, margins.COVERAGE - 0.001)
    assert ours.short <= twice.short
    assert ours.over_reservation < min(twice.over_reservation, 2.11)


def test_coverage_of_all_sizes_together_beats_the_studys_margin_by_its_own_measure(
    outcomes: Sequence[margins.Outcome],
) -> None:
    by_name = {outcome.name: outcome for outcome in outcomes}
    twice = by_name["twice the expected cost"]
    ours = by_name[f"adaptive, of all sizes together, coverage {margins.TOGETHER:g}"]
    assert ours.coverage >= twice.coverage
    assert ours.over_reservation_per_call < min(twice.over_reservation_per_call, 2.11)
    assert ours.over_reservation < twice.over_reservation


def test_static_margins_never_fall_short(outcomes: Sequence[margins.Outcome]) -> None:
    static = [outcome for outcome in outcomes if outcome.name.startswith("static")]
    assert [outcome.coverage for outcome in static] == [1.0, 1.0]
    assert all(outcome.over_reservation > 4 for outcome in static)


# --- the page ---


def test_more_of_each_cap_is_used_with_the_adaptive_margin_than_with_twice_the_cost() -> None:
    told = json.loads((DOCS / "incidents" / "replay.json").read_text())["margins"]
    used = {each["name"]: [cap["used"] for cap in each["capped"]] for each in told}
    ours, twice = used[f"adaptive, coverage {margins.COVERAGE:g}"], used["twice the expected cost"]
    assert len(ours) == len(margins.CAPS)
    assert all(one > other for one, other in zip(ours, twice, strict=True))


def test_the_page_is_what_its_figures_make_and_the_figures_keep_the_promise() -> None:
    data = json.loads((DOCS / "incidents" / "replay.json").read_text())
    replay = Replay(data, catalogue.rows())
    assert replay.problems == []
    assert data["whole"]
    assert list(replay.scenarios) == [each.name for each in all_scenarios()]
    assert {found.trials for found in replay.cells.values()} == {data["trials"]}
    assert (DOCS / "incidents.md").read_text() == report.page(replay)


# --- a run that was broken off ---


def test_what_was_played_is_kept_until_the_run_is_over(tmp_path: Path) -> None:
    file = tmp_path / "played.jsonl"
    one = {"scenario": "S1", "contestant": "Peculium", "trials": []}
    kept = Kept(file, "run", "then")
    kept.add(one)
    with file.open("a") as broken:
        broken.write('{"scenario": "S2", "contes')
    again = Kept(file, "run", "now")
    assert (again.get("S1", "Peculium"), len(again), again.begun) == (one, 1, "then")
    again.add({**one, "scenario": "S2"})
    assert len(Kept(file, "run", "now")) == 2
    again.forget()
    assert not file.exists()


def test_what_was_played_of_another_run_is_not_taken_over(tmp_path: Path) -> None:
    file = tmp_path / "played.jsonl"
    Kept(file, "run", "then").add({"scenario": "S1", "contestant": "Peculium"})
    other = Kept(file, "other", "now")
    assert (len(other), other.begun) == (0, "now")


# --- authority ---


def test_a_parent_that_has_given_everything_has_no_share_and_no_part_of_its_own() -> None:
    budgets = Budgets.of("t", scenario("S2e"))
    assert budgets.made == {"t": 300}
    assert list(budgets.shares) == [100, 100, 100, None]


def test_a_child_has_a_counter_of_its_own_beside_its_parents() -> None:
    budgets = Budgets.of("t", scenario("S2f"))
    assert budgets.made == {"t": 300, "t/child": 100}
    assert list(budgets.names) == ["t/child", "t", "t", "t"]


# --- streams ---


@pytest.mark.parametrize(
    ("content_type", "text", "total"),
    [
        ("application/json", '{"usage": {"total_tokens": 3}}', 3),
        ("application/json", "{}", None),
        (
            "text/event-stream",
            'data: {"usage": null}\n\ndata: {"usage": {"total_tokens": 4}}\n\ndata: [DONE]\n',
            4,
        ),
        ("text/event-stream", 'data: {"choices": []}\n\ndata: [DONE]\n', None),
    ],
)
def test_usage_is_read_from_an_answer_and_from_the_last_event_that_has_it(
    content_type: str, text: str, total: int | None
) -> None:
    usage = told_usage(httpx.Response(200, headers={"content-type": content_type}, text=text))
    assert (usage and usage["total_tokens"]) == total


# --- LiteLLM ---


def test_litellm_plays_scenarios_that_there_are() -> None:
    assert {each.name for each in all_scenarios()} >= litellm.SCENARIOS


def test_the_environment_that_litellm_runs_in_is_pinned_with_hashes() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", litellm.version())
