from __future__ import annotations

import grpc
import pytest

import peculium
from peculium import Tls
from peculium._config import Config, configure
from peculium.errors import InsecureCredentials, Malformed
from tests.client.ledger import Ledger, Serving

KEY = "key-of-svc-a"


def configured(
    target: str | None = None,
    *,
    api_key: str | None = None,
    timeout: float = 1.0,
    tls: Tls | bool | None = None,
    allow_insecure: bool = False,
) -> Config:
    return configure(
        target, api_key=api_key, timeout=timeout, tls=tls, allow_insecure=allow_insecure
    )


def test_without_anything_it_is_the_ledger_of_this_machine() -> None:
    config = configured()
    assert config.target == "127.0.0.1:7415"
    assert config.metadata == ()
    assert config.credentials is None


def test_the_environment_completes_what_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PECULIUM_TARGET", "localhost:1234")
    monkeypatch.setenv("PECULIUM_API_KEY", KEY)
    config = configured()
    assert config.target == "localhost:1234"
    assert config.metadata == (("authorization", f"Bearer {KEY}"),)
    assert configured("localhost:99", api_key="another").target == "localhost:99"
    assert configured(api_key="another").api_key == "another"


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:1",
        "127.9.9.9:1",
        "localhost:1",
        "[::1]:1",
        "ipv4:127.0.0.1:1",
        "unix:/run/x",
        "dns:///localhost:1",
        "ipv6:[::1]:1",
    ],
)
def test_a_key_may_stay_in_the_clear_on_this_machine(target: str) -> None:
    assert configured(target, api_key=KEY).credentials is None


@pytest.mark.parametrize(
    "target",
    [
        "ledger.example:443",
        "10.0.0.1:1",
        "dns:///ledger.example:443",
        "localhost.example:1",
        "127.0.0.1.example:1",
        "0.0.0.0:1",
        "[fe80::1]:1",
        "ledger",
    ],
)
def test_a_key_does_not_leave_this_machine_in_the_clear(target: str) -> None:
    with pytest.raises(InsecureCredentials) as caught:
        configured(target, api_key=KEY)
    assert KEY not in str(caught.value)
    assert configured(target, api_key=KEY, tls=True).credentials is not None
    assert configured(target, api_key=KEY, allow_insecure=True).credentials is None
    assert configured(target).credentials is None


def test_tls_takes_certificates() -> None:
    assert configured(tls=Tls(root_certificates=None)).credentials is not None
    with pytest.raises(Malformed, match="go together"):
        Tls(private_key=b"key")
    assert "secret" not in repr(Tls(private_key=b"secret", certificate_chain=b"chain"))


@pytest.mark.parametrize("key", ["with space", "line\nbreak", "schlüssel"])
def test_a_key_that_cannot_travel_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(Malformed) as caught:
        configured(api_key=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_is_above_zero(timeout: float) -> None:
    with pytest.raises(Malformed, match="timeout"):
        configured(timeout=timeout)


def test_the_key_is_not_shown() -> None:
    assert KEY not in repr(configured(api_key=KEY))


def test_grpc_does_not_retry_on_its_own() -> None:
    assert ("grpc.enable_retries", 0) in configured().options


async def test_every_call_carries_the_key(ledger: Ledger, served: Serving) -> None:
    async with peculium.aio.connect(served.target, api_key=KEY) as client:
        await client.admin.grant("acme", unit="calls", amount=10, holder="dev")
        root = await client.open("acme")
        await root.spend(1)
        [_ async for _ in client.audit.budgets()]
    assert set(ledger.keys) == {f"Bearer {KEY}"}
    assert len(ledger.keys) == 4


async def test_a_ledger_that_speaks_tls_is_not_reached_in_the_clear(served: Serving) -> None:
    async with peculium.aio.connect(served.target, tls=True, timeout=0.5) as client:
        with pytest.raises(peculium.Unavailable):
            await client.open("acme")


def test_the_options_are_grpcs() -> None:
    with grpc.insecure_channel("127.0.0.1:1", options=configured().options):
        pass


def test_what_is_in_a_key_file_is_not_taken_for_its_path_and_not_shown() -> None:
    pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2Vw\n-----END PRIVATE KEY-----\n"
    for wrong in (pem, pem.splitlines()[0], "MC4CAQAwBQYDK2Vw\n"):
        with pytest.raises(Malformed) as caught:
            Tls.of_files(key_file=wrong)
        assert wrong not in repr(vars(caught.value))
