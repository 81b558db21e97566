from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
import uuid

import pytest

from peculium import _ids
from peculium_server.core import encoding


def test_an_id_is_a_uuid_of_version_7_and_of_now() -> None:
    before = time.time_ns() // 1_000_000
    made = uuid.UUID(bytes=_ids.new_id())
    assert made.version == 7
    assert made.variant == uuid.RFC_4122
    assert before <= int.from_bytes(made.bytes[:6]) <= time.time_ns() // 1_000_000


def test_ids_rise_and_never_repeat_also_between_threads() -> None:
    made: list[list[bytes]] = [[] for _ in range(4)]

    def make(into: list[bytes]) -> None:
        into.extend(_ids.new_id() for _ in range(2000))

    threads = [threading.Thread(target=make, args=(into,)) for into in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(into == sorted(into) for into in made)
    assert len({each for into in made for each in into}) == 8000


@pytest.mark.parametrize("drawn", [b"\x00", b"\xff"])
def test_ids_rise_within_a_millisecond_whatever_is_drawn(
    monkeypatch: pytest.MonkeyPatch, drawn: bytes
) -> None:
    """Nothing drawn is the smallest step there is; with everything drawn there is no room for one."""
    milliseconds = 1_800_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: milliseconds * 1_000_000)
    monkeypatch.setattr(secrets, "token_bytes", lambda count: drawn * count)
    clock = _ids._Clock()
    made = [clock.next() for _ in range(3)]
    assert sorted(set(made)) == made
    assert {(uuid.UUID(bytes=each).version, uuid.UUID(bytes=each).variant) for each in made} == {
        (7, uuid.RFC_4122)
    }
    ahead = [int.from_bytes(each[:6]) - milliseconds for each in made]
    assert ahead == ([0, 0, 0] if drawn == b"\x00" else [0, 1, 2])


def test_ids_rise_although_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = _ids.new_id()
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 30 * 1_000_000_000)
    later = [_ids.new_id() for _ in range(100)]
    assert sorted([first, *later]) == [first, *later]
    assert uuid.UUID(bytes=later[-1]).version == 7


def test_ids_follow_a_clock_that_was_an_hour_ahead_and_is_set_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.time_ns()
    clock = _ids._Clock()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3_600 * 1_000_000_000)
    ahead = clock.next()
    monkeypatch.setattr(time, "time_ns", lambda: now)
    right = [clock.next() for _ in range(100)]
    assert int.from_bytes(ahead[:6]) == (now // 1_000_000) + 3_600_000
    assert {int.from_bytes(made[:6]) for made in right} <= {now // 1_000_000, now // 1_000_000 + 1}
    assert sorted(set(right)) == right


def test_a_forked_child_makes_ids_of_its_own() -> None:
    _ids.new_id()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, _ids.new_id())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 16) != _ids.new_id()
    os.close(read)
    os.close(write)


def test_a_token_id_is_what_the_ledger_computes() -> None:
    secret = _ids.new_secret()
    assert len(secret) == 32
    assert _ids.token_id(secret) == encoding.token_id(secret)
    assert _ids.token_id(secret) == hashlib.sha256(b"peculium.token.v1\x00" + secret).digest()


def test_an_id_is_read_with_and_without_hyphens() -> None:
    made = _ids.new_id()
    assert _ids.id_bytes(_ids.id_text(made)) == made
    assert _ids.id_bytes(made.hex()) == made
    assert _ids.id_bytes("nonsense") is None
    assert _ids.id_text(b"\x01\x02") == "0102"
