"""Charts as SVG, drawn on a ground of their own, so that they read on light and dark pages alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from xml.sax.saxutils import escape

from tests.bench.figures import Spread

_WIDTH, _HEIGHT = 760, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 56, 92
_INK, _GREY, _FAINT, _GROUND = "#24292f", "#57606a", "#d0d7de", "#ffffff"
_COLOURS = (
    *("#1f6feb", "#bf5b04", "#1a7f37", "#8250df", "#b3261e", _GREY),
    *("#0b7285", "#d63384"),
)
_APART = 2
"""How far points are apart that would lie on each other."""
_LETTER, _ROW = 7.0, 18
_BAR, _BAR_GAP, _BAR_LEFT = 24, 12, 300


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, Spread]]
    ours: bool = False
    """It is the one that others are compared with."""


_Place = tuple[float, float, float, float]
"""Where a point is: x, and y of its median, its least and its most."""


@dataclass(frozen=True)
class Bar:
    """A bar of a chart."""

    name: str
    value: Spread
    ours: bool


def lines(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    log_y: bool,
    log_x: bool = True,
    dots: bool = True,
) -> str:
    """Medians as points on lines, and from the least to the most as whiskers.

    Points that would lie on each other are drawn a little apart.
    """
    drawn = [one for one in series if one.points]
    ordered = sorted(drawn, key=lambda one: not one.ours)
    colours = {one.name: _COLOURS[n % len(_COLOURS)] for n, one in enumerate(ordered)}
    shown = {one.name: colours[one.name] for one in drawn}
    xs = sorted({x for one in drawn for x, _ in one.points})
    x_ticks = xs if log_x else _steps(xs[-1])
    top = max(value.high for one in drawn for _, value in one.points)
    low = min(value.low for one in drawn for _, value in one.points)
    y_ticks = _decades(low, top) if log_y else _steps(top)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x_at(value: float) -> float:
        if not log_x:
            return _LEFT + value / x_ticks[-1] * (right - _LEFT)
        if len(xs) == 1:
            return (_LEFT + right) / 2
        part = math.log(value / xs[0]) / math.log(xs[-1] / xs[0])
        return _LEFT + 24 + part * (right - _LEFT - 48)

    def y_at(value: float) -> float:
        if log_y:
            part = math.log(value / y_ticks[0]) / math.log(y_ticks[-1] / y_ticks[0])
        else:
            part = value / y_ticks[-1]
        return bottom - part * (bottom - _TOP)

    parts = []
    for tick in y_ticks:
        y = y_at(tick)
        parts += [
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="{_FAINT}"/>',
            text(_LEFT - 8, y + 4, f"{tick:,g}", anchor="end"),
        ]
    for x in x_ticks:
        parts.append(text(x_at(x), bottom + 18, f"{x:,.10g}", anchor="middle"))
    taken: Counter[tuple[int, int]] = Counter()
    drawings = []
    for number, one in enumerate(ordered):
        places = [
            (x_at(x), y_at(value.median), y_at(value.low), y_at(value.high))
            for x, value in one.points
        ]
        drawings.append(
            _line(
                *(one, colours[one.name], places),
                _apart(places, taken) if dots else [number] * len(places),
                dots=dots,
            )
        )
    # Ours is where it is, and nothing is drawn over it.
    parts += chain.from_iterable(reversed(drawings))
    parts += [
        text((_LEFT + right) / 2, bottom + 40, x_label, anchor="middle"),
        (
            f'<g transform="translate(18 {(_TOP + bottom) / 2}) rotate(-90)">'
            f"{text(0, 0, y_label, anchor='middle')}</g>"
        ),
        *legend(shown, _HEIGHT - 20),
    ]
    return page(title, _HEIGHT + _places(shown, _LEFT, right)[-1][1] * _ROW, parts)


def _apart(places: Sequence[_Place], taken: Counter[tuple[int, int]]) -> list[int]:
    """How many were drawn already where each point is to be."""
    found = []
    for x, median, _, _ in places:
        near = round(x), round(median / _APART)
        found.append(taken[near])
        taken[near] += 1
    return found


def _line(
    one: Series, colour: str, places: Sequence[_Place], apart: Sequence[int], *, dots: bool
) -> list[str]:
    """A line, so far above its points that it can be told from others."""
    heights = [
        median - _APART * before for (_, median, _, _), before in zip(places, apart, strict=True)
    ]
    path = " ".join(f"{at:.1f},{y:.1f}" for (at, *_), y in zip(places, heights, strict=True))
    width = 3 if one.ours else 2
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>']
    for (at, _, low, high), y in zip(places, heights, strict=True) if dots else ():
        if low != high:
            parts.append(
                f'<line x1="{at:.1f}" y1="{low:.1f}" x2="{at:.1f}" y2="{high:.1f}"'
                f' stroke="{colour}" stroke-width="1.5"/>'
            )
        parts.append(f'<circle cx="{at:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
    return parts


def legend(
    colours: Mapping[str, str], y: float, *, left: float = _LEFT, right: float = _WIDTH - _RIGHT
) -> list[str]:
    """What colours stand for, in as many rows as it takes; the first of them is at y."""
    parts = []
    for (name, colour), (x, row) in zip(
        colours.items(), _places(colours, left, right), strict=True
    ):
        at = y + row * _ROW
        parts += [
            f'<rect x="{x:.0f}" y="{at - 9}" width="12" height="10" rx="2" fill="{colour}"/>',
            text(x + 17, at, name),
        ]
    return parts


def _places(names: Iterable[str], left: float, right: float) -> list[tuple[float, int]]:
    """Where each name of a legend begins, and in which row."""
    places = []
    x, row = left, 0
    for name in names:
        width = 17 + _LETTER * len(name)
        if x > left and x + width > right:
            x, row = left, row + 1
        places.append((x, row))
        x += width + 18
    return places


def bars(title: str, x_label: str, rows: Sequence[Bar]) -> str:
    """Bars from zero: medians, and from the least to the most as whiskers."""
    ticks = _steps(max(row.value.high for row in rows))
    right = _WIDTH - 90
    bottom = _TOP + len(rows) * (_BAR + _BAR_GAP)

    def x_at(value: float) -> float:
        return _BAR_LEFT + value / ticks[-1] * (right - _BAR_LEFT)

    parts = []
    for tick in ticks:
        x = x_at(tick)
        parts += [
            f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="{_FAINT}"/>',
            text(x, bottom + 16, f"{tick:,g}", anchor="middle"),
        ]
    for number, row in enumerate(rows):
        y = _TOP + number * (_BAR + _BAR_GAP)
        colour = _COLOURS[0] if row.ours else _GREY
        middle = y + _BAR / 2
        end = x_at(row.value.median)
        parts += [
            text(_BAR_LEFT - 10, middle + 4, row.name, anchor="end"),
            (
                f'<rect x="{_BAR_LEFT}" y="{y}" width="{end - _BAR_LEFT:.1f}" height="{_BAR}" rx="2"'
                f' fill="{colour}"/>'
            ),
            (
                f'<line x1="{x_at(row.value.low):.1f}" y1="{middle}" x2="{x_at(row.value.high):.1f}"'
                f' y2="{middle}" stroke="{_INK}" stroke-width="1.5"/>'
            ),
            text(max(end, x_at(row.value.high)) + 8, middle + 4, f"{row.value.median:,.0f}"),
        ]
    parts.append(text((_BAR_LEFT + right) / 2, bottom + 38, x_label, anchor="middle"))
    return page(title, bottom + 54, parts)


def page(title: str, height: float, parts: Sequence[str], *, width: int = _WIDTH) -> str:
    """A whole drawing."""
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}"'
                f' width="{width}" role="img" aria-label="{escape(title, {chr(34): "&quot;"})}"'
                ' font-family="system-ui, sans-serif" font-size="13">'
            ),
            f'<rect width="{width}" height="{height:.0f}" rx="6" fill="{_GROUND}"/>',
            (
                f'<text x="{width / 2:.0f}" y="28" text-anchor="middle" font-size="16" fill="{_INK}"'
                f' font-weight="600">{escape(title)}</text>'
            ),
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, content: str, *, anchor: str = "start") -> str:
    """Words at a place."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_INK}">'
        f"{escape(content)}</text>"
    )


def _steps(top: float) -> list[float]:
    """From zero to beyond the top, in four to eight round steps."""
    rough = max(top, 1e-9) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    return [step * number for number in range(math.ceil(top / step) + 1)]


def _decades(low: float, top: float) -> list[float]:
    """One, two and five times powers of ten, around everything."""
    first = math.floor(math.log10(max(low, 1e-9)))
    last = math.ceil(math.log10(max(top, 1e-9)))
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    begin = max(tick for tick in ticks if tick <= max(low, 1e-9))
    end = min(tick for tick in ticks if tick >= top and tick > begin)
    return [tick for tick in ticks if begin <= tick <= end]
