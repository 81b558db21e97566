"""What the README and the documentation show is what happens, and where they point there is something."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import peculium
from peculium_server.cli.verbs import app
from tests.replay.provider import running
from tests.server import RunningServer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def fenced(text: str, language: str) -> list[str]:
    return [content for found, content in _FENCE.findall(text) if found == language]


def commands(text: str) -> list[list[str]]:
    """Every command line that begins with `peculium`, without its comments."""
    shown = _FENCE.sub("", text)
    blocks = [*_INDENTED.findall(shown), *fenced(text, "sh"), *fenced(text, "console")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        shlex.split(line.strip().removeprefix("$ "), comments=True)
        for line in lines
        if line.strip().removeprefix("$ ").startswith("peculium ")
    ]


def _slug(heading: str) -> str:
    """The anchor of a heading, as hosts of repositories make it."""
    words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return words.replace(" ", "-")


@pytest.fixture
def environment(running_server: RunningServer) -> dict[str, str]:
    """Programs that are installed are found, and speak to the test's own server."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PECULIUM_TARGET": running_server.address,
        "COLUMNS": "160",
    }


def test_the_quickstart_prints_what_it_says_and_the_commands_show_it(
    environment: dict[str, str],
) -> None:
    [program] = fenced(README, "python")
    [printed] = fenced(README, "text")
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout == printed
    said = {}
    for command in commands(README[README.index("## Quickstart") :]):
        if command[1] == "serve":
            continue
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, (command, finished.stderr)
        said[command[1]] = finished.stdout
    assert "run-7" in said["tree"]
    assert "settle" in said["entries"]
    assert said["verify"].startswith("verified: ")


@pytest.mark.parametrize("name", ["hold-a-budget.md", "queue-worker.md"])
def test_a_program_of_a_how_to_prints_what_its_page_says(
    environment: dict[str, str], name: str
) -> None:
    page = (ROOT / "docs" / "how-to" / name).read_text()
    [program] = [each for each in fenced(page, "python") if "asyncio.run" in each]
    [printed] = fenced(page, "text")
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout == printed


def test_the_transport_for_httpx_prints_what_its_page_says(environment: dict[str, str]) -> None:
    page = (ROOT / "docs" / "how-to" / "httpx.md").read_text()
    [program] = [each for each in fenced(page, "python") if "asyncio.run" in each]
    [printed] = fenced(page, "text")
    with running() as provider:
        ran = subprocess.run(
            [sys.executable, "-c", program],
            env={**environment, "OPENAI_API_KEY": "k", "OPENAI_BASE_URL": f"{provider.url}/v1"},
            capture_output=True,
            text=True,
            check=True,
        )
    assert ran.stdout == printed


def test_what_the_page_on_alerts_does_finds_what_it_says(environment: dict[str, str]) -> None:
    page = (ROOT / "docs" / "how-to" / "alerts.md").read_text()
    [program], [printed] = fenced(page, "python"), fenced(page, "text")
    before, after = (
        [command for command in commands(part) if command[1] in ("grant", "alerts")]
        for part in page.split(program)
    )
    said = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for command in (*before, [sys.executable, "-c", program], *after)
    ]
    assert said[len(before)] == printed
    assert "which is at least $50.00, of $100.00" in said[-1]


def test_the_readme_shows_the_two_commands() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in ("demo", "test"):
        assert f"\n    make {target} " in README
        assert target in targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_something(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT):
            broken.append(link)
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            if anchor not in map(_slug, headings):
                broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_program_in_the_documentation_compiles_and_names_what_there_is(page: Path) -> None:
    for program in fenced(page.read_text(), "python"):
        tree = compile(
            program, str(page), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = {"peculium": peculium, "aio": peculium.aio}.get(node.value.id)
                assert module is None or hasattr(module, node.attr), f"{page}: {node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_the_documentation_has_its_verb_and_its_flags(page: Path) -> None:
    for _, *arguments in commands(page.read_text()):
        command = get_command(app)
        while arguments and arguments[0] in getattr(command, "commands", {}):
            command = command.commands[arguments.pop(0)]  # type: ignore[attr-defined]
        assert not hasattr(command, "commands"), f"{page.name}: {arguments}"
        flags = {flag for parameter in command.params for flag in parameter.opts}
        asked = {argument for argument in arguments if argument.startswith("--")}
        assert asked <= flags, f"{page.name}: {asked - flags}"
