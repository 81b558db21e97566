"""Pictures of where server and client spend their time: `python -m tests.bench.flame NAME`.

Agents below one root reserve and settle from one client process, as fast as they can, and py-spy looks at
the server and at the client meanwhile: at what holds the interpreter's lock, so that only what runs counts.
`docs/performance/flame-server-NAME.svg` and `flame-client-NAME.svg` are drawn from that, and the page is
written again with them.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from tests.bench import charts, machine, report
from tests.bench.cells import pids
from tests.bench.crew import BenchBroken, Crew
from tests.bench.jobs import Spend
from tests.bench.ledgers import Ledger, Postgres, Trees

AGENTS = 200
SECONDS = 15.0
SAMPLES_PER_S = 250
WARM_UP_SECONDS = 2.0
START_SECONDS_MAX = 5.0
"""What py-spy may take until it looks."""
SHARE_MIN = 0.003
"""Whatever takes less of all is left out."""

_WIDTH = 1_200
_SIDE, _TOP = 16, 76
_ROW, _LETTER = 17, 5.9
_LABEL_LETTERS_MIN = 5
_SLACK = 6

LAYERS: Mapping[str, str] = {
    "core": "#f6ad6f",
    "lanes": "#a5d38f",
    "store": "#84cfc0",
    "rpc": "#93bdf2",
    "rest of the server": "#c3d3e8",
    "SDK": "#c0abf0",
    "agents": "#e3d3ac",
    "libraries": "#f3b9ca",
    "interpreter": "#d3d8de",
}
"""Whose code a frame is, and its colour."""
_PACKAGES = {
    "peculium_server/core": "core",
    "peculium_server/lanes": "lanes",
    "peculium_server/store": "store",
    "peculium_server/rpc": "rpc",
    "peculium_server": "rest of the server",
    "peculium": "SDK",
    "tests": "agents",
}
_FOLDERS = (
    (re.compile(r".*/(?:site|dist)-packages/(.*)"), "libraries"),
    (re.compile(r".*/lib/python[\d.]+/(.*)"), "interpreter"),
    (re.compile(r"(?:.*/)?((?:peculium|peculium_server|tests)/.*)"), "rest of the server"),
)
"""Where files are, and whose they are unless they are in a package of ours."""
_FRAME = re.compile(r"(.*) \((.*?)(?::\d+)?\)")
_LOOP = "Runner.run"
"""What is below it is how a process came to run at all, and the same in all stacks."""


class Frame(NamedTuple):
    """A function, whichever of its lines was at work."""

    function: str
    file: str
    """From its package on: no folder of the machine."""
    layer: str


@dataclass
class Node:
    """What was at work while a function was, itself included."""

    samples: int = 0
    above: dict[Frame, Node] = field(default_factory=dict)
    """What it has called."""


# --- from what py-spy says to a tree ---


def frame(text: str) -> Frame:
    """A frame as py-spy names it, with its whole path or a part of it."""
    found = _FRAME.fullmatch(text)
    function, path = (found[1], found[2]) if found else (text, "")
    for folder, whose in _FOLDERS:
        if inside := folder.fullmatch(path):
            file = inside[1]
            ours = (layer for name, layer in _PACKAGES.items() if file.startswith(f"{name}/"))
            return Frame(function, file, next(ours, whose))
    return Frame(function, path.rpartition("/")[2], "interpreter")


def tree(raw: str) -> Node:
    """The stacks of a file of py-spy's in its format `raw`, merged by function."""
    root = Node()
    for line in raw.splitlines():
        stack, _, samples = line.rpartition(" ")
        node = root
        node.samples += int(samples)
        for one in _above_the_loop([frame(text) for text in stack.split(";")]):
            node = node.above.setdefault(one, Node())
            node.samples += int(samples)
    return root


def _above_the_loop(frames: list[Frame]) -> list[Frame]:
    loops = [number for number, one in enumerate(frames) if one.function == _LOOP]
    return frames[loops[-1] + 1 :] if loops else frames


# --- from a tree to a picture ---


class _Box(NamedTuple):
    frame: Frame
    level: int
    first: int
    """Which of all samples it begins with."""
    samples: int


def draw(title: str, raw: str) -> str:
    """The picture as SVG: below each function its callers, as wide as their part of all samples."""
    root = tree(raw)
    boxes = list(_boxes(root, max(1.0, root.samples * SHARE_MIN)))
    levels = 1 + max((box.level for box in boxes), default=0)
    bottom = _TOP + levels * (_ROW + 1)
    scale = (_WIDTH - 2 * _SIDE) / max(1, root.samples)
    parts = [
        charts.text(
            _SIDE,
            52,
            f"{root.samples:,} samples of what holds the interpreter's lock, from the event loop up;"
            f" below {SHARE_MIN:.1%} left out",
        ),
        *_legend(boxes),
        '<g font-size="11" fill="#24292f">',
        *(
            _rectangle(box, bottom - (box.level + 1) * (_ROW + 1), scale, root.samples)
            for box in boxes
        ),
        "</g>",
    ]
    return charts.page(title, bottom + _SIDE, parts, width=_WIDTH)


def _boxes(node: Node, least: float, level: int = 0, first: int = 0) -> Iterator[_Box]:
    """By name, so that the same stacks are always the same picture."""
    for one, called in sorted(node.above.items()):
        if called.samples >= least:
            yield _Box(one, level, first, called.samples)
            yield from _boxes(called, least, level + 1, first)
        first += called.samples


def _rectangle(box: _Box, y: float, scale: float, samples: int) -> str:
    x, width = _SIDE + box.first * scale, box.samples * scale
    where = f"{box.frame.function} ({box.frame.file})" if box.frame.file else box.frame.function
    label = _label(box.frame.function, int((width - _SLACK) / _LETTER))
    words = "" if not label else (
        f'<text x="{x + _SLACK / 2:.1f}" y="{y + 12:g}">{escape(label)}</text>'
    )  # fmt: skip
    return (
        f"<g><title>{escape(where)}: {box.samples / samples:.1%}</title>"
        f'<rect x="{x:.1f}" y="{y:g}" width="{max(0.5, width - 0.5):.1f}" height="{_ROW}" rx="1"'
        f' fill="{LAYERS[box.frame.layer]}"/>{words}</g>'
    )


def _label(function: str, letters: int) -> str:
    """As much of a name as there is room for, the last part of it if need be; empty: too little."""
    if len(function) > letters:
        function = function.rpartition(".")[2]
    if len(function) <= letters:
        return function
    return function[: letters - 1] + "…" if letters >= _LABEL_LETTERS_MIN else ""


def _legend(boxes: list[_Box]) -> list[str]:
    there = {box.frame.layer for box in boxes}
    return charts.legend(
        {name: colour for name, colour in LAYERS.items() if name in there},
        _TOP - 4,
        left=_SIDE,
        right=_WIDTH - _SIDE,
    )


# --- what is looked at ---


def record(folder: Path, seconds: float) -> dict[str, str]:
    """Have agents spend, and look at server and client for so long: stacks in py-spy's format `raw`.

    Raises:
        BenchBroken: Py-spy may not look, or ledger and provider disagree.
        FileNotFoundError: There is no py-spy.
    """
    with contextlib.ExitStack() as open_:
        crew = open_.enter_context(Crew())
        ledger = Ledger.made(open_.enter_context(Postgres.running(folder)), "flame")
        [server] = open_.enter_context(ledger.serving())
        places = Trees(server.address, 1).children("one", AGENTS)
        crew.grow(1)
        looked_at = {"server": pids([server])[0], "client": crew.pids[0]}
        pool = open_.enter_context(ThreadPoolExecutor())
        working = pool.submit(
            crew.work,
            [Spend(server.address, places, AGENTS)],
            warm_up=WARM_UP_SECONDS,
            seconds=seconds + START_SECONDS_MAX,
        )
        time.sleep(WARM_UP_SECONDS)
        stacks = dict(
            zip(
                looked_at,
                pool.map(lambda pid: _look(pid, seconds, folder), looked_at.values()),
                strict=True,
            )
        )
        [counted], _ = working.result()
        ledger.billed.update(counted.billed)
        if problems := ledger.wrong():
            raise BenchBroken(problems[0])
    return stacks


def _look(pid: int, seconds: float, folder: Path) -> str:
    program = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or "py-spy"
    file = folder / f"{pid}.raw"
    done = subprocess.run(
        [
            *(program, "record", "--pid", str(pid), "--duration", str(max(1, round(seconds)))),
            *("--rate", str(SAMPLES_PER_S), "--gil", "--full-filenames", "--nolineno"),
            *("--format", "raw", "--output", str(file)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchBroken(f"py-spy said: {done.stderr}")
    return file.read_text()


def main() -> int:
    """Look, and draw."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.flame", description=__doc__)
    parser.add_argument("name", help="of the state that is looked at: before, after")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="peculium-flame-"))
    machine.prepare(folder)
    try:
        stacks = record(folder, given.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    docs = machine.ROOT / "docs"
    for who, raw in stacks.items():
        file = docs / "performance" / f"flame-{who}-{given.name}.svg"
        file.write_text(draw(f"Where the {who} spends its time, {given.name}", raw))
        sys.stderr.write(f"flame: {file}\n")
    report.write(docs / "performance" / "bench.json", docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
