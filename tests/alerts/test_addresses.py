"""Where webhooks may lead: nowhere that only the server can reach."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from peculium_server.webhooks.addresses import Allowed, NotAllowed, addresses_of, parse

NOTHING = Allowed()
PUBLIC = ("93.184.216.34", "1.1.1.1", "2606:2800:220:1:248:1893:25c8:1946")
PRIVATE = (
    *("10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "fd00::1", "fc00::1"),
    *("192.0.2.1", "198.18.0.1", "203.0.113.7", "2001:db8::1", "100::1"),
)
LOOPBACK = ("127.0.0.1", "127.8.8.8", "::1")
NEVER = (
    *("169.254.169.254", "169.254.0.1", "fe80::1", "fe80::1%eth0", "fd00:ec2::254"),
    *("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd20:ce::254"),
    *(
        "0.0.0.0",
        "0.1.2.3",
        "::",
        "224.0.0.1",
        "239.1.1.1",
        "ff02::1",
        "240.0.0.1",
        "255.255.255.255",
    ),
    *("::ffff:127.0.0.1", "::ffff:1.1.1.1", "::1.1.1.1", "64:ff9b::101:101", "64:ff9b::7f00:1"),
    *("64:ff9b:1::1", "2002:7f00:1::", "2001:0:1::1", "fec0::1"),
)


def resolving(*addresses: str) -> object:
    async def resolve(_: str, __: int) -> Sequence[str]:
        return addresses

    return resolve


async def reached(
    allowed: Allowed, *addresses: str, url: str = "https://receiver.example/"
) -> bool:
    try:
        target = parse(url, allowed)
        found = await addresses_of(target, resolving(*addresses), allowed)  # type: ignore[arg-type]
    except NotAllowed:
        return False
    assert [str(address) for address in found] == list(addresses)
    return True


@pytest.mark.parametrize("address", PUBLIC)
async def test_public_addresses_are_reached(address: str) -> None:
    assert await reached(NOTHING, address)


@pytest.mark.parametrize("address", [*PRIVATE, *LOOPBACK, *NEVER])
async def test_no_other_address_is_reached_by_a_name_nor_as_itself(address: str) -> None:
    assert not await reached(NOTHING, address)
    with pytest.raises(NotAllowed):
        parse(f"https://[{address}]/" if ":" in address else f"https://{address}/", NOTHING)


@pytest.mark.parametrize("address", [*PRIVATE, *LOOPBACK, *NEVER])
async def test_a_name_is_refused_if_any_of_its_addresses_is(address: str) -> None:
    assert not await reached(NOTHING, "93.184.216.34", address)
    assert not await reached(NOTHING, address, "93.184.216.34")


async def test_a_name_without_addresses_is_refused() -> None:
    assert not await reached(NOTHING)
    assert not await reached(NOTHING, "not-an-address")


async def test_what_is_allowed_is_reached_by_name_or_by_network() -> None:
    allowed = Allowed.of("hooks.internal, 10.1.0.0/16,fd00:1::/32")
    for address in ("10.9.9.9", "192.168.1.1", "fd00::1", "127.0.0.1"):
        assert await reached(allowed, address, url="https://Hooks.Internal:8443/x")
    assert await reached(allowed, "10.1.2.3")
    assert await reached(allowed, "fd00:1::5")
    assert not await reached(allowed, "10.2.0.1")


@pytest.mark.parametrize("address", NEVER)
async def test_what_is_never_reached_is_not_by_any_allowance(address: str) -> None:
    allowed = Allowed.of("hooks.internal,0.0.0.0/0,::/0", loopback=True)
    assert not await reached(allowed, address, url="https://hooks.internal/")


async def test_plain_http_is_for_this_machine_and_only_where_that_is_allowed() -> None:
    http = "http://receiver.example/"
    assert await reached(Allowed(loopback=True), "127.0.0.1", url=http)
    assert await reached(Allowed(loopback=True), "::1", url=http)
    assert not await reached(Allowed(loopback=True), "93.184.216.34", url=http)
    assert not await reached(Allowed.of("10.0.0.0/8", loopback=True), "10.0.0.1", url=http)
    assert not await reached(Allowed.of("127.0.0.0/8,receiver.example"), "127.0.0.1", url=http)


@pytest.mark.parametrize(
    "url",
    [
        *("", "receiver.example", "ftp://receiver.example/", "file:///etc/passwd", "https://"),
        *("https://user@receiver.example/", "https://user:pass@receiver.example/"),
        *(
            "https://receiver.example/#part",
            "https://receiver.example/#",
            "https://@receiver.example/",
        ),
        *(
            "https://receiver.example/\r\nx: y",
            "https://receiver.example/a b",
            "https://é.example/",
        ),
        *(
            "https://receiver.example:0/",
            "https://receiver.example:65536/",
            "https://receiver.example:x/",
        ),
        *(
            "https://a..b/",
            "https://-a.example/",
            "https://receiver.example\\@10.0.0.1/",
            "https://[::1/",
        ),
        *(f"https://{'a' * 64}.example/", "https://receiver.example/" + "a" * 2_048),
        *(
            f"https://receiver.example/pec_{'-' * 92}",
            f"https://receiver.example/?key=pek_{'_' * 72}",
        ),
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(NotAllowed):
        parse(url, Allowed(loopback=True))


def test_an_address_is_taken_apart_as_a_request_needs_it() -> None:
    target = parse("https://receiver.example:8443?a=b", NOTHING)
    assert target == (True, "receiver.example", 8443, "receiver.example:8443", "/?a=b")
    assert parse("https://receiver.example./x", NOTHING).host == "receiver.example"


@pytest.mark.parametrize("text", ["10.0.0.1/8", "a b", "http://x", "*.internal", "10.0.0"])
def test_an_allowance_that_is_neither_name_nor_network_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names and networks"):
        Allowed.of(text)
