"""Where messages may be sent to.

Whoever may make a webhook could otherwise have the server knock at doors that only the server can reach:
its own machine, its network, and what tells a cloud's machines their credentials. So a name is resolved
here, all that it leads to is looked at, and the connection is made to what was looked at and nothing else.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple
from urllib.parse import SplitResult, urlsplit

from peculium_server.core.alerts import URL_BYTES_MAX
from peculium_server.core.shape import NOT_TOLD, has_secret

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""From a host and a port to the addresses that it has, as texts."""

_PORTS: Final = {"https": 443, "http": 80}
_LABEL: Final = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST: Final = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*", re.ASCII)
_PRINTABLE: Final = re.compile(r"[!-~]+", re.ASCII)

_GLOBAL_V6: Final = ipaddress.ip_network("2000::/3")
"""All that is assigned to be reached from everywhere. What maps, translates or tunnels IPv4 lies outside
of it, but for these."""
_TUNNELS: Final = tuple(map(ipaddress.ip_network, ("2001::/32", "2002::/16", "2001:db8::/32")))

_LOOPBACK: Final = tuple(map(ipaddress.ip_network, ("127.0.0.0/8", "::1/128")))

_NEVER: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            *("0.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4", "169.254.0.0/16"),
            *("::/128", "fe80::/10", "fec0::/10", "ff00::/8"),
            # What tells machines of clouds their credentials, where that is not link-local.
            *("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32"),
            *("fd00:ec2::254/128", "fd20:ce::254/128"),
            # IPv4 in other words: mapped, translated, tunnelled.
            *("::ffff:0:0/96", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16"),
        ),
    )
)
"""Not reached whatever is allowed; but for loopback, which lies in ::/96."""


class NotAllowed(Exception):
    """An address may not be reached; the message says which and why."""


class Target(NamedTuple):
    """An address as it was given, taken apart."""

    secure: bool
    host: str
    """A name, or an IP address without brackets."""
    port: int
    authority: str
    """Host and port as a request names them."""
    path: str
    """With the query; at least "/"."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may be reached beyond what everybody can."""

    hosts: frozenset[str] = frozenset()
    """Names, in lower case, wherever they lead to."""
    networks: tuple[IPNetwork, ...] = ()
    loopback: bool = False
    """This machine itself, and without TLS: for development."""

    @classmethod
    def of(cls, text: str, *, loopback: bool = False) -> Allowed:
        """Read a list of names and networks, separated by commas.

        Raises:
            ValueError: One of them is neither.
        """
        hosts, networks = set(), []
        for each in filter(None, (part.strip() for part in text.split(","))):
            try:
                networks.append(ipaddress.ip_network(each))
            except ValueError:
                if not _HOST.fullmatch(each) or each.replace(".", "").isdigit() or "/" in each:
                    raise ValueError(
                        "must be names and networks, such as hooks.internal,10.1.0.0/16"
                    ) from None
                hosts.add(each.lower())
        return cls(frozenset(hosts), tuple(networks), loopback)


def _split(url: str) -> tuple[SplitResult, int | None, str]:
    """An address with its port and host, if it is one that may be told to admins."""
    if not _PRINTABLE.fullmatch(url) or len(url) > URL_BYTES_MAX or "\\" in url:
        raise NotAllowed(f"must be 1 to {URL_BYTES_MAX} printable ASCII characters without blanks")
    if has_secret(url):
        raise NotAllowed(NOT_TOLD)
    try:
        split = urlsplit(url)
        return split, split.port, (split.hostname or "").rstrip(".")
    except ValueError:
        raise NotAllowed("is no address") from None


def parse(url: str, allowed: Allowed) -> Target:
    """Take an address apart that somebody has given.

    Raises:
        NotAllowed: It is none that messages are sent to, whatever its name leads to.
    """
    split, port, host = _split(url)
    if split.scheme not in _PORTS:
        raise NotAllowed("must begin with https://")
    if split.username is not None or split.password is not None or "@" in split.netloc:
        raise NotAllowed("must not have a user or a password: messages are signed")
    if "#" in url:
        raise NotAllowed("must not have a fragment")
    address = _ip(host)
    if address is None and not _HOST.fullmatch(host):
        raise NotAllowed("must name a host")
    if port == 0:
        raise NotAllowed("must have a port from 1 to 65535")
    target = Target(
        split.scheme == "https",
        host,
        port or _PORTS[split.scheme],
        split.netloc,
        _path(split),
    )
    if address is not None:
        check(target, [address], allowed)
    elif not target.secure and not allowed.loopback:
        raise NotAllowed("must begin with https://")
    return target


def check(target: Target, addresses: Sequence[IPAddress], allowed: Allowed) -> None:
    """Make sure that a target may be reached at all of these addresses.

    Raises:
        NotAllowed: At one of them it may not.
    """
    if not addresses:
        raise NotAllowed(f"{target.host} has no address")
    for address in addresses:
        problem = _problem(target, address, allowed)
        if problem is not None:
            raise NotAllowed(f"{target.host} leads to {address}, which {problem}")
        if not target.secure and not (allowed.loopback and _within(address, _LOOPBACK)):
            raise NotAllowed("must begin with https://")


async def addresses_of(target: Target, resolve: Resolve, allowed: Allowed) -> list[IPAddress]:
    """The addresses of a target, all of which may be reached.

    Raises:
        NotAllowed: It has none, or one that may not.
    """
    literal = _ip(target.host)
    if literal is not None:
        found = [literal]
    else:
        try:
            texts = await resolve(target.host, target.port)
        except OSError as error:
            raise NotAllowed(f"{target.host} cannot be resolved: {error.strerror}") from error
        found = [address for address in map(_ip, texts) if address is not None]
        if len(found) < len(texts):
            raise NotAllowed(f"{target.host} leads to what is no address")
    check(target, found, allowed)
    return found


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, as the system finds them.

    Raises:
        OSError: It finds none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _problem(target: Target, address: IPAddress, allowed: Allowed) -> str | None:
    """Why an address may not be reached; None if it may."""
    if _within(address, _LOOPBACK):
        named = target.host.lower() in allowed.hosts or _within(address, allowed.networks)
        return None if allowed.loopback or named else "is this machine itself"
    if _within(address, _NEVER) or getattr(address, "scope_id", None):
        return "is never sent to"
    if target.host.lower() in allowed.hosts or _within(address, allowed.networks):
        return None
    if address.version == 6:  # noqa: PLR2004 - the version's own number
        public = _within(address, (_GLOBAL_V6,)) and not _within(address, _TUNNELS)
    else:
        public = True
    return None if public and address.is_global else "is not a public address"


def _within(address: IPAddress, networks: Sequence[IPNetwork]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


def _ip(text: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _path(split: SplitResult) -> str:
    path = split.path or "/"
    return f"{path}?{split.query}" if split.query else path
