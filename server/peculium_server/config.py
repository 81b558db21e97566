"""The server's settings: read once, checked all at once, printed redacted.

This is the server's one reader of the environment. A flag beats the environment variable of the same
setting.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, Self
from urllib.parse import parse_qsl, urlsplit

from peculium_server.webhooks.addresses import Allowed

PREFIX: Final = "PECULIUM_"
PORT_DEFAULT: Final = 7415
_PORT_MAX: Final = 65_535
_MESSAGE_BYTES_MIN: Final = 64 * 1024
"""A full batch of ordinary operations takes about this much."""
BALANCE_ROOTS_MAX: Final = 20
"""Each is read several times a minute."""
_DATA_DIR_OF_ROOT: Final = Path("/var/lib/peculium")
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})
DATABASE_WANTED: Final = (
    "must be a libpq connection string, such as postgresql://user@host/db; what is special in a password is"
    " percent-encoded"
)
_SHOWN_OF_DATABASE: Final = ("user", "host", "hostaddr", "port", "dbname", "sslmode", "service")
"""What may be printed of a connection string; whatever else it says might be a secret."""
_KEYWORD_VALUE = re.compile(r"\s*(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|(?:[^\s\\]|\\.)*)")
_HEX_KEY = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


class ConfigInvalid(Exception):
    """Settings cannot be used; carries every problem, each naming its setting."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Address(NamedTuple):
    """Where the server listens."""

    host: str
    port: int
    """0: any free one."""

    @property
    def loopback(self) -> bool:
        """Say whether only this machine can connect to it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class CannotListen(Exception):
    """An address cannot be listened on: it is in use, or not one of this machine's."""

    def __init__(self, address: Address | str) -> None:
        super().__init__(f"cannot listen on {address}: in use, or not this machine's")


class Setting(NamedTuple):
    """One setting: how it is called, what it means, and how its text is read."""

    name: str
    meaning: str
    default: str
    """As one would write it; empty for none."""
    parse: Callable[[str], Any]
    """Raises ValueError with what the value has to be."""
    secret: bool = False
    """What it has to be is told of a wrong one, and never what it was."""

    @property
    def variable(self) -> str:
        """The environment variable."""
        return PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        """The command line's flag."""
        return "--" + self.name.replace("_", "-")


def _text(value: str) -> str:
    return value


def _path(value: str) -> Path:
    return Path(value).expanduser()


def _private_file(value: str) -> Path:
    """A file with a private key; never the key itself, which would be printed as the place where it is."""
    if "\n" in value or "-----BEGIN" in value or _HEX_KEY.fullmatch(value.strip()):
        raise ValueError("must be the path of a file, not what is in it")
    return _path(value)


def _switch(value: str) -> bool:
    lowered = value.lower()
    if lowered not in _TRUE | _FALSE:
        raise ValueError("must be true or false")
    return lowered in _TRUE


def _allowed(value: str) -> str:
    Allowed.of(value)
    return value


def _between(least: int, most: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return number

    return parse


def _names(value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(","))
    if not all(names) or len(names) > BALANCE_ROOTS_MAX or len({*names}) < len(names):
        raise ValueError(f"must be at most {BALANCE_ROOTS_MAX} different names")
    return names


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        lowered = value.lower()
        if lowered not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return lowered

    return parse


def _address(value: str) -> Address:
    host, _, port = value.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare) != (host != bare) or not port.isascii() or not port.isdigit():
        raise ValueError("must be host:port, with an IPv6 address in brackets")
    if int(port) > _PORT_MAX:
        raise ValueError(f"must have a port from 0 to {_PORT_MAX}")
    return Address(bare, int(port))


def _database(value: str) -> str:
    try:
        _database_facts(value)
    except ValueError:
        # Not what is wrong with it: a part of it may be a password.
        raise ValueError(DATABASE_WANTED) from None
    return value


def _database_facts(value: str) -> dict[str, str]:
    """What a connection string says, by libpq's names."""
    if "://" not in value:
        pairs = _KEYWORD_VALUE.findall(value)
        if not pairs or _KEYWORD_VALUE.sub("", value).strip():
            raise ValueError(value)
        return {key: text.strip("'") for key, text in pairs}
    url = urlsplit(value)
    if url.scheme not in ("postgresql", "postgres"):
        raise ValueError(value)
    if "@" in url.path or url.fragment or url.netloc.count("@") > 1:
        # Of a password with such characters libpq would take a part for the host, and tell of it.
        raise ValueError(value)
    facts = dict(parse_qsl(url.query))
    named = {"user": url.username, "host": url.hostname, "dbname": url.path.removeprefix("/")}
    facts |= {name: text for name, text in named.items() if text}
    if url.port is not None:
        facts["port"] = str(url.port)
    return facts


def redacted_database(value: str) -> str:
    """A connection string as it may be printed: where it leads, and as whom."""
    facts = _database_facts(value)
    return " ".join(f"{name}={facts[name]}" for name in _SHOWN_OF_DATABASE if name in facts)


SERVER_SETTINGS: Final = (
    Setting(
        "database_url",
        "The ledger's PostgreSQL, as a libpq connection string. Without it the server keeps a"
        " PostgreSQL of its own in `data_dir`.",
        "",
        _database,
        secret=True,
    ),
    Setting(
        "data_dir",
        "Where the server's own PostgreSQL keeps its data. The default for root is"
        " `/var/lib/peculium`, as for users without a home; for others `peculium` in `$XDG_DATA_HOME`, or in"
        " `~/.local/share`.",
        "",
        _path,
    ),
    Setting(
        "listen",
        "The address to listen on, as host:port; port 0 is any free one.",
        f"127.0.0.1:{PORT_DEFAULT}",
        _address,
    ),
    Setting(
        "keys_file",
        "A file that names who may call, beside the keys that the ledger has in its database. It is read"
        " again when it changes. Without it, and as long as the ledger has no key, everybody who can connect"
        " to a loopback address may do everything as the principal `dev`, and nobody may call elsewhere.",
        "",
        _path,
    ),
    Setting(
        "tls_cert_file",
        "The server's certificate, as PEM, with those between it and its authority. With it connections are"
        " encrypted. The TLS files are looked at before each handshake, and read again when they change.",
        "",
        _path,
    ),
    Setting(
        "tls_key_file",
        "The private key of that certificate, as PEM, for the server's user only, or root's for its group.",
        "",
        _private_file,
        secret=True,
    ),
    Setting(
        "tls_client_ca_file",
        "The certificates of those who may vouch for clients, as PEM. With it clients have to present a"
        " certificate, and who calls without a key is known by its SPIFFE id; what that one may do,"
        " `keys_file` says.",
        "",
        _path,
    ),
    Setting(
        "tls_client_listen",
        "A second address, for clients with certificates, as host:port: they are required there, and nobody is"
        " asked for one at `listen`. Without it they are required at `listen`.",
        "",
        _address,
    ),
    Setting(
        "allow_plaintext",
        "Listen on an address that other machines reach without TLS: only where something else encrypts the"
        " connections.",
        "false",
        _switch,
    ),
    Setting(
        "unsafe_settings",
        "Serve from a database with `fsync`, `full_page_writes` or `synchronous_commit` off, although"
        " a crash of it may lose what callers were told is recorded.",
        "false",
        _switch,
    ),
    Setting(
        "database_connections",
        "Connections for reads, of which verifications take up to two, and statements and usage one; each"
        " lane has one more, for writing, and keys have one or two.",
        "4",
        _between(4, 100),
    ),
    Setting(
        "queue_max",
        "How many operations may wait in one lane before callers are told to try again later. A"
        " Delegate counts once more for each child, a Recover for each hold.",
        "15000",
        _between(1_000, 1_000_000),
    ),
    Setting(
        "message_bytes_max",
        "The largest request, in bytes.",
        str(4 * 1024 * 1024),
        _between(_MESSAGE_BYTES_MIN, 64 * 1024 * 1024),
    ),
    Setting(
        "principal_rate_max",
        "How many operations a second one principal may ask this server for. A Delegate counts once more for"
        " each child, a Recover for each hold, a Revoke for what it may empty at once; a call that is not about"
        " operations on budgets, such as a read, counts as ten. 0: as many as they like.",
        "20000",
        _between(0, 1_000_000),
    ),
    Setting(
        "principal_burst_max",
        "How many operations one principal may ask for at once, after a pause, before `principal_rate_max`"
        " counts.",
        "40000",
        _between(1, 10_000_000),
    ),
    Setting(
        "principal_operations_max",
        "How many operations of one principal may be in progress at once, counted likewise. Below `queue_max`,"
        " so that no principal alone fills a lane. 0: as many as they like.",
        "10000",
        _between(0, 1_000_000),
    ),
    Setting(
        "principal_streams_max",
        "How many streams one principal may have open at once: WatchEntries, Verify, Export. 0: as many as"
        " they like.",
        "16",
        _between(0, 10_000),
    ),
    Setting(
        "connections_max",
        "How many clients may be connected at each address at once; fewer where the process may not open"
        " as many files.",
        "16000",
        _between(1, 1_000_000),
    ),
    Setting(
        "call_seconds_max",
        "When a call ends at the latest, in seconds, whatever deadline its caller has set.",
        "60",
        _between(1, 3_600),
    ),
    Setting(
        "connection_seconds_max",
        "How long a client may keep a connection, in seconds, give or take a tenth. Then it is told to connect"
        " anew, to whichever server its name leads to by then; what is under way is finished. 0: as long as it"
        " likes.",
        "0",
        _between(0, 86_400),
    ),
    Setting(
        "sweep_seconds",
        "How often the server looks for holds and leases whose time is over, in seconds, when nothing is"
        " due. 0: never; then another server of the same ledger has to.",
        "1",
        _between(0, 60),
    ),
    Setting(
        "signing_key_file",
        "The file of the private key that checkpoints are signed with: Ed25519, PEM, for its owner only."
        " `peculium audit new-key` makes one. Without it a server with a PostgreSQL of its own makes"
        " one in `data_dir`, and one with a configured database does not seal.",
        "",
        _private_file,
        secret=True,
    ),
    Setting(
        "seal_seconds",
        "How often what was recorded is sealed by a checkpoint, in seconds, whichever servers do it. 0:"
        " never; then another server of the same ledger has to.",
        "60",
        _between(0, 86_400),
    ),
    Setting(
        "alert_seconds",
        "How often it is looked for what alert rules watch for, in seconds, whichever servers do it. 0:"
        " never; then another server of the same ledger has to.",
        "5",
        _between(0, 3_600),
    ),
    Setting(
        "webhook_key_file",
        "The file of the key that webhooks' secrets are made of, for its owner only. `peculium webhooks"
        " new-key` makes one; all servers of a ledger need the same. Without it a server with a"
        " PostgreSQL of its own makes one in `data_dir`, and one with a configured database sends no"
        " alerts.",
        "",
        _private_file,
        secret=True,
    ),
    Setting(
        "webhook_allow",
        "Hosts and networks that webhooks may lead to although they are not public, separated by commas:"
        " `hooks.internal,10.1.0.0/16`.",
        "",
        _allowed,
    ),
    Setting(
        "webhook_loopback",
        "Let webhooks lead to this machine itself, without TLS, too. For development.",
        "false",
        _switch,
    ),
    Setting(
        "drain_seconds",
        "How long the server finishes what it has accepted after it was told to stop, in seconds. Told a"
        " second time, it ends at once.",
        "20",
        _between(0, 3_600),
    ),
    Setting(
        "refusal_days",
        "For how many days it is kept how often budgets were refused what, by minute. 0: it is not counted.",
        "7",
        _between(0, 365),
    ),
    Setting(
        "freeze_on_reuse_seconds",
        "Freeze a budget when a token of it is presented that another principal had consumed at most so long ago,"
        " in seconds. 0: never; it is recorded all the same, as a security event.",
        "0",
        _between(0, 2_592_000),
    ),
    Setting(
        "balance_roots",
        "Roots whose balances are exported as metrics, by name, with commas between them: at most 20.",
        "",
        _names,
    ),
    Setting(
        "metrics_listen",
        "An address at which Prometheus may come for the metrics, as host:port: `http://HOST:PORT/metrics`. It is"
        " neither encrypted nor is anybody asked for a key there; it tells no secrets and no"
        " ids, and the balances of `balance_roots`. Without one there is no such page.",
        "",
        _address,
    ),
    Setting(
        "log_format",
        "How the log is written to the error stream: `text`, lines for people, or `json`, an object in each"
        " line for machines.",
        "text",
        _one_of("text", "json"),
    ),
    Setting(
        "log_level",
        "What is logged at the least: `debug`, `info`, `warning`, `error`. At `info` there is an event for"
        " each call.",
        "warning",
        _one_of("debug", "info", "warning", "error"),
    ),
    Setting(
        "ready_file",
        "A file to be written as soon as calls are served: JSON with `listening`, `pid`, `database`,"
        " and where else it listens.",
        "",
        _path,
    ),
)

CLIENT_SETTINGS: Final = (
    Setting(
        "target",
        "The server to call, as host:port.",
        f"127.0.0.1:{PORT_DEFAULT}",
        _text,
    ),
    Setting(
        "api_key",
        "The key that names the caller; it is sent in clear text to this machine only.",
        "",
        _text,
        secret=True,
    ),
    Setting(
        "tls",
        "Encrypt the connection. Whichever of the following is said, it is encrypted, unless this is false.",
        "",
        _switch,
    ),
    Setting(
        "tls_ca_file",
        "The certificates of those who may vouch for the server, as PEM. Without it: those that gRPC brings"
        " along.",
        "",
        _path,
    ),
    Setting(
        "tls_client_cert_file",
        "The client's own certificate, as PEM, where the server asks for one.",
        "",
        _path,
    ),
    Setting(
        "tls_client_key_file",
        "The private key of that certificate, as PEM.",
        "",
        _private_file,
        secret=True,
    ),
    Setting(
        "tls_server_name",
        "The name that the server's certificate has to have. Without it: the target's host.",
        "",
        _text,
    ),
)
"""Those of the SDK, and so of the command line, which reads them through it."""

_KNOWN_VARIABLES: Final = frozenset(
    setting.variable for setting in (*SERVER_SETTINGS, *CLIENT_SETTINGS)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The server's settings."""

    database_url: str | None
    data_dir: Path
    listen: Address
    keys_file: Path | None
    tls_cert_file: Path | None
    tls_key_file: Path | None
    tls_client_ca_file: Path | None
    tls_client_listen: Address | None
    allow_plaintext: bool
    unsafe_settings: bool
    database_connections: int
    queue_max: int
    message_bytes_max: int
    principal_rate_max: int
    principal_burst_max: int
    principal_operations_max: int
    principal_streams_max: int
    connections_max: int
    call_seconds_max: int
    connection_seconds_max: int
    sweep_seconds: int
    signing_key_file: Path | None
    seal_seconds: int
    alert_seconds: int
    webhook_key_file: Path | None
    webhook_allow: str | None
    webhook_loopback: bool
    drain_seconds: int
    refusal_days: int
    freeze_on_reuse_seconds: int
    balance_roots: tuple[str, ...] | None
    metrics_listen: Address | None
    log_format: str
    log_level: str
    ready_file: Path | None

    @classmethod
    def load(
        cls, flags: Mapping[str, str | None], environment: Mapping[str, str] | None = None
    ) -> Self:
        """Read the settings from flags, by name, and from the environment.

        Raises:
            ConfigInvalid: Some cannot be used; names every problem.
        """
        environment = os.environ if environment is None else environment
        values, problems = _read(SERVER_SETTINGS, flags, environment)
        if values["data_dir"] is None:
            values["data_dir"] = _default_data_dir(environment)
        problems += _tls_problems(values)
        if problems:
            raise ConfigInvalid(problems)
        return cls(**values)

    def told(self) -> dict[str, str]:
        """Every setting as it may be printed."""
        texts = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and not isinstance(value, Address):
                value = ",".join(value)
            texts[field.name] = "" if value is None else str(value)
        texts["database_url"] = self.told_database
        return texts

    @property
    def told_database(self) -> str:
        """Which database, as it may be printed."""
        if self.database_url is None:
            return f"embedded in {self.data_dir}"
        return redacted_database(self.database_url)

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={text!r}' for name, text in self.told().items())})"


def _tls_problems(values: Mapping[str, Any]) -> list[str]:
    """What does not go together in the settings of TLS."""
    problems = []
    encrypted = values["tls_cert_file"] is not None
    if encrypted != (values["tls_key_file"] is not None):
        problems.append(f"{_named('tls_cert_file')}: goes together with tls_key_file")
    if values["tls_client_ca_file"] is not None and not encrypted:
        problems.append(f"{_named('tls_client_ca_file')}: needs tls_cert_file")
    if values["tls_client_listen"] is not None and values["tls_client_ca_file"] is None:
        problems.append(f"{_named('tls_client_listen')}: needs tls_client_ca_file")
    allowed, listen, page = (
        values[name] for name in ("allow_plaintext", "listen", "metrics_listen")
    )
    if listen is not None and not (listen.loopback or encrypted or allowed):
        problems.append(
            f"{_named('listen')}: without TLS only a loopback address is listened on, and {listen.host} is"
            " not one; name a tls_cert_file and a tls_key_file, listen on 127.0.0.1, or, where something"
            " else encrypts the connections, say allow_plaintext"
        )
    if page is not None and not (page.loopback or allowed):
        problems.append(
            f"{_named('metrics_listen')}: metrics are told without TLS, so only a loopback address is listened"
            f" on, and {page.host} is not one; listen on 127.0.0.1, or, where nobody else can connect to it, say"
            " allow_plaintext"
        )
    return problems


@dataclass(frozen=True, slots=True)
class Exporting:
    """What OpenTelemetry's own variables ask a server to export.

    Where to, how often, and whatever else they say, the SDK reads itself.
    """

    traces: bool = False
    metrics: bool = False
    disabled: bool = False
    """Everything is switched off, also what others come for."""
    sampler: bool = False
    """Which calls are traced is said, too."""
    propagators: bool = False
    """So is by what callers say it."""
    problems: tuple[str, ...] = ()
    """What they ask for and this server cannot do."""

    @classmethod
    def load(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Read the variables; without an endpoint nothing is exported."""
        environment = os.environ if environment is None else environment
        if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return cls(disabled=True)
        problems: list[str] = []
        traces = _exported("TRACES", environment, problems)
        metrics = _exported("METRICS", environment, problems)
        sampler = bool(environment.get("OTEL_TRACES_SAMPLER"))
        propagators = bool(environment.get("OTEL_PROPAGATORS"))
        return cls(
            traces=traces,
            metrics=metrics,
            sampler=sampler,
            propagators=propagators,
            problems=tuple(problems),
        )


def _exported(signal: str, environment: Mapping[str, str], problems: list[str]) -> bool:
    """Say whether a signal is exported."""

    def said(name: str) -> str:
        own = environment.get(f"OTEL_EXPORTER_OTLP_{signal}_{name}", "")
        return own or environment.get(f"OTEL_EXPORTER_OTLP_{name}", "")

    variable = f"OTEL_{signal}_EXPORTER"
    exporter, protocol = environment.get(variable, "").strip(), said("PROTOCOL").strip()
    if exporter == "none" or not (exporter or said("ENDPOINT")):
        return False
    if exporter not in ("", "otlp"):
        problems.append(f"{variable}: this server knows otlp and none (it is {exporter!r})")
        return False
    if protocol not in ("", "grpc"):
        problems.append(
            f"OTEL_EXPORTER_OTLP_PROTOCOL: this server exports by grpc only (it is {protocol!r})"
        )
        return False
    return True


def unknown_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """Variables that look like settings and are none: misspelt, most likely."""
    environment = os.environ if environment is None else environment
    return sorted(
        name for name in environment if name.startswith(PREFIX) and name not in _KNOWN_VARIABLES
    )


def quieten_grpc(environment: MutableMapping[str, str] | None = None) -> None:
    """Have gRPC itself log errors only, unless somebody wants more of it. It reads that when it is imported.

    By default it has several lines to say of each handshake that fails, and anybody can make those.
    """
    environment = os.environ if environment is None else environment
    environment.setdefault("GRPC_VERBOSITY", "ERROR")


def _read(
    settings: tuple[Setting, ...], flags: Mapping[str, str | None], environment: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """The value of every setting, None where it has none or a bad one; and every problem."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for setting in settings:
        given = flags.get(setting.name)
        # An empty variable is how a compose file or a shell says "not set".
        text = environment.get(setting.variable, "") if given is None else given
        values[setting.name] = None
        if not text:
            text = setting.default
        if not text:
            continue
        try:
            values[setting.name] = setting.parse(text)
        except ValueError as error:
            said = "" if setting.secret else f" (it is {text!r})"
            problems.append(f"{_named(setting.name)}: {error}{said}")
    return values, problems


def _named(name: str) -> str:
    return f"{PREFIX}{name.upper()} or --{name.replace('_', '-')}"


def _default_data_dir(environment: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return _DATA_DIR_OF_ROOT
    base = environment.get("XDG_DATA_HOME")
    if base:
        return Path(base) / "peculium"
    try:
        return Path.home() / ".local" / "share" / "peculium"
    except RuntimeError:
        # A container may run as a user whom nobody has heard of.
        return _DATA_DIR_OF_ROOT
