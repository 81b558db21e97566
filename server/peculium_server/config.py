"""The server's settings: read once, checked all at once, printed redacted.

This is the server's one reader of the environment. A flag beats the environment variable of the same
setting.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, Self
from urllib.parse import parse_qsl, urlsplit

PREFIX: Final = "PECULIUM_"
PORT_DEFAULT: Final = 7415
_PORT_MAX: Final = 65_535
_MESSAGE_BYTES_MIN: Final = 64 * 1024
"""A full batch of ordinary operations takes about this much."""
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})
_SHOWN_OF_DATABASE: Final = ("user", "host", "hostaddr", "port", "dbname", "sslmode", "service")
"""What may be printed of a connection string; whatever else it says might be a secret."""
_KEYWORD_VALUE = re.compile(r"\s*(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|(?:[^\s\\]|\\.)*)")


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


class Setting(NamedTuple):
    """One setting: how it is called, what it means, and how its text is read."""

    name: str
    meaning: str
    default: str
    """As one would write it; empty for none."""
    parse: Callable[[str], Any]
    """Raises ValueError with what the value has to be."""
    secret: bool = False

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


def _switch(value: str) -> bool:
    lowered = value.lower()
    if lowered not in _TRUE | _FALSE:
        raise ValueError("must be true or false")
    return lowered in _TRUE


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
        wanted = "must be a libpq connection string, such as postgresql://user@host/db"
        raise ValueError(wanted) from None
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
        " `/var/lib/peculium`, for others `peculium` in `$XDG_DATA_HOME`, or in `~/.local/share`.",
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
        "The file that names who may call. Without it everybody who can connect may do everything"
        " as the principal `dev`, and only a loopback address is listened on.",
        "",
        _path,
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
        " lane has one more, for writing.",
        "4",
        _between(4, 100),
    ),
    Setting(
        "queue_max",
        "How many operations may wait in one lane before callers are told to try again later. A"
        " Delegate counts once more for each child, a Recover for each hold.",
        "10000",
        _between(1_000, 1_000_000),
    ),
    Setting(
        "message_bytes_max",
        "The largest request, in bytes.",
        str(4 * 1024 * 1024),
        _between(_MESSAGE_BYTES_MIN, 64 * 1024 * 1024),
    ),
    Setting(
        "call_seconds_max",
        "When a call ends at the latest, in seconds, whatever deadline its caller has set.",
        "60",
        _between(1, 3_600),
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
        _path,
    ),
    Setting(
        "seal_seconds",
        "How often what was recorded is sealed by a checkpoint, in seconds, whichever servers do it. 0:"
        " never; then another server of the same ledger has to.",
        "60",
        _between(0, 86_400),
    ),
    Setting(
        "drain_seconds",
        "How long the server finishes what it has accepted after it was told to stop, in seconds. Told a"
        " second time, it ends at once.",
        "20",
        _between(0, 3_600),
    ),
    Setting(
        "ready_file",
        "A file to be written as soon as calls are served: JSON with `listening`, `pid`, `database`.",
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
    unsafe_settings: bool
    database_connections: int
    queue_max: int
    message_bytes_max: int
    call_seconds_max: int
    sweep_seconds: int
    signing_key_file: Path | None
    seal_seconds: int
    drain_seconds: int
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
        listen = values["listen"]
        if listen is not None and values["keys_file"] is None and not listen.loopback:
            problems.append(
                f"{_named('listen')}: without a keys_file only a loopback address is listened on,"
                f" and {listen.host} is not one; name a keys_file, or listen on 127.0.0.1"
            )
        if problems:
            raise ConfigInvalid(problems)
        return cls(**values)

    def told(self) -> dict[str, str]:
        """Every setting as it may be printed."""
        texts = {}
        for field in fields(self):
            value = getattr(self, field.name)
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


def unknown_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """Variables that look like settings and are none: misspelt, most likely."""
    environment = os.environ if environment is None else environment
    return sorted(
        name for name in environment if name.startswith(PREFIX) and name not in _KNOWN_VARIABLES
    )


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
        return Path("/var/lib/peculium")
    base = environment.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "peculium"
