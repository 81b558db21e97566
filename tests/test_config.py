from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peculium_server.config import (
    CLIENT_SETTINGS,
    SERVER_SETTINGS,
    Address,
    Config,
    ConfigInvalid,
    redacted_database,
    unknown_variables,
)

SECRET = "correct-horse"


def load(environment: dict[str, str] | None = None, **flags: str) -> Config:
    return Config.load(flags, environment or {})


def problems(environment: dict[str, str] | None = None, **flags: str) -> list[str]:
    with pytest.raises(ConfigInvalid) as caught:
        load(environment, **flags)
    return caught.value.problems


def test_nothing_has_to_be_configured() -> None:
    config = load()
    assert config.database_url is None
    assert config.listen == Address("127.0.0.1", 7415)
    assert config.keys_file is None
    assert not config.unsafe_settings


def test_every_setting_has_a_field_and_every_field_a_setting() -> None:
    assert {setting.name for setting in SERVER_SETTINGS} == set(Config.__dataclass_fields__)


def test_every_default_can_be_written_as_a_value() -> None:
    for setting in (*SERVER_SETTINGS, *CLIENT_SETTINGS):
        if setting.default:
            setting.parse(setting.default)


def test_a_flag_beats_the_environment() -> None:
    environment = {"PECULIUM_QUEUE_MAX": "2000", "PECULIUM_DRAIN_SECONDS": "7"}
    config = load(environment, queue_max="3000")
    assert (config.queue_max, config.drain_seconds) == (3000, 7)


def test_an_empty_variable_is_not_set() -> None:
    config = load({"PECULIUM_DATABASE_URL": "", "PECULIUM_LISTEN": ""})
    assert config.database_url is None
    assert config.listen == Address("127.0.0.1", 7415)


def test_every_problem_is_told_at_once_and_names_its_setting() -> None:
    told = problems(
        {
            "PECULIUM_DATABASE_URL": "mysql://somewhere",
            "PECULIUM_LISTEN": "nowhere",
            "PECULIUM_UNSAFE_SETTINGS": "perhaps",
            "PECULIUM_QUEUE_MAX": "-1",
            "PECULIUM_MESSAGE_BYTES_MAX": "9e9",
        }
    )
    assert [problem.split()[0] for problem in told] == [
        "PECULIUM_DATABASE_URL",
        "PECULIUM_LISTEN",
        "PECULIUM_UNSAFE_SETTINGS",
        "PECULIUM_QUEUE_MAX",
        "PECULIUM_MESSAGE_BYTES_MAX",
    ]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", Address("127.0.0.1", 0)),
        ("[::1]:7415", Address("::1", 7415)),
        ("localhost:65535", Address("localhost", 65535)),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, address: Address) -> None:
    listen = load(listen=text).listen
    assert listen == address
    assert str(listen) == text


@pytest.mark.parametrize(
    "text", ["7415", ":7415", "::1:7415", "localhost:", "localhost:65536", "localhost:٣", "[::1]"]
)
def test_what_is_no_address_is_a_problem(text: str) -> None:
    [problem] = problems(listen=text)
    assert problem.startswith("PECULIUM_LISTEN or --listen: must")


@pytest.mark.parametrize("host", ["192.0.2.1", "[::]", "192.168.1.7", "ledger.example"])
def test_without_a_key_file_only_this_machine_may_connect(host: str, tmp_path: Path) -> None:
    [problem] = problems(listen=f"{host}:7415")
    assert "keys_file" in problem
    config = load(listen=f"{host}:7415", keys_file=str(tmp_path / "keys.toml"))
    assert not config.listen.loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "[::1]", "localhost"])
def test_this_machine_needs_no_key_file(host: str) -> None:
    assert load(listen=f"{host}:7415").listen.loopback


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            f"postgresql://ledger:{SECRET}@db.example:5433/peculium",
            "ledger db.example 5433 peculium",
        ),
        (f"postgres://ledger:{SECRET}@db.example/p?sslmode=require", "ledger db.example p require"),
        (f"postgresql:///p?host=/run&password={SECRET}", "/run p"),
        (f"postgresql://u@h/p?sslpassword={SECRET}&options=-c%20x={SECRET}", "u h p"),
        (f"host=db.example user=ledger password={SECRET}", "ledger db.example"),
        (f"host = 'db.example' password = 'it\\'s {SECRET}' dbname=p", "db.example p"),
        (f"postgresql://ledger:at@{SECRET}@db.example/p", "ledger db.example p"),
    ],
)
def test_a_databases_password_is_never_printed(url: str, told: str) -> None:
    config = load(database_url=url)
    printed = repr(config), str(config), str(config.told()), redacted_database(url)
    for text in printed:
        assert SECRET not in text
        for word in told.split():
            assert word in text


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://ledger:sla/sh{SECRET}@db.example/p",
        f"mysql://ledger:{SECRET}@db.example/p",
        f"postgresql://[ledger:{SECRET}@db.example/p",
        SECRET,
        f"host=db.example {SECRET}",
    ],
)
def test_a_connection_string_that_is_none_is_not_printed_either(url: str) -> None:
    [problem] = problems(database_url=url)
    assert problem.startswith("PECULIUM_DATABASE_URL")
    assert SECRET not in problem


def test_the_data_directory_of_an_ordinary_user_is_in_their_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/homes/somebody")
    assert load().data_dir == Path("/homes/somebody/.local/share/peculium")
    assert load({"XDG_DATA_HOME": "/data"}).data_dir == Path("/data/peculium")
    assert load(data_dir="~/ledger").data_dir == Path("/homes/somebody/ledger")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert load().data_dir == Path("/var/lib/peculium")


def test_a_misspelt_variable_is_noticed() -> None:
    environment: dict[str, Any] = {
        "PECULIUM_DATABSE_URL": "x",
        "PECULIUM_LISTEN": "x",
        "PECULIUM_API_KEY": "x",
        "HOME": "x",
    }
    assert unknown_variables(environment) == ["PECULIUM_DATABSE_URL"]
