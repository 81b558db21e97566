"""How a client is connected: the one reader of the environment, and everything checked at once."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

import grpc

from peculium._limits import MESSAGE_BYTES_MAX
from peculium.apikeys import KEY_PREFIX, ApiKey
from peculium.errors import InsecureCredentials, Malformed

TARGET_DEFAULT = "127.0.0.1:7415"
TIMEOUT_SECONDS_DEFAULT = 10.0
CLOSE_SECONDS_DEFAULT = 10.0

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
_TLS_VARIABLES = {
    "ca_file": "CA_FILE",
    "cert_file": "CLIENT_CERT_FILE",
    "key_file": "CLIENT_KEY_FILE",
    "server_name": "SERVER_NAME",
}
_LOCAL_SCHEMES = ("unix:", "unix-abstract:")
_RECONNECT_FIRST_MS = 100
_RECONNECT_LONGEST_MS = 2_000
_KEEPALIVE_MS = 20_000
_KEEPALIVE_TIMEOUT_MS = 5_000


@dataclass(frozen=True, slots=True)
class Tls:
    """How to encrypt the connection.

    Attributes:
        root_certificates: PEM of the authorities that may vouch for the ledger; absent: those that
            grpc brings along.
        private_key: PEM of the client's own key, where the ledger asks for a certificate.
        certificate_chain: PEM of the client's own certificate.
        server_name: The name that the ledger's certificate has to have; absent: the target's host.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    certificate_chain: bytes | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            problem = "a private key and a certificate chain go together"
            raise Malformed(f"tls: {problem}", facts={"field": "tls", "problem": problem})

    @classmethod
    def of_files(
        cls,
        *,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
        server_name: str | None = None,
    ) -> Self:
        """Read the certificates and the key from PEM files. They are not read again when they change.

        Raises:
            Malformed: A file cannot be read, or a key and a certificate do not come together.
        """
        return cls(
            root_certificates=_read(ca_file),
            private_key=_read(key_file),
            certificate_chain=_read(cert_file),
            server_name=server_name,
        )


@dataclass(frozen=True, slots=True)
class Config:
    """A client's connection, checked.

    Attributes:
        target: Where the ledger is, as grpc names it.
        api_key: The caller's credential, or None.
        timeout: How many seconds a verb may take unless it says otherwise.
        tls: How to encrypt; None: not at all.
    """

    target: str
    api_key: str | None = field(repr=False)
    timeout: float
    tls: Tls | None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """How the channel is encrypted; None: not at all."""
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(
            self.tls.root_certificates, self.tls.private_key, self.tls.certificate_chain
        )

    @property
    def options(self) -> tuple[tuple[str, int | str], ...]:
        """How the channel behaves. Retries are ours, since they have to keep tokens in order."""
        name = None if self.tls is None else self.tls.server_name
        override = () if name is None else (("grpc.ssl_target_name_override", name),)
        return (
            *override,
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.enable_retries", 0),
            # grpc's own default waits up to two minutes for a server that was restarted.
            ("grpc.initial_reconnect_backoff_ms", _RECONNECT_FIRST_MS),
            ("grpc.min_reconnect_backoff_ms", _RECONNECT_FIRST_MS),
            ("grpc.max_reconnect_backoff_ms", _RECONNECT_LONGEST_MS),
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.primary_user_agent", f"peculium-python/{_version()}"),
        )


def configure(
    target: str | None,
    *,
    api_key: str | None,
    timeout: float,
    tls: Tls | bool | None,
    allow_insecure: bool,
) -> Config:
    """Complete the arguments from the environment, and check them.

    Raises:
        Malformed: The timeout is not above zero, the key is not one, or a file cannot be read.
        InsecureCredentials: The key would travel in clear text beyond this machine.
    """
    where = target or os.environ.get("PECULIUM_TARGET") or TARGET_DEFAULT
    key = api_key or os.environ.get("PECULIUM_API_KEY") or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        # The message does not repeat the key.
        problem = "must be printable ASCII without spaces"
        raise Malformed(f"api_key: {problem}", facts={"field": "api_key", "problem": problem})
    if not timeout > 0:
        problem = f"must be above zero seconds, not {timeout}"
        raise Malformed(f"timeout: {problem}", facts={"field": "timeout", "problem": problem})
    if key is not None and key.startswith(KEY_PREFIX):
        # One of which a part was lost on the way is told here, and not as one that nobody has.
        ApiKey.parse(key)
    encryption = _of_environment() if tls is None else Tls() if tls is True else (tls or None)
    if key is not None and encryption is None and not allow_insecure and not _is_local(where):
        raise InsecureCredentials(
            f"an API key would travel in clear text to {where}: pass tls=True, or "
            "allow_insecure=True if something else encrypts the connection"
        )
    return Config(where, key, timeout, encryption)


def _of_environment() -> Tls | None:
    """What the environment says of encryption; None: nothing, or that there is none."""
    switch = os.environ.get("PECULIUM_TLS", "").lower()
    if switch not in (*_TRUE, *_FALSE, ""):
        problem = f"PECULIUM_TLS must be true or false, not {switch!r}"
        raise Malformed(f"tls: {problem}", facts={"field": "tls", "problem": problem})
    named = {
        name: os.environ.get(f"PECULIUM_TLS_{variable}") or None
        for name, variable in _TLS_VARIABLES.items()
    }
    if switch in _FALSE or not (switch or any(named.values())):
        return None
    return Tls.of_files(**named)


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    if "\n" in path or "-----BEGIN" in path:
        # The message does not repeat it.
        problem = "must be the path of a file, not what is in it"
        raise Malformed(f"tls: {problem}", facts={"field": "tls", "problem": problem})
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror}"
        raise Malformed(f"tls: {problem}", facts={"field": "tls", "problem": problem}) from error


def _is_local(target: str) -> bool:
    """Whether a target is on this machine for certain."""
    if target.startswith(_LOCAL_SCHEMES):
        return True
    address = target.rpartition("/")[2].removeprefix("ipv4:").removeprefix("ipv6:")
    host = address.rpartition(":")[0] if not address.endswith("]") else address
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _version() -> str:
    try:
        return version("peculium")
    except PackageNotFoundError:
        return "unknown"
