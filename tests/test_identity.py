from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any

import pytest

from peculium_server import identity
from peculium_server.core.keys import KeyAct, KeyActKind, KeyRequest
from peculium_server.core.operations import Role
from peculium_server.identity import (
    DEV,
    Certificate,
    Identities,
    Identity,
    KeysOutdated,
    digest_of,
)
from peculium_server.keyfile import KeyFile, KeysInvalid
from peculium_server.store.errors import LedgerCorrupt, StoreUnavailable
from peculium_server.store.keys import KeysSince

KEY = "k" * 43


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def table(principal: str = "svc", role: str = "agent", sha256: str = digest(KEY)) -> str:
    return f'[[keys]]\nprincipal = "{principal}"\nrole = "{role}"\nsha256 = "{sha256}"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def problems(file: Path, content: str | bytes) -> list[str]:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(KeysInvalid) as caught:
        Identities.load(file)
    assert caught.value.path == file
    return caught.value.problems


@pytest.mark.parametrize(
    ("name", "role"),
    [("agent", Role.AGENT), ("admin", Role.ADMIN), ("auditor", Role.AUDITOR)],
)
def test_a_key_is_its_principals(file: Path, name: str, role: Role) -> None:
    file.write_text(table(role=name))
    identities = Identities.load(file)
    assert identities.identify(KEY) == Identity("svc", frozenset({role}))
    assert not identities.dev_mode


@pytest.mark.parametrize("key", [None, "", "nobody's", digest(KEY), KEY + " ", "\ud800"])
def test_a_key_that_nobody_has_is_nobodys(file: Path, key: str | None) -> None:
    file.write_text(table())
    assert Identities.load(file).identify(key) is None


def test_a_principal_may_have_an_old_key_and_a_new_one(file: Path) -> None:
    file.write_text(table() + table(sha256=digest("new")))
    identities = Identities.load(file)
    assert identities.identify(KEY) == identities.identify("new")


def test_without_a_file_everybody_is_dev_and_may_do_everything() -> None:
    identities = Identities.dev()
    assert identities.dev_mode
    for key in (None, "whatever"):
        assert identities.identify(key) == DEV
    assert DEV.principal == "dev"
    assert DEV.roles == {Role.AGENT, Role.ADMIN, Role.AUDITOR}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "has no [[keys]] and no [[certificates]]"),
        ("keys = []", "has no [[keys]] and no [[certificates]]"),
        ("keys = 3", "keys must be tables: [[keys]]"),
        ("keys = [3]", "key 1: is not a table"),
        (table(principal="system"), "key 1: principal 'system' is reserved"),
        (table(principal=""), "key 1: principal must be 1 to 256 bytes of printable text"),
        (table(principal="é" * 129), "key 1: principal must be 1 to 256 bytes of printable text"),
        (table(principal="a\\u0000b"), "key 1: principal must be 1 to 256 bytes of printable text"),
        (table(role="root"), "key 1: role must be one of agent, admin, auditor"),
        (table(sha256="ab"), "key 1: sha256 must be 64 hexadecimal digits in lower case"),
        (table(sha256="A" * 64), "key 1: sha256 must be 64 hexadecimal digits in lower case"),
        (table() + 'colour = "red"\n', "key 1: 'colour' is not a field of a key"),
        (table() + table("other"), "key 2: its sha256 is that of another key"),
        (
            table() + table(role="admin", sha256=digest("new")),
            "key 2: 'svc' is agent by another key",
        ),
        ("version = 1\n" + table(), "'version' is not a setting of a key file"),
    ],
)
def test_a_problem_of_the_file_says_which_key_has_it(
    file: Path, content: str, problem: str
) -> None:
    assert problems(file, content) == [problem]


def test_every_problem_is_told_at_once(file: Path) -> None:
    told = problems(file, "[[keys]]\nrole = [1]\n" + table(role="root", sha256="xyz"))
    assert [problem.split(":")[0] for problem in told] == ["key 1"] * 3 + ["key 2"] * 2


@pytest.mark.parametrize("content", ["[[keys", b"\xff\xfe"])
def test_what_is_not_toml_is_told_so(file: Path, content: str | bytes) -> None:
    [problem] = problems(file, content)
    assert problem.startswith("is not TOML")


def test_a_file_that_is_not_there_is_told_so(file: Path) -> None:
    with pytest.raises(KeysInvalid, match="cannot be read"):
        Identities.load(file)


# -- What a file may say besides ---------------------------------------------------------------------

ROOT = "0192f0c1-0000-7000-8000-000000000001"
ROOT_ID = uuid.UUID(ROOT).bytes
SPIFFE = "spiffe://example.org/gateway"


def certificate(
    spiffe: str = SPIFFE, role: str = "agent", more: str = "", number: int = 1
) -> tuple[str, str]:
    return (
        f'[[certificates]]\nspiffe = "{spiffe}"\nrole = "{role}"\n{more}\n',
        f"certificate {number}",
    )


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("roots = []", "roots must be the ids of 1 to 100 roots, as UUIDs"),
        ('roots = ["acme"]', "roots must be the ids of 1 to 100 roots, as UUIDs"),
        (f'roots = "{ROOT}"', "roots must be the ids of 1 to 100 roots, as UUIDs"),
        ('expires = "2027-01-01"', "expires must be a time with its zone, as 2027-01-01T00:00:00Z"),
        (
            "expires = 2027-01-01T00:00:00",
            "expires must be a time with its zone, as 2027-01-01T00:00:00Z",
        ),
    ],
)
def test_a_limit_of_a_key_that_is_none_is_told(file: Path, more: str, problem: str) -> None:
    assert problems(file, table() + more + "\n") == [f"key 1: {problem}"]


@pytest.mark.parametrize(
    "spiffe",
    [
        "https://example.org/gateway",
        "spiffe://",
        "spiffe://example.org/",
        "spiffe://example.org/a b",
        "spiffe://Example.org/a",
        "spiffe://example.org/*/a",
        "spiffe://example.org/" + "a" * 250,
    ],
)
def test_a_spiffe_id_that_is_none_is_told(file: Path, spiffe: str) -> None:
    said, which = certificate(spiffe)
    assert problems(file, said) == [
        f"{which}: spiffe must be spiffe://TRUST-DOMAIN/PATH, or end with /* for all below it"
    ]


def test_a_rule_for_certificates_is_said_once(file: Path) -> None:
    said, _ = certificate()
    assert problems(file, said + said) == [f"certificate 2: {SPIFFE!r} is said twice"]


async def test_a_key_of_the_file_may_be_limited_to_roots(file: Path) -> None:
    file.write_text(table() + f'roots = ["{ROOT}"]\n')
    found = Identities.load(file).identify(KEY)
    assert found == Identity("svc", frozenset({Role.AGENT}), frozenset({ROOT_ID}))


# -- The ledger's own keys ---------------------------------------------------------------------------

TEXT = "pek_" + "t" * 72
OTHER_TEXT = "pek_" + "o" * 72


class Source:
    """The acts on keys of a ledger, and its clock, as a test wants them."""

    def __init__(self) -> None:
        self.acts: list[KeyAct] = []
        self.now = NOW
        self.asked: list[int] = []
        self.fails = False

    async def since(self, number: int, /) -> KeysSince:
        self.asked.append(number)
        if self.fails:
            raise StoreUnavailable("it is gone")
        return KeysSince(self.now, len(self.acts), tuple(self.acts[number:]))

    def do(self, asked: KeyRequest) -> None:
        self.acts.append(KeyAct(len(self.acts) + 1, self.now, "ops", None, asked))


NOW = 1_800_000_000_000_000
SECOND = 1_000_000


def key_id(number: int) -> bytes:
    return number.to_bytes(16)


def made(text: str = TEXT, number: int = 1, **fields: Any) -> KeyRequest:
    asked: dict[str, Any] = {
        "principal": "svc",
        "roles": (Role.AGENT, Role.AUDITOR),
        "digest": digest_of(text),
    }
    return KeyRequest(
        kind=KeyActKind.CREATE,
        operation_id=key_id(number),
        key_id=key_id(number),
        **(asked | fields),
    )


def ended(number: int = 1) -> KeyRequest:
    return KeyRequest(
        kind=KeyActKind.REVOKE, operation_id=key_id(100 + number), key_id=key_id(number)
    )


class Clock:
    """The machine's clock, as a test wants it."""

    def __init__(self) -> None:
        self.seconds = 1_000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(identity, "time", clock)
    return clock


async def known(source: Source, file: KeyFile | None = None) -> Identities:
    identities = Identities(file, source)
    await identities.refresh()
    return identities


async def test_a_key_of_the_ledger_is_its_principals() -> None:
    source = Source()
    source.do(made(roots=(ROOT_ID,)))
    identities = await known(source)
    roles = frozenset({Role.AGENT, Role.AUDITOR})
    assert identities.identify(TEXT) == Identity("svc", roles, frozenset({ROOT_ID}), key_id(1))
    assert identities.identify(OTHER_TEXT) is None
    assert identities.identify(None) is None


async def test_what_is_done_elsewhere_is_known_after_the_next_read() -> None:
    source = Source()
    identities = await known(source)
    source.do(made())
    assert identities.identify(TEXT) is None
    await identities.refresh()
    assert identities.identify(TEXT) is not None
    source.do(ended())
    await identities.refresh()
    assert identities.identify(TEXT) is None
    # Only what is new is read.
    assert source.asked == [0, 0, 1]


async def test_both_texts_of_a_rotated_key_are_valid_until_the_overlap_is_over(
    clock: Clock,
) -> None:
    source = Source()
    source.do(made())
    rotation = KeyRequest(
        kind=KeyActKind.ROTATE,
        operation_id=key_id(7),
        key_id=key_id(1),
        digest=digest_of(OTHER_TEXT),
        overlap_us=5 * SECOND,
    )
    source.do(rotation)
    identities = await known(source)
    assert identities.identify(TEXT) == identities.identify(OTHER_TEXT) is not None
    # By the database's clock, which goes on between two reads.
    clock.seconds += 4.9
    assert identities.identify(TEXT) is not None
    clock.seconds += 0.2
    assert identities.identify(TEXT) is None
    assert identities.identify(OTHER_TEXT) is not None


async def test_a_key_expires_by_the_databases_clock(clock: Clock, file: Path) -> None:
    source = Source()
    source.do(made(lifetime_us=60 * SECOND))
    file.write_text(table() + "expires = 2027-01-15T08:01:00Z\n")
    identities = await known(source, KeyFile.load(file))
    for text in (TEXT, KEY):
        assert identities.identify(text) is not None
    source.now += 59 * SECOND
    await identities.refresh()
    clock.seconds += 0.9
    for text in (TEXT, KEY):
        assert identities.identify(text) is not None
    clock.seconds += 0.2
    for text in (TEXT, KEY):
        assert identities.identify(text) is None


async def test_a_server_that_cannot_read_the_keys_trusts_none_of_them_for_long(
    clock: Clock, file: Path
) -> None:
    source = Source()
    source.do(made())
    file.write_text(table())
    identities = await known(source, KeyFile.load(file))
    source.fails = True
    clock.seconds += identity.STALE_SECONDS_MAX
    with pytest.raises(StoreUnavailable):
        await identities.refresh()
    assert identities.identify(TEXT) is not None
    clock.seconds += 0.1
    # Neither one that may have been revoked, nor one that may have been made.
    for text in (TEXT, OTHER_TEXT):
        with pytest.raises(KeysOutdated):
            identities.identify(text)
    # Of what the file says the database has no knowledge.
    assert identities.identify(KEY) is not None
    source.fails = False
    await identities.refresh()
    assert identities.identify(TEXT) is not None


async def test_a_ledger_that_was_restored_to_its_past_has_the_keys_of_then() -> None:
    source = Source()
    source.do(made())
    source.do(made(OTHER_TEXT, 2))
    identities = await known(source)
    del source.acts[1:]
    await identities.refresh()
    assert identities.identify(TEXT) is not None
    assert identities.identify(OTHER_TEXT) is None


async def test_acts_of_which_one_is_missing_are_not_relied_upon(clock: Clock) -> None:
    source = Source()
    source.do(made())
    identities = await known(source)
    source.acts += [replace_number(source.acts[0], 3)]
    with pytest.raises(LedgerCorrupt, match="missing after number 1"):
        await identities.refresh()
    clock.seconds += identity.STALE_SECONDS_MAX + 1
    with pytest.raises(KeysOutdated):
        identities.identify(TEXT)


def replace_number(act: KeyAct, number: int) -> KeyAct:
    return KeyAct(number, act.at, act.by, act.by_key, made(OTHER_TEXT, number))


async def test_development_ends_with_the_first_key_and_does_not_come_back() -> None:
    source = Source()
    identities = Identities(None, source, development=True)
    await identities.refresh()
    assert identities.identify(None) == identities.identify("whatever") == DEV
    source.do(made())
    await identities.refresh()
    assert not identities.dev_mode
    assert identities.identify(None) is None
    source.do(ended())
    await identities.refresh()
    assert not identities.dev_mode


async def test_whoever_is_not_for_development_has_nobody_call_before_the_first_key() -> None:
    identities = await known(Source())
    assert identities.nobody
    assert identities.identify(None) is None
    assert identities.identify("whatever") is None


async def test_in_development_too_a_server_that_cannot_read_the_keys_serves_nobody(
    clock: Clock,
) -> None:
    identities = Identities(None, Source(), development=True)
    await identities.refresh()
    clock.seconds += identity.STALE_SECONDS_MAX + 0.1
    with pytest.raises(KeysOutdated):
        identities.identify(None)


async def test_a_certificates_role_is_that_of_the_most_particular_rule(file: Path) -> None:
    file.write_text(
        certificate("spiffe://example.org/*", "auditor")[0]
        + certificate("spiffe://example.org/agents/*", "agent", f'roots = ["{ROOT}"]')[0]
        + certificate("spiffe://example.org/agents/boss", "admin")[0]
    )
    identities = await known(Source(), KeyFile.load(file))

    def found(path: str) -> Identity | None:
        spiffe = f"spiffe://example.org{path}"
        return identities.identify(None, Certificate(spiffe, NOW + 60 * SECOND))

    for path, role, roots in (
        ("/agents/boss", {Role.ADMIN}, None),
        ("/agents/boss/x", {Role.AGENT}, frozenset({ROOT_ID})),
        ("/agents/seven", {Role.AGENT}, frozenset({ROOT_ID})),
        ("/agents-of-others", {Role.AUDITOR}, None),
    ):
        assert found(path) == Identity(f"spiffe://example.org{path}", frozenset(role), roots)
    stranger = identities.identify(None, Certificate("spiffe://else.org/x", NOW + 60 * SECOND))
    assert stranger == Identity("spiffe://else.org/x", frozenset())


async def test_a_connection_does_not_outlive_its_certificate(file: Path, clock: Clock) -> None:
    file.write_text(certificate()[0])
    identities = await known(Source(), KeyFile.load(file))
    shown = Certificate(SPIFFE, NOW + 5 * SECOND)
    assert identities.identify(None, shown) is not None
    clock.seconds += 5
    assert identities.identify(None, shown) is None


async def test_a_key_that_is_presented_decides_whatever_the_certificate_says(file: Path) -> None:
    file.write_text(table(role="auditor") + certificate()[0])
    identities = await known(Source(), KeyFile.load(file))
    shown = Certificate(SPIFFE, NOW + 60 * SECOND)
    found = identities.identify(KEY, shown)
    assert found is not None
    assert found.principal == "svc"
    assert identities.identify("guessed", shown) is None


async def test_a_file_that_has_changed_is_read_again_and_one_that_is_broken_is_not(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text(table())
    identities = Identities.load(file)
    file.write_text(table() + table("other", sha256=digest("new")))
    identities._reload()
    assert identities.identify("new") is not None
    file.write_text(table("other", "king"))
    for _ in range(3):
        identities._reload()
    assert identities.identify(KEY) is not None
    told = [record.message for record in caplog.records if "CANNOT BE USED" in record.message]
    assert len(told) == 1
    assert "role must be" in told[0]
    file.unlink()
    identities._reload()
    assert identities.identify(KEY) is not None
    file.write_text(table("third", sha256=digest("third")))
    identities._reload()
    assert identities.identify(KEY) is None
    assert identities.identify("third") is not None
