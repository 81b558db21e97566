from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from peculium_server.config import (
    CLIENT_SETTINGS,
    SERVER_SETTINGS,
    Address,
    Config,
    ConfigInvalid,
    Exporting,
    quieten_grpc,
    redacted_database,
    unknown_variables,
)
from peculium_server.core.limits import OPERATIONS_MAX

SECRET = "correct-horse"


def load(environment: dict[str, str] | None = None, **flags: str) -> Config:
    return Config.load(flags, environment or {})


def problems(environment: dict[str, str] | None = None, **flags: str) -> list[str]:
    with pytest.raises(ConfigInvalid) as caught:
        load(environment, **flags)
    return caught.value.problems


TLS: dict[str, Any] = {"tls_cert_file": "tls.crt", "tls_key_file": "tls.key"}


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
def test_without_tls_only_this_machine_may_connect_unless_that_is_allowed(host: str) -> None:
    [problem] = problems(listen=f"{host}:7415", keys_file="keys.toml")
    assert "allow_plaintext" in problem
    assert not load(listen=f"{host}:7415", allow_plaintext="true").listen.loopback
    assert not load(listen=f"{host}:7415", **TLS).listen.loopback


@pytest.mark.parametrize("host", ["192.0.2.1", "[::]", "prometheus.example"])
def test_metrics_are_told_to_this_machine_only_unless_more_is_allowed(host: str) -> None:
    [problem] = problems(metrics_listen=f"{host}:9464", **TLS)
    assert problem.startswith("PECULIUM_METRICS_LISTEN or --metrics-listen: ")
    assert "allow_plaintext" in problem
    allowed = load(metrics_listen=f"{host}:9464", allow_plaintext="true", **TLS).metrics_listen
    assert allowed is not None
    assert not allowed.loopback
    assert load(metrics_listen="127.0.0.1:0").metrics_listen == Address("127.0.0.1", 0)
    assert load().metrics_listen is None


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tls_cert_file": "tls.crt"}, "goes together with tls_key_file"),
        ({"tls_key_file": "tls.key"}, "goes together with tls_key_file"),
        ({"tls_client_ca_file": "ca.crt"}, "needs tls_cert_file"),
        ({**TLS, "tls_client_listen": "127.0.0.1:1"}, "needs tls_client_ca_file"),
    ],
)
def test_settings_of_tls_go_together(settings: dict[str, Any], problem: str) -> None:
    [told] = problems(**settings)
    assert told.endswith(problem)


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
        f"postgresql://ledger:1/{SECRET}@db.example/p",
        f"postgresql://ledger:1#{SECRET}@db.example/p",
        f"postgresql://ledger:at@{SECRET}@db.example/p",
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


def test_a_user_whom_the_machine_does_not_know_needs_no_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.setattr(os, "geteuid", lambda: 10001)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME", raising=False)
    assert load().data_dir == Path("/var/lib/peculium")


PRIVATE = ("tls_key_file", "signing_key_file", "webhook_key_file")


@pytest.mark.parametrize("setting", PRIVATE)
@pytest.mark.parametrize(
    "content",
    [
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----{SECRET}",
        f"# {SECRET}\n",
        "c0ffee" * 10 + "c0ff",
    ],
)
def test_what_is_in_a_key_file_is_not_taken_for_its_path(setting: str, content: str) -> None:
    told = problems({f"PECULIUM_{setting.upper()}": content}, tls_cert_file="tls.crt")
    assert told[0].startswith(f"PECULIUM_{setting.upper()}")
    assert "must be the path of a file" in told[0]
    assert not [line for line in told if SECRET in line or "c0ffee" in line]


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


ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.mark.parametrize(
    ("environment", "traces", "metrics"),
    [
        ({}, False, False),
        ({ENDPOINT: "http://collector:4317"}, True, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4317"}, True, False),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://collector:4317"}, False, True),
        ({ENDPOINT: "http://collector:4317", "OTEL_TRACES_EXPORTER": "none"}, False, True),
        ({"OTEL_METRICS_EXPORTER": "otlp"}, False, True),
        ({ENDPOINT: "http://collector:4317", "OTEL_SDK_DISABLED": "TRUE"}, False, False),
        ({ENDPOINT: "http://collector:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, True, True),
    ],
)
def test_what_opentelemetrys_variables_ask_for_is_exported(
    environment: dict[str, str], traces: bool, metrics: bool
) -> None:
    exporting = Exporting.load(environment)
    assert (exporting.traces, exporting.metrics, exporting.problems) == (traces, metrics, ())


@pytest.mark.parametrize(
    "asked",
    [{"OTEL_TRACES_EXPORTER": "zipkin"}, {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}],
)
def test_what_cannot_be_exported_as_asked_is_told_and_not_exported(asked: dict[str, str]) -> None:
    exporting = Exporting.load({ENDPOINT: "http://collector:4317", **asked})
    assert not exporting.traces
    assert exporting.problems
    assert all(name in exporting.problems[0] for name in asked)


def test_a_sampler_that_is_named_is_left_to_the_sdk() -> None:
    assert Exporting.load({ENDPOINT: "x", "OTEL_TRACES_SAMPLER": "always_on"}).sampler
    assert not Exporting.load({ENDPOINT: "x"}).sampler


@pytest.mark.parametrize("names", ["a,", "a,a", ",".join(map(str, range(21)))])
def test_roots_whose_balances_are_told_are_few_and_named_once(names: str) -> None:
    assert "balance_roots" in problems(balance_roots=names)[0].lower()
    assert load(balance_roots="a, b").balance_roots == ("a", "b")


def test_by_default_no_principal_alone_fills_a_lane_and_a_fleet_of_ten_thousand_is_not_held_up() -> (
    None
):
    config = load()
    assert 10_000 <= config.principal_operations_max < config.queue_max
    # All of them begin at once: each is delegated to, and reserves.
    assert config.principal_burst_max >= 2 * 10_000
    # Of a call that is let in however much it weighs, the largest batch there may be still fits.
    assert config.principal_operations_max + OPERATIONS_MAX < config.queue_max


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("principal_rate_max", "-1"),
        ("principal_burst_max", "0"),
        ("principal_operations_max", "many"),
        ("principal_streams_max", "1e9"),
        ("connections_max", "0"),
    ],
)
def test_a_limit_is_a_number_that_can_be_kept(name: str, value: str) -> None:
    [problem] = problems(None, **{name: value})
    assert problem.startswith(f"PECULIUM_{name.upper()} or --{name.replace('_', '-')}: must be")


def test_grpc_says_errors_only_unless_somebody_wants_more() -> None:
    environment: dict[str, str] = {}
    quieten_grpc(environment)
    assert environment == {"GRPC_VERBOSITY": "ERROR"}
    environment = {"GRPC_VERBOSITY": "debug"}
    quieten_grpc(environment)
    assert environment == {"GRPC_VERBOSITY": "debug"}
