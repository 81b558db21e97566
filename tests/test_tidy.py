"""What a reviewer would say twice about the files of this repository."""

from __future__ import annotations

import re
import subprocess
import tomllib
from datetime import date
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = (".csv", ".lock")
GENERATED = re.compile(r"client/peculium/v1/\w+_pb2\w*\.pyi?")

# Each pattern is written so that it does not match itself.
REGISTRY_HOST = re.compile(
    r"\b(?:pypi\.org|\w*\.?python[h]osted\.org|registry\.npm[j]s\.org|proxy\.golang\.org"
    r"|deb\.debian\.org|crates\.io|ghcr\.io)\b"
)
MACHINE_PATH = re.compile(rf"{re.escape(str(ROOT))}\b|(?<![\w.~$}}])/(?:root|home|Users)/[\w.]")
LEFTOVER = re.compile(r"\b(?:FIX[M]E|TO[D]O|X[X]X|HA[C]K)\b")
OUTSIDE_TALK = re.compile(
    r"\b(?:design|style|field|scenarios)\.md\b|\b[Ii]ssue #?\d|\blater [i]ssue|\bpull request #?\d"
)
CHANGE_KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
DECISION_SECTIONS = ["Context", "Choice", "Cost", "What would change our mind"]


def _texts() -> dict[str, str]:
    """The text files that are, or are about to be, in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    texts = {}
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix not in DATA:
            texts[name] = path.read_bytes().decode()
    return texts


TEXTS = _texts()


@pytest.mark.parametrize(
    "pattern",
    [REGISTRY_HOST, MACHINE_PATH, LEFTOVER, OUTSIDE_TALK],
    ids=["registry-host", "machine-path", "leftover", "outside-talk"],
)
def test_no_file_speaks_of_what_is_not_the_projects(pattern: re.Pattern[str]) -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in TEXTS.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (REGISTRY_HOST, "index-url = https://py" + "pi.org/simple"),
        (REGISTRY_HOST, "https://files.python" + "hosted.org/packages/"),
        (MACHINE_PATH, f"see {ROOT}/README.md"),
        (MACHINE_PATH, "PYTHON=/root" + "/.pyenv/bin/python"),
        (MACHINE_PATH, 'open("/home' + '/me/notes")'),
        (LEFTOVER, "# TO" + "DO: later"),
        (OUTSIDE_TALK, "as iss" + "ue 3 asks"),
        (OUTSIDE_TALK, "see design" + ".md, section 4"),
    ],
)
def test_what_is_not_the_projects_would_be_found(pattern: re.Pattern[str], line: str) -> None:
    assert pattern.search(line)


@pytest.mark.parametrize(
    "name",
    [
        "requirements.lock",
        "tests/protobuf-newest.lock",
        "deploy/container/server.lock",
        "deploy/container/build.lock",
        "tests/replay/litellm.lock",
    ],
)
def test_a_lock_names_versions_and_hashes_only(name: str) -> None:
    line = re.compile(
        r"# Written by `make lock` .*|[\w.\[\]-]+==[\w.]+( ; .+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?"
    )
    wrong = [text for text in (ROOT / name).read_text().splitlines() if not line.fullmatch(text)]
    assert wrong == []


def test_text_ends_in_a_newline_and_no_line_in_a_blank() -> None:
    wrong = [
        name
        for name, text in TEXTS.items()
        if not GENERATED.fullmatch(name)
        and text
        and (
            not text.endswith("\n")
            or text.endswith("\n\n")
            or re.search(r"[ \t\r]$", text, re.MULTILINE)
        )
    ]
    assert wrong == []


def test_what_is_run_as_a_program_is_executable_and_says_by_what() -> None:
    for name, text in TEXTS.items():
        executable = bool((ROOT / name).stat().st_mode & 0o100)
        assert executable == text.startswith("#!"), name


def test_every_decision_is_numbered_and_says_what_would_change_it() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    numbers = []
    for page in pages:
        if page.name == "README.md":
            continue
        match = re.fullmatch(r"(\d{4})-[a-z0-9]+(-[a-z0-9]+)*\.md", page.name)
        assert match, page.name
        text = page.read_text()
        number = int(match.group(1))
        assert text.startswith(f"# {number}. "), page.name
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == DECISION_SECTIONS, page.name
        numbers.append(number)
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_changelog_is_one_that_readers_know() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    releases = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert releases[0] == "[Unreleased]"
    found = []
    for release in releases[1:]:
        match = re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", release)
        assert match, release
        major, minor, patch, day = match.groups()
        found.append(((int(major), int(minor), int(patch)), date.fromisoformat(day)))
    assert all(newer[0] > older[0] and newer[1] >= older[1] for newer, older in pairwise(found))
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= CHANGE_KINDS
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = tuple(map(int, project["version"].split(".")))
    assert all(released <= version for released, _ in found)
