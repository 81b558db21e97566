"""What a soak calls flat, and what it does not; and a short one."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults import soak
from tests.faults.soak import Left, Sample, not_flat, not_right, rate, trend, warm

RIGHT = Left(holds=0, leases=0, overshoot=0, verified=True)


def samples(change: Callable[[Sample], Sample] = lambda sample: sample) -> list[Sample]:
    """A quarter of an hour in which nothing grows beyond its noise, and what would be changed in it."""
    noise = random.Random(7)
    return [
        change(
            Sample(
                at=at,
                rss_mb=300 + noise.uniform(-5, 5) - (100 if at < 60 else 0),
                connections=40 + noise.randrange(5),
                descriptors=80 + noise.randrange(5),
                holds=20 + noise.randrange(20),
                operations=int(at * 150),
            )
        )
        for at in map(float, range(0, 905, 5))
    ]


def leaking(name: str, a_second: float) -> Callable[[Sample], Sample]:
    def change(sample: Sample) -> Sample:
        return replace(sample, **{name: getattr(sample, name) + int(sample.at * a_second)})

    return change


def test_noise_and_a_warm_up_are_flat() -> None:
    assert not_flat(samples()) == []


@pytest.mark.parametrize(
    ("name", "a_second", "told"),
    [
        ("rss_mb", 0.1, "memory"),
        ("connections", 0.05, "connections"),
        ("descriptors", 0.05, "descriptors"),
        ("holds", 0.1, "holds"),
    ],
)
def test_what_leaks_is_told(name: str, a_second: float, told: str) -> None:
    [problem] = not_flat(samples(leaking(name, a_second)))
    assert told in problem


def test_a_load_that_dies_down_is_told() -> None:
    def stop(sample: Sample) -> Sample:
        return replace(sample, operations=min(sample.operations, 600 * 150))

    [problem] = not_flat(samples(stop))
    assert "operations a second" in problem


def test_memory_is_told_by_least_squares_from_the_warm_up_on() -> None:
    steady = warm(samples(leaking("rss_mb", 1.0)))
    start, slope = trend(steady)
    assert steady[0].at == 180
    assert start == pytest.approx(480, abs=5)
    assert slope == pytest.approx(1.0, abs=0.05)
    assert rate(steady) == pytest.approx(150)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(RIGHT, holds=1),
        replace(RIGHT, leases=1),
        replace(RIGHT, overshoot=1),
        replace(RIGHT, verified=False),
    ],
)
def test_whatever_is_wrong_in_the_end_is_told(wrong: Left) -> None:
    assert len(not_right(wrong)) == 1
    assert not_right(RIGHT) == []


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where whoever may run PostgreSQL can read."""
    made = Path(tempfile.mkdtemp(prefix="peculium-soak-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.mark.timeout(240)
async def test_what_dying_agents_leave_behind_comes_to_an_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "LIFE_SECONDS", (2.0, 4.0))
    monkeypatch.setattr(soak, "SAMPLE_SECONDS", 1.0)
    figures, _ = await soak.soak(8, 7, folder)
    assert figures["deaths"] > 0
    assert figures["operations"] > 0
    assert (figures["holds_open_end"], figures["overshoot"], figures["verified"]) == (0, 0, True)
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 8
