"""The bounds of every field of a request, and what contradicts what."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from peculium_server.core.limits import (
    AMOUNT_MAX,
    CHILDREN_MAX,
    HOLD_AGE_US_MAX,
    HOLD_TTL_US_MIN,
    LABEL_KEY_BYTES_MAX,
    LABEL_VALUE_BYTES_MAX,
    LABELS_MAX,
    LEASE_US_MAX,
    LEASE_US_MIN,
    NAME_BYTES_MAX,
    OPERATIONS_MAX,
    OVERRUN_FACTOR_MAX,
    PRINCIPAL_BYTES_MAX,
    PROVIDER_BYTES_MAX,
    REASON_BYTES_MAX,
    REFERENCE_BYTES_MAX,
    ROTATIONS_MAX,
    UNIT_BYTES_MAX,
    USAGE_TOKENS_MAX,
)
from peculium_server.core.operations import (
    After,
    ByHolder,
    ByRole,
    ByToken,
    Kind,
    Operation,
    Rotation,
    Usage,
)
from peculium_server.core.refusals import Refusal
from peculium_server.core.shape import NOT_TOLD, check_shape
from tests.core.ledger import HOUR, SYSTEM_KINDS, Ledger

LEDGER = Ledger()
ROOT = LEDGER.grant(1_000)
CHILD = ROOT.child(10)
HELD = LEDGER.grant(1_000, by_token=False, holder="agent")
HOLD = ROOT.hold(10)
TOKEN = bytes(range(32))
ID = LEDGER.id()

WELL_FORMED: dict[str, Operation] = {
    "grant": LEDGER.ask_grant(1),
    "top up": ROOT.top_up(1),
    "withdraw": ROOT.withdraw(1),
    "reserve": ROOT.reserve(1),
    "reserve by holder": HELD.reserve(1),
    "settle": HOLD.settle(1),
    "keep open": HOLD.settle(1, keep_open=True),
    "release": HOLD.release(),
    "extend": HOLD.extend(),
    "spend": ROOT.spend(1),
    "spend by holder": HELD.spend(1),
    "delegate": ROOT.delegate(ROOT.spec(1)),
    "delegate by holder": HELD.delegate(HELD.spec(1)),
    "accept": ROOT.accept(),
    "recover": ROOT.recover(),
    "recover by an admin": ROOT.admin_recover(),
    "fund": ROOT.fund(CHILD),
    "fund by holder": HELD.fund(CHILD),
    "renew": ROOT.renew(),
    "renew by holder": HELD.renew(),
    "return some": ROOT.give_back(1),
    "return some by holder": HELD.give_back(1),
    "return all": ROOT.return_all(),
    "return all by holder": HELD.return_all(),
    "revoke": ROOT.revoke(CHILD),
    "revoke by holder": HELD.revoke(CHILD),
    "resolve": ROOT.resolve(HOLD, 1),
    "resolve by holder": HELD.resolve(HOLD, 1),
    "resolve by an admin": ROOT.admin_resolve(HOLD, 1),
    "freeze": ROOT.freeze(),
    "unfreeze": ROOT.unfreeze(),
    "lapse": HOLD.lapse(),
    "expire": ROOT.expire(),
    "collect": ROOT.collect(),
}


def _usage(**counts: Any) -> Usage:
    return replace(Usage(), **counts)


def _with(name: str, changes: dict[str, Any]) -> Operation:
    operation = WELL_FORMED[name]
    if "children" in changes and isinstance(changes["children"], dict):
        changes = {"children": (replace(ROOT.spec(1), **changes["children"]),)}
    return replace(operation, **changes)


@pytest.mark.parametrize("name", WELL_FORMED)
def test_what_is_well_formed_is_not_refused(name: str) -> None:
    assert check_shape(WELL_FORMED[name]) is None


def test_every_kind_is_among_them() -> None:
    assert {operation.kind for operation in WELL_FORMED.values()} == set(Kind)


# -- Bounds ---------------------------------------------------------------------------------------------


def _having(field: str) -> list[str]:
    return [
        name
        for name, operation in WELL_FORMED.items()
        if field in {each.name for each in fields(operation)}
    ]


AMOUNTS_FROM_1 = {
    "top up", "withdraw", "reserve", "reserve by holder", "spend", "spend by holder",
    "return some", "return some by holder",
}  # fmt: skip
AMOUNTS_FROM_0 = {"grant", "fund", "fund by holder"}
ACTUALS = {"settle", "keep open", "resolve", "resolve by holder", "resolve by an admin"}


@pytest.mark.parametrize(
    ("name", "field", "least"),
    [
        *((name, "amount", 1) for name in sorted(AMOUNTS_FROM_1)),
        *((name, "amount", 0) for name in sorted(AMOUNTS_FROM_0)),
        *((name, "actual", 0) for name in sorted(ACTUALS)),
        ("delegate", "children[0].amount", 0),
    ],
)
def test_an_amount_is_within_its_bounds(name: str, field: str, least: int) -> None:
    own = field.rpartition(".")[2]
    for amount in (-(10**30), -1, 0, 1, 2, AMOUNT_MAX, AMOUNT_MAX + 1, 2**63, 10**30):
        changes = {"children": {own: amount}} if "." in field else {own: amount}
        refused = check_shape(_with(name, changes))
        if least <= amount <= AMOUNT_MAX:
            assert refused is None, amount
        else:
            assert refused is not None, amount
            assert (refused.reason, refused.facts["field"]) == (Refusal.MALFORMED, field)
            bound = least if amount < least else AMOUNT_MAX
            assert refused.facts["problem"].endswith(str(bound))


def test_every_amount_has_a_row() -> None:
    returns_all = {"return all", "return all by holder"}
    assert set(_having("amount")) - returns_all == AMOUNTS_FROM_1 | AMOUNTS_FROM_0
    assert set(_having("actual")) == ACTUALS


BOUNDS = [
    ("reserve", "ttl_us", "ttl", HOLD_TTL_US_MIN, HOLD_AGE_US_MAX),
    ("extend", "ttl_us", "ttl", HOLD_TTL_US_MIN, HOLD_AGE_US_MAX),
    ("fund", "lease_us", "lease", LEASE_US_MIN, LEASE_US_MAX),
    ("renew", "lease_us", "lease", LEASE_US_MIN, LEASE_US_MAX),
    ("renew by holder", "lease_us", "lease", LEASE_US_MIN, LEASE_US_MAX),
    ("delegate", "overrun_factor", "children[0].overrun_factor", 0, OVERRUN_FACTOR_MAX),
    ("delegate", "lease_us", "children[0].lease", LEASE_US_MIN, LEASE_US_MAX),
]


@pytest.mark.parametrize(("name", "own", "field", "least", "most"), BOUNDS)
def test_a_duration_or_factor_is_within_its_bounds(
    name: str, own: str, field: str, least: int, most: int
) -> None:
    for value in (-1, 0, least - 1, least, most, most + 1):
        changes = {"children": {own: value}} if name == "delegate" else {own: value}
        refused = check_shape(_with(name, changes))
        if least <= value <= most:
            assert refused is None, value
        else:
            assert refused is not None, value
            assert (refused.reason, refused.facts["field"]) == (Refusal.MALFORMED, field)


@pytest.mark.parametrize(
    ("own", "most"),
    [
        ("input_tokens", USAGE_TOKENS_MAX),
        ("output_tokens", USAGE_TOKENS_MAX),
        ("cached_tokens", USAGE_TOKENS_MAX),
    ],
)
@pytest.mark.parametrize("name", ["settle", "spend"])
def test_a_count_of_tokens_is_within_its_bounds(name: str, own: str, most: int) -> None:
    for value in (-1, 0, most, most + 1):
        refused = check_shape(_with(name, {"usage": _usage(**{own: value})}))
        if 0 <= value <= most:
            assert refused is None
        else:
            assert refused is not None
            assert refused.facts["field"] == f"usage.{own}"


# -- Texts ------------------------------------------------------------------------------------------------

TEXTS = [
    ("grant", "name", "name", 1, NAME_BYTES_MAX),
    ("grant", "holder", "holder", 1, PRINCIPAL_BYTES_MAX),
    ("delegate", "name", "children[0].name", 1, NAME_BYTES_MAX),
    ("delegate", "holder", "children[0].holder", 1, PRINCIPAL_BYTES_MAX),
    ("recover by an admin", "holder", "holder", 1, PRINCIPAL_BYTES_MAX),
    ("settle", "reference", "reference", 0, REFERENCE_BYTES_MAX),
    ("spend", "reference", "reference", 0, REFERENCE_BYTES_MAX),
    ("resolve", "reason", "reason", 1, REASON_BYTES_MAX),
    ("resolve by an admin", "reason", "reason", 1, REASON_BYTES_MAX),
    ("freeze", "reason", "reason", 0, REASON_BYTES_MAX),
    ("unfreeze", "reason", "reason", 0, REASON_BYTES_MAX),
    ("settle", "provider", "usage.provider", 0, PROVIDER_BYTES_MAX),
    ("spend", "model", "usage.model", 0, PROVIDER_BYTES_MAX),
    ("freeze", "key", "labels key", 1, LABEL_KEY_BYTES_MAX),
    ("freeze", "value", "labels value", 0, LABEL_VALUE_BYTES_MAX),
    ("delegate", "key", "children[0].labels key", 1, LABEL_KEY_BYTES_MAX),
    ("delegate", "value", "children[0].labels value", 0, LABEL_VALUE_BYTES_MAX),
]


def _text(name: str, own: str, text: str) -> Operation:
    changes: dict[str, Any]
    if own in ("provider", "model"):
        changes = {"usage": _usage(**{own: text})}
    elif own in ("key", "value"):
        changes = {"labels": ((text, "v"),) if own == "key" else (("k", text),)}
    else:
        changes = {own: text}
    return _with(name, {"children": changes} if name == "delegate" else changes)


@pytest.mark.parametrize(("name", "own", "field", "least", "most"), TEXTS)
def test_a_text_is_within_its_bounds_in_bytes(
    name: str, own: str, field: str, least: int, most: int
) -> None:
    for text in ("", "x", "x" * most, "x" * (most + 1), "é" * (most // 2), "é" * (most // 2 + 1)):
        refused = check_shape(_text(name, own, text))
        if least <= len(text.encode()) <= most:
            assert refused is None, text
        else:
            assert refused is not None, text
            assert (refused.reason, refused.facts["field"]) == (Refusal.MALFORMED, field)
            assert refused.facts["problem"].startswith(f"must be {least} to {most} bytes")


@pytest.mark.parametrize(
    "code", [0, 9, 10, 13, 0x1B, 0x1F, 0x7F, 0x80, 0x9B, 0x9F, 0xD800, 0xDBFF, 0xDC00, 0xDFFF]
)
@pytest.mark.parametrize(("name", "own", "field", "least", "most"), TEXTS)
def test_a_text_has_no_control_characters_and_no_half_surrogates(
    name: str, own: str, field: str, least: int, most: int, code: int
) -> None:
    refused = check_shape(_text(name, own, f"a{code:c}b"))
    assert refused is not None
    assert (refused.reason, refused.facts["field"]) == (Refusal.MALFORMED, field)


@pytest.mark.parametrize("text", ["a b", "ü", "日本", "\U0001f600", "~", "run-7:β"])
@pytest.mark.parametrize(("name", "own", "field", "least", "most"), TEXTS)
def test_a_text_may_be_of_any_script(
    name: str, own: str, field: str, least: int, most: int, text: str
) -> None:
    assert check_shape(_text(name, own, text)) is None


@pytest.mark.parametrize("name", ["grant", "delegate"])
@pytest.mark.parametrize("text", ["a/b", "/", " a", "a ", "\u3000a", "a\xa0"])
def test_a_name_can_be_part_of_a_path(name: str, text: str) -> None:
    refused = check_shape(_text(name, "name", text))
    assert refused is not None
    assert refused.facts["field"].endswith("name")


@pytest.mark.parametrize(
    ("unit", "well"),
    [
        ("usd_nanos", True),
        ("x", True),
        ("t0", True),
        ("x" * UNIT_BYTES_MAX, True),
        ("x" * (UNIT_BYTES_MAX + 1), False),
        ("", False),
        ("USD", False),
        ("usd-nanos", False),
        ("usd nanos", False),
        ("é", False),
    ],
)
def test_a_unit_is_a_short_word(unit: str, well: bool) -> None:
    refused = check_shape(_with("grant", {"unit": unit}))
    assert (refused is None) == well
    assert refused is None or refused.facts["field"] == "unit"


# -- Ids and tokens -----------------------------------------------------------------------------------------

ID_OF_SYSTEM = LEDGER.id(8)
UUID4 = bytes.fromhex("0193000000004000800000000000abcd")
UUID7_OTHER_VARIANT = bytes.fromhex("0193000000007000c00000000000abcd")

MADE_IDS = [
    *((name, "operation_id", "operation_id") for name in WELL_FORMED),
    ("reserve", "hold_id", "hold_id"),
    ("reserve by holder", "hold_id", "hold_id"),
    ("delegate", "budget_id", "children[0].budget_id"),
]


@pytest.mark.parametrize(("name", "own", "field"), MADE_IDS)
def test_an_id_that_is_made_is_a_uuid7_and_one_of_the_ledgers_own_a_uuid8(
    name: str, own: str, field: str
) -> None:
    """So no client can take the id of what the ledger is going to do."""
    kind = WELL_FORMED[name].kind
    # A Freeze may be the ledger's own, too; who asks for it is not a matter of its shape.
    others = [] if kind is Kind.FREEZE else [ID if kind in SYSTEM_KINDS else ID_OF_SYSTEM]
    for value in (b"", ID[:15], ID + b"\x00", UUID4, UUID7_OTHER_VARIANT, bytes(16), *others):
        changes = {"children": {own: value}} if "children" in field else {own: value}
        refused = check_shape(_with(name, changes))
        assert refused is not None
        assert (refused.reason, refused.facts["field"]) == (Refusal.MALFORMED, field)


def test_the_id_of_a_root_is_a_uuid7_and_its_budgets() -> None:
    for value in (b"", UUID4, ID):
        refused = check_shape(_with("grant", {"budget_id": value}))
        assert refused is not None
        assert refused.facts["field"] == "budget_id"
    assert check_shape(_with("grant", {"budget_id": ID, "root_id": ID})) is None


NAMED_IDS = [
    *((name, "root_id") for name in WELL_FORMED),
    *((name, "budget_id") for name in WELL_FORMED),
    *((name, "hold_id") for name in _having("hold_id")),
    *((name, "descendant_id") for name in _having("descendant_id")),
    ("freeze", "trace_id"),
]


@pytest.mark.parametrize(("name", "field"), NAMED_IDS)
def test_an_id_that_is_named_is_of_16_bytes(name: str, field: str) -> None:
    for value in (b"", bytes(15), bytes(17)):
        refused = check_shape(_with(name, {field: value}))
        assert refused is not None
        assert (refused.reason, refused.facts["field"]) == (Refusal.MALFORMED, field)


@pytest.mark.parametrize(
    ("name", "own", "field"),
    [
        *((name, "authority", "authority.secret") for name in ("reserve", "settle", "accept")),
        *(
            (name, "next_token_id", "next_token_id")
            for name in ("reserve", "accept", "recover", "recover by an admin", "return some")
        ),
        ("reserve", "hold_token_id", "hold_token_id"),
        ("keep open", "next_hold_token_id", "next_hold_token_id"),
        ("extend", "next_hold_token_id", "next_hold_token_id"),
        ("grant", "token_id", "token_id"),
        ("delegate", "token_id", "children[0].token_id"),
    ],
)
def test_a_token_id_is_of_32_bytes(name: str, own: str, field: str) -> None:
    for value in (b"", bytes(31), bytes(33)):
        token: Any = ByToken(value) if own == "authority" else value
        changes = {"children": {own: token}} if name == "delegate" else {own: token}
        refused = check_shape(_with(name, changes))
        assert refused is not None
        assert (refused.reason, refused.facts["field"]) == (Refusal.MALFORMED, field)


def test_a_rotation_has_an_id_and_a_token_of_the_right_length() -> None:
    good = Rotation(hold_id=ID, next_token_id=TOKEN)
    for bad, field in (
        (replace(good, hold_id=bytes(15)), "holds[1].hold_id"),
        (replace(good, next_token_id=bytes(31)), "holds[1].next_token_id"),
        (good, "holds[1].hold_id"),
    ):
        refused = check_shape(_with("recover", {"holds": (good, bad)}))
        assert refused is not None
        assert refused.facts["field"] == field


# -- Authority, and the token that is next --------------------------------------------------------------------

BY_ROLE_ONLY = {
    "grant", "top up", "withdraw", "freeze", "unfreeze", "lapse", "expire", "collect",
}  # fmt: skip
BY_HOLDS_TOKEN = {"settle", "keep open", "release", "extend"}


@pytest.mark.parametrize("name", sorted(BY_ROLE_ONLY))
@pytest.mark.parametrize("authority", [ByToken(TOKEN), After(0), ByHolder()])
def test_where_the_role_is_the_authority_there_is_no_other(
    name: str, authority: ByToken | After | ByHolder
) -> None:
    refused = check_shape(_with(name, {"authority": authority}))
    assert refused is not None
    assert refused.facts["field"] == "authority"


@pytest.mark.parametrize("name", sorted(BY_HOLDS_TOKEN))
def test_a_hold_is_used_by_its_token_alone(name: str) -> None:
    for authority in (ByHolder(), ByRole()):
        refused = check_shape(_with(name, {"authority": authority}))
        assert refused is not None
        assert refused.facts["field"] == "authority"
    for index in (0, OPERATIONS_MAX - 1):
        assert check_shape(_with(name, {"authority": After(index)})) is None
    for index in (-1, OPERATIONS_MAX):
        refused = check_shape(_with(name, {"authority": After(index)}))
        assert refused is not None
        assert refused.facts["field"] == "authority.after"


NEXT = [
    # by token, by holder, by role: is the next token wanted, forbidden, or is the authority wrong?
    ("reserve", "wanted", "forbidden", "wrong"),
    ("spend", "wanted", "forbidden", "wrong"),
    ("delegate", "wanted", "forbidden", "wrong"),
    ("fund", "wanted", "forbidden", "wrong"),
    ("renew", "wanted", "forbidden", "wrong"),
    ("return some", "wanted", "forbidden", "wrong"),
    ("return all", "forbidden", "forbidden", "wrong"),
    ("revoke", "wanted", "forbidden", "wrong"),
    ("resolve", "wanted", "forbidden", "forbidden"),
    ("accept", "wanted", "wanted", "wrong"),
    ("recover", "wrong", "wanted", "one of two"),
]


@pytest.mark.parametrize(("name", "by_token", "by_holder", "by_role"), NEXT)
def test_the_next_token_is_named_if_and_only_if_one_is_produced(
    name: str, by_token: str, by_holder: str, by_role: str
) -> None:
    for authority, rule in (
        (ByToken(TOKEN), by_token),
        (After(0), by_token),
        (ByHolder(), by_holder),
        (ByRole(), by_role),
    ):
        for next_token_id in (None, LEDGER.token()):
            refused = check_shape(
                _with(name, {"authority": authority, "next_token_id": next_token_id})
            )
            field = refused.facts["field"] if refused else None
            if rule == "wrong":
                assert field == "authority"
            elif (rule in ("wanted", "one of two")) == (next_token_id is None):
                assert field == "next_token_id"
            else:
                assert refused is None


@pytest.mark.parametrize(
    ("token", "holder", "well"),
    [(None, None, False), (TOKEN, None, True), (None, "a", True), (TOKEN, "a", True)],
)
def test_whoever_is_given_a_budget_is_named_by_a_token_a_holder_or_both(
    token: bytes | None, holder: str | None, well: bool
) -> None:
    for operation, field in (
        (_with("grant", {"token_id": token, "holder": holder}), "token_id"),
        (
            _with("delegate", {"children": {"token_id": token, "holder": holder}}),
            "children[0].token_id",
        ),
        (
            _with("recover by an admin", {"next_token_id": token, "holder": holder}),
            "next_token_id",
        ),
    ):
        refused = check_shape(operation)
        assert (refused is None) == well
        assert refused is None or refused.facts["field"] == field


def test_only_an_admin_sets_a_holder() -> None:
    refused = check_shape(_with("recover", {"holder": "agent"}))
    assert refused is not None
    assert refused.facts["field"] == "holder"


# -- What contradicts what ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("keep open", {"actual": None}, "actual"),
        ("keep open", {"next_hold_token_id": None}, "next_hold_token_id"),
        ("settle", {"next_hold_token_id": TOKEN}, "next_hold_token_id"),
        ("extend", {"next_hold_token_id": None}, "next_hold_token_id"),
        ("return some", {"cascade": True}, "cascade"),
        ("delegate", {"children": {"lease_latest_us": HOUR}}, "children[0].lease_latest"),
        (
            "delegate",
            {"children": {"lease_us": HOUR, "lease_latest_us": HOUR - 1}},
            "children[0].lease_latest",
        ),
        (
            "delegate",
            {"children": {"lease_us": HOUR, "lease_latest_us": LEASE_US_MAX + 1}},
            "children[0].lease_latest",
        ),
        ("delegate", {"children": ()}, "children"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    name: str, changes: dict[str, Any], field: str
) -> None:
    refused = check_shape(_with(name, changes))
    assert refused is not None
    assert (refused.reason, refused.facts["field"]) == (Refusal.MALFORMED, field)


def test_a_latest_end_may_be_the_end() -> None:
    assert (
        check_shape(_with("delegate", {"children": {"lease_us": HOUR, "lease_latest_us": HOUR}}))
        is None
    )


@pytest.mark.parametrize("own", ["budget_id", "name"])
def test_no_two_children_of_one_request_have_the_same_id_or_name(own: str) -> None:
    first, second = ROOT.spec(1), ROOT.spec(1)
    second = replace(second, **{own: getattr(first, own)})
    refused = check_shape(ROOT.delegate(first, second))
    assert refused is not None
    assert (refused.reason, refused.facts["field"]) == (Refusal.MALFORMED, f"children[1].{own}")
    assert refused.facts["problem"] == "is named twice"


# -- Sizes --------------------------------------------------------------------------------------------------


def _labels(count: int) -> tuple[tuple[str, str], ...]:
    return tuple((f"key-{number:04}", "") for number in range(count))


def _many(what: str, count: int) -> tuple[Operation, str]:
    match what:
        case "children":
            return ROOT.delegate(*[ROOT.spec(1) for _ in range(count)]), "children"
        case "holds":
            holds = [
                Rotation(hold_id=LEDGER.id(), next_token_id=LEDGER.token()) for _ in range(count)
            ]
            return ROOT.recover(holds=tuple(holds)), "holds"
        case "labels":
            return ROOT.freeze(labels=_labels(count)), "labels"
        case _:
            last = ROOT.spec(1, labels=_labels(count))
            return ROOT.delegate(ROOT.spec(1), last), "children[1].labels"


@pytest.mark.parametrize(
    ("what", "most"),
    [
        ("children", CHILDREN_MAX),
        ("holds", ROTATIONS_MAX),
        ("labels", LABELS_MAX),
        ("a child's labels", LABELS_MAX),
    ],
)
def test_what_is_repeated_is_bounded(what: str, most: int) -> None:
    operation, _ = _many(what, most)
    assert check_shape(operation) is None
    operation, field = _many(what, most + 1)
    refused = check_shape(operation)
    assert refused is not None
    assert refused.reason is Refusal.TOO_LARGE
    assert refused.facts == {"field": field, "limit": str(most), "size": str(most + 1)}


@pytest.mark.parametrize("what", ["children", "holds", "labels"])
def test_of_what_is_too_large_only_as_much_is_looked_at_as_there_may_be(what: str) -> None:
    """A million children cost no more than as many as there may be."""
    operation, field = _many(what, 300)
    repeated = getattr(operation, what)
    bad = {"children": ROOT.spec(-1), "holds": Rotation(hold_id=b"", next_token_id=b"")}
    changes: dict[str, Any] = {what: (*repeated, bad.get(what, ("", "")))}
    last = replace(operation, **changes)
    refused = check_shape(last)
    assert refused is not None
    assert (refused.reason, refused.facts["field"]) == (Refusal.TOO_LARGE, field)


def test_the_first_problem_in_the_order_of_fields_is_told() -> None:
    operation = ROOT.reserve(0, ttl_us=0, operation_id=b"", trace_id=b"", labels=(("", ""),))
    told = []
    for cure in ("operation_id", "labels", "trace_id", "amount", "ttl_us", None):
        refused = check_shape(operation)
        told.append(refused and refused.facts["field"])
        if cure:
            operation = replace(operation, **{cure: getattr(WELL_FORMED["reserve"], cure)})
    assert told == ["operation_id", "labels key", "trace_id", "amount", "ttl", None]


SECRETS = {
    "a capability": f"pec_{'-' * 92}",
    "an API key": f"pek_{'_' * 72}",
    "a webhook's secret": f"whsec_{'+' * 43}=",
}
RECORDED: dict[str, tuple[str, dict[str, Any]]] = {
    "name": ("grant", {"name": "{}"}),
    "holder": ("grant", {"holder": "the one with {}"}),
    "labels value": ("reserve", {"labels": (("team", "{}é"),)}),
    "reference": ("settle", {"reference": "see {}"}),
    "usage.model": ("spend", {"usage": _usage(model="{}")}),
    "reason": ("freeze", {"reason": "{} was found"}),
    "children[0].name": ("delegate", {"children": {"name": "{}"}}),
    "children[0].labels value": ("delegate", {"children": {"labels": (("team", "{}"),)}}),
}


def _told(value: Any, secret: str) -> Any:
    """The same with a secret in its texts."""
    match value:
        case str():
            return value.replace("{}", secret)
        case tuple():
            return tuple(_told(each, secret) for each in value)
        case dict():
            return {name: _told(each, secret) for name, each in value.items()}
        case Usage():
            return replace(value, model=_told(value.model, secret))
        case _:
            return value


@pytest.mark.parametrize("field", RECORDED)
@pytest.mark.parametrize("secret", SECRETS)
def test_what_is_recorded_has_nothing_in_it_that_one_could_spend_or_call_with(
    field: str, secret: str
) -> None:
    name, changes = RECORDED[field]
    refused = check_shape(_with(name, _told(changes, SECRETS[secret])))
    assert refused is not None
    assert refused.reason is Refusal.MALFORMED
    # The answer does not repeat it.
    assert refused.facts == {"field": field, "problem": NOT_TOLD}
    # Neither a beginning is one, nor what only begins so.
    for harmless in (SECRETS[secret][:40], "pec_" + "." * 92, "spec_sheet"):
        assert check_shape(_with(name, _told(changes, harmless))) is None


# -- Whatever comes -------------------------------------------------------------------------------------------

_BYTES = st.sampled_from([b"", bytes(15), ID, bytes(16), bytes(32), TOKEN, bytes(33)])
_TEXT = st.text(st.characters(), max_size=300)
_INTEGER = st.integers() | st.sampled_from([0, 1, AMOUNT_MAX, AMOUNT_MAX + 1])
_VALUES: dict[type, st.SearchStrategy[Any]] = {bytes: _BYTES, str: _TEXT, int: _INTEGER}


@given(st.data())
def test_any_values_of_the_right_types_are_refused_or_accepted_and_never_raise(
    data: st.DataObject,
) -> None:
    operation = WELL_FORMED[data.draw(st.sampled_from(sorted(WELL_FORMED)))]
    changes = {}
    for field in data.draw(st.sets(st.sampled_from([each.name for each in fields(operation)]))):
        value = getattr(operation, field)
        if type(value) in _VALUES:
            changes[field] = data.draw(_VALUES[type(value)])
        elif field == "labels":
            changes[field] = tuple(data.draw(st.dictionaries(_TEXT, _TEXT, max_size=20)).items())
        elif field == "authority":
            changes[field] = data.draw(
                st.sampled_from([ByHolder(), ByRole(), After(0), After(-1), ByToken(b"")])
            )
    refused = check_shape(replace(operation, **changes))
    assert refused is None or refused.reason in (Refusal.MALFORMED, Refusal.TOO_LARGE)
