"""Every file in deploy/ says what the program understands, and the files agree with each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from peculium_server import app
from peculium_server.cli.verbs import app as command_line
from peculium_server.config import (
    CLIENT_SETTINGS,
    PORT_DEFAULT,
    SERVER_SETTINGS,
    Config,
    Exporting,
    unknown_variables,
)
from tests.deploy.started import DEPLOY, ROOT, Started, every_start

STARTS = {started.where: started for started in every_start()}
SERVERS = {name: each for name, each in STARTS.items() if each.arguments == ["serve"]}
CONFIGURED = {name: each for name, each in SERVERS.items() if name != "image"}
KNOWN = {setting.variable: setting for setting in (*SERVER_SETTINGS, *CLIENT_SETTINGS)}
COMPOSES_OWN = {"PECULIUM_USER"}
PAGE = ROOT / "docs" / "operating" / "deploy.md"


def parametrized(starts: dict[str, Started]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("started", starts.values(), ids=starts)


def test_all_ways_to_start_it_are_looked_at() -> None:
    assert set(STARTS) == {
        *("image", "systemd", "migrate", "server-1", "server-2"),
        *("Deployment/peculium", "Job/peculium-migrate"),
    }
    assert set(STARTS) - set(SERVERS) == {"migrate", "Job/peculium-migrate"}


@pytest.mark.parametrize(
    "path",
    [PAGE, *(path for path in sorted(DEPLOY.rglob("*")) if path.is_file())],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_variable_that_a_file_names_is_a_setting(path: Path) -> None:
    # What secrets.sh has made is not the repository's.
    if path.parent.name == "secrets" or path.name == ".env":
        pytest.skip("made here")
    named = set(re.findall(r"\bPECULIUM_[A-Z_]+\b", path.read_text()))
    assert named - set(KNOWN) - COMPOSES_OWN == set()


@parametrized(STARTS)
def test_a_program_can_be_started_with_its_settings(started: Started) -> None:
    assert unknown_variables(started.environment) == []
    # What is wrong with one of them, or with several together, is raised.
    config = Config.load({}, started.environment)
    assert Exporting.load(started.environment).problems == ()
    for variable, value in started.environment.items():
        if variable in KNOWN:
            KNOWN[variable].parse(value)
    assert (config.database_url is None) == (started.where == "image")


@parametrized(CONFIGURED)
def test_a_server_drains_seals_and_may_be_called_from_elsewhere(started: Started) -> None:
    config = Config.load({}, started.environment)
    assert not config.listen.loopback
    assert config.listen.port == PORT_DEFAULT
    assert config.tls_cert_file is not None
    assert not config.unsafe_settings
    assert config.signing_key_file is not None
    assert config.log_format == "json"


@parametrized(CONFIGURED)
def test_it_is_killed_only_after_it_has_had_all_the_time_that_it_takes(started: Started) -> None:
    config = Config.load({}, started.environment)
    assert started.stop_seconds is not None
    longest = config.drain_seconds + app.COMMIT_SECONDS_MAX * 2 + app.EXPORT_SECONDS_MAX
    assert started.stop_seconds > longest


@parametrized(STARTS)
def test_every_file_that_a_setting_names_is_put_there(started: Started) -> None:
    named = {
        variable: str(KNOWN[variable].parse(value))
        for variable, value in started.environment.items()
        if variable in KNOWN and isinstance(KNOWN[variable].parse(value), Path)
    }
    if "PGSERVICEFILE" in started.environment:
        named["PGSERVICEFILE"] = started.environment["PGSERVICEFILE"]
    missing = {
        variable: path
        for variable, path in named.items()
        if path not in started.files and str(Path(path).parent) not in started.files
    }
    assert missing == {}


@parametrized(STARTS)
def test_every_command_is_one_of_the_programs(started: Started) -> None:
    for command in (["peculium", *started.arguments], *started.probes):
        program, *arguments = command
        assert program == "peculium"
        verb: Any = get_command(command_line)
        while arguments and arguments[0] in getattr(verb, "commands", {}):
            verb = verb.commands[arguments.pop(0)]
        assert not hasattr(verb, "commands"), command
        flags = {flag for parameter in verb.params for flag in parameter.opts}
        assert {each for each in arguments if each.startswith("--")} <= flags, command


@parametrized({name: each for name, each in SERVERS.items() if name != "systemd"})
def test_readiness_is_asked_for_by_the_verb_for_it(started: Started) -> None:
    assert [command[:2] for command in started.probes] == [["peculium", "health"]]


@parametrized(STARTS)
def test_no_secret_is_in_a_variable(started: Started) -> None:
    secrets = {setting.variable for setting in KNOWN.values() if setting.secret}
    for variable in secrets & set(started.environment):
        value = started.environment[variable]
        assert "password" not in value
        # The name of a file that has it, or a connection that takes it from one.
        assert value.startswith(("/", "service=", "postgresql://peculium@"))
