from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from peculium_server.core.refusals import Refusal
from peculium_server.rpc.calls import CallRefused
from peculium_server.rpc.pages import (
    PAGE_BYTES_MAX,
    PAGE_SIZE_DEFAULT,
    PAGE_SIZE_MAX,
    Asked,
    fitting,
    page_token,
    read_page,
)


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_a_list_goes_on_where_its_token_says(scope: bytes, key: bytes) -> None:
    assert read_page(scope, 10, page_token(scope, key)) == Asked(10, key)


def test_the_first_page_needs_no_token() -> None:
    assert read_page(b"holds", 0, "") == Asked(PAGE_SIZE_DEFAULT, None)


def test_the_last_page_gives_no_token() -> None:
    assert not page_token(b"holds", None)


@pytest.mark.parametrize("size", [-1, PAGE_SIZE_MAX + 1, 2**31 - 1, -(2**31)])
def test_a_page_of_no_possible_size_is_malformed(size: int) -> None:
    with pytest.raises(CallRefused) as caught:
        read_page(b"holds", size, "")
    assert caught.value.refused.reason is Refusal.MALFORMED
    assert caught.value.refused.facts["field"] == "page_size"


@given(st.text(min_size=1) | st.binary(min_size=1).map(lambda raw: raw.decode("latin-1")))
def test_a_token_that_no_list_has_given_is_malformed(token: str) -> None:
    with pytest.raises(CallRefused) as caught:
        read_page(b"holds", 10, token)
    assert caught.value.refused.reason is Refusal.MALFORMED
    assert caught.value.refused.facts["field"] == "page_token"


@given(st.binary(max_size=32), st.data())
def test_a_damaged_token_is_malformed(key: bytes, data: st.DataObject) -> None:
    token = page_token(b"holds", key)
    index = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.sampled_from("ABab01-_").filter(lambda char: char != token[index]))
    damaged = token[:index] + other + token[index + 1 :]
    try:
        read = read_page(b"holds", 10, damaged)
    except CallRefused as error:
        assert error.refused.reason is Refusal.MALFORMED  # noqa: PT017 - either is right
    else:
        # The unused low bits of the last character say nothing.
        assert read == Asked(10, key)


def test_the_token_of_another_list_is_malformed() -> None:
    with pytest.raises(CallRefused):
        read_page(b"entries", 10, page_token(b"holds", b"key"))


@pytest.mark.parametrize(
    ("sizes", "fit"),
    [
        ([], 0),
        ([1, 2, 3], 3),
        ([PAGE_BYTES_MAX, 1], 1),
        ([PAGE_BYTES_MAX * 3, 1], 1),
        ([PAGE_BYTES_MAX - 2, 1, 1, 1], 3),
    ],
)
def test_a_page_has_as_many_rows_as_a_message_holds_and_at_least_one(
    sizes: list[int], fit: int
) -> None:
    assert list(fitting(sizes, lambda size: size)) == sizes[:fit]
