from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from peculium import Child, HoldInfo, HoldState, Receiver, Usage, _requests as requests
from peculium._ids import token_id
from peculium._requests import Asked, HoldTarget, Operation, Rotated, Target
from peculium.errors import Malformed, TooLarge
from peculium.v1 import types_pb2
from peculium_server.core.operations import OPERATIONS, Kind
from peculium_server.core.refusals import Refused
from peculium_server.core.shape import check_shape
from peculium_server.rpc.requests import decode, decode_batched

TARGET = Target(bytes([1]) * 16, bytes([2]) * 16, by_token=True)
PRINCIPALS = Target(bytes([1]) * 16, bytes([1]) * 16, by_token=False)
HOLD = HoldTarget(bytes([1]) * 16, bytes([2]) * 16, bytes([3]) * 16)
ID = bytes([4]) * 16
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def settle(asked: Asked = Asked(), **changes: Any) -> Operation:  # noqa: B008 - frozen
    arguments: dict[str, Any] = {
        "actual": 3,
        "keep_open": False,
        "reference": "",
        "usage": None,
        "estimated": False,
    }
    return requests.settle(HOLD, asked, **{**arguments, **changes})


def grant(**changes: Any) -> requests.Grant:
    arguments: dict[str, Any] = {
        "name": "acme",
        "unit": "calls",
        "amount": 5,
        "holder": None,
        "receiver": None,
        "token": False,
    }
    return requests.grant(Asked(), **{**arguments, **changes})


def rotated(hold_id: bytes) -> Rotated:
    now = datetime.now(UTC)
    return Rotated(HoldInfo(hold_id, ID, HoldState.LIVE, 1, 1, 0, 0, now, now), bytes(32))


def every_operation(asked: Asked) -> dict[str, Operation]:
    children = [Child("a", 0), Child("b", 1, holder="svc", lease=60, lease_latest=90)]
    return {
        "RESERVE": requests.reserve(TARGET, asked, amount=1, ttl=60),
        "SETTLE": settle(asked, usage=Usage(input_tokens=3, model="m"), reference="call"),
        "RELEASE": requests.release(HOLD, asked),
        "EXTEND": requests.extend(HOLD, asked, ttl=60),
        "SPEND": requests.spend(TARGET, asked, amount=1, reference="call", usage=Usage()),
        "DELEGATE": requests.delegate(TARGET, asked, children=children),
        "ACCEPT": requests.accept(TARGET, asked),
        "RECOVER": requests.recover(
            Target(bytes(16), ID, by_token=False), asked, holds=[rotated(ID)]
        ),
        "FUND": requests.fund(TARGET, asked, descendant_id=ID, amount=0, lease=60),
        "RENEW": requests.renew(TARGET, asked, lease=60),
        "RETURN": requests.give_back(TARGET, asked, amount=None, cascade=True),
        "REVOKE": requests.revoke(TARGET, asked, descendant_id=ID),
        "RESOLVE": requests.resolve(TARGET, asked, hold_id=ID, actual=0, reason="why"),
    }


KINDS = sorted(every_operation(Asked()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_built_is_what_the_ledger_takes(kind: str) -> None:
    asked = Asked({"run": "7"}, dry_run=True, traceparent=TRACE)
    operation = every_operation(asked)[kind]
    if not operation.header.HasField("authority"):
        operation.header.authority.secret = bytes(32)
    decoded = decode_batched(operation.message)
    assert not isinstance(decoded, Refused), decoded
    assert isinstance(decoded, OPERATIONS[Kind[kind]])
    assert check_shape(decoded) is None
    assert decoded.labels == (("run", "7"),)
    assert decoded.dry_run
    assert decoded.trace_id is not None
    assert decoded.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert decoded.operation_id == operation.operation_id


@pytest.mark.parametrize("kind", KINDS)
def test_asking_again_is_a_new_operation_with_the_same_meaning(kind: str) -> None:
    operation = every_operation(Asked({"run": "7"}))[kind]
    again = operation.again()
    assert again.operation_id > operation.operation_id
    assert again.kind == operation.kind
    assert dict(again.header.labels) == {"run": "7"}
    assert again.produced is None or again.produced != operation.produced
    assert again.hold_secret is None or again.hold_secret != operation.hold_secret


@pytest.mark.parametrize("kind", KINDS)
def test_an_operation_shows_no_secret(kind: str) -> None:
    operation = every_operation(Asked())[kind]
    operation.header.authority.secret = b"\xabS3CRET\xab" * 4
    shown = repr(operation)
    secrets = [operation.produced, operation.hold_secret, *(c.secret for c in operation.children)]
    for secret in filter(None, secrets):
        assert repr(secret) not in shown
    assert "S3CRET" not in shown


def test_admins_requests_are_what_the_ledger_takes() -> None:
    asked = Asked({"run": "7"})
    for request in (
        grant().request,
        requests.top_up(TARGET, asked, amount=1),
        requests.withdraw(TARGET, asked, amount=1),
        requests.freeze(TARGET, asked, reason="why"),
        requests.unfreeze(TARGET, asked, reason=""),
        requests.admin_recover(TARGET, asked, holder="svc", receiver=None, token=True).request,
        requests.admin_resolve(TARGET, asked, hold_id=ID, actual=0, reason="why"),
    ):
        decoded = decode(request)
        assert not isinstance(decoded, Refused), decoded
        assert check_shape(decoded) is None


def test_a_chain_needs_no_secret_and_a_principal_none_at_all() -> None:
    assert requests.reserve(TARGET, Asked(), amount=1, ttl=None).produced is not None
    operation = requests.reserve(PRINCIPALS, Asked(), amount=1, ttl=None)
    assert operation.produced is None
    assert operation.message.reserve.next_token_id == b""
    assert operation.header.authority.WhichOneof("proof") == "holder"


def test_secrets_stay_and_their_ids_travel() -> None:
    operation = requests.reserve(TARGET, Asked(), amount=1, ttl=None)
    assert operation.produced is not None
    assert operation.hold_secret is not None
    sent = operation.message.SerializeToString()
    assert operation.produced not in sent
    assert operation.hold_secret not in sent
    assert token_id(operation.produced) in sent
    assert token_id(operation.hold_secret) in sent


@pytest.mark.parametrize(
    ("custody", "has_token", "has_secret", "holder"),
    [
        ({}, True, True, ""),
        ({"holder": "svc"}, False, False, "svc"),
        ({"holder": "svc", "token": True}, True, True, "svc"),
        ({"receiver": bytes(32)}, True, False, ""),
        ({"receiver": Receiver(), "holder": "svc"}, True, False, "svc"),
    ],
    ids=["bearer", "principal", "bound", "receiver", "bound receiver"],
)
def test_a_root_and_a_child_are_held_as_was_said(
    custody: dict[str, Any], *, has_token: bool, has_secret: bool, holder: str
) -> None:
    granted = grant(**custody)
    operation = requests.delegate(TARGET, Asked(), children=[Child("a", 1, **custody)])
    [child], [spec] = operation.children, operation.message.delegate.children
    for message, secret in ((granted.request, granted.secret), (spec, child.secret)):
        assert bool(message.token_id) is has_token
        assert (secret is not None) is has_secret
        assert message.holder == holder
        if secret is not None:
            assert message.token_id == token_id(secret)


def test_the_same_question_is_recognised() -> None:
    assert settle(actual=3).asks_the_same(settle(actual=3))
    assert not settle(actual=3).asks_the_same(settle(actual=4))
    assert not settle(actual=3).asks_the_same(requests.release(HOLD, Asked()))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (1, (1, 0)),
        (1.5, (1, 500_000_000)),
        (timedelta(seconds=2, microseconds=7), (2, 7000)),
        (timedelta(days=7), (604_800, 0)),
    ],
)
def test_lengths_of_time_are_exact_to_the_microsecond(
    seconds: float | timedelta, expected: tuple[int, int]
) -> None:
    ttl = requests.reserve(TARGET, Asked(), amount=1, ttl=seconds).message.reserve.ttl
    assert (ttl.seconds, ttl.nanos) == expected


MISTAKES: dict[str, tuple[str, Callable[[], object]]] = {
    "amount zero": ("amount", lambda: requests.reserve(TARGET, Asked(), amount=0, ttl=None)),
    "amount huge": ("amount", lambda: requests.spend(
        TARGET, Asked(), amount=2**62, reference="", usage=None)),
    "amount text": ("amount", lambda: grant(amount="5")),
    "amount bool": ("amount", lambda: requests.top_up(TARGET, Asked(), amount=True)),
    "fund below zero": ("amount", lambda: requests.fund(
        TARGET, Asked(), descendant_id=ID, amount=-1, lease=None)),
    "give back nothing": ("amount", lambda: requests.give_back(
        TARGET, Asked(), amount=0, cascade=False)),
    "cascade of a part": ("cascade", lambda: requests.give_back(
        TARGET, Asked(), amount=1, cascade=True)),
    "actual below zero": ("actual", lambda: settle(actual=-1)),
    "increment of nothing said": ("actual", lambda: settle(actual=None, keep_open=True)),
    "reference long": ("reference", lambda: settle(reference="é" * 129)),
    "reference no text": ("reference", lambda: settle(reference=7)),
    "reference half a character": ("reference", lambda: settle(reference="\ud800")),
    "model long": ("usage.model", lambda: settle(usage=Usage(model="m" * 129))),
    "provider long": ("usage.provider", lambda: settle(usage=Usage(provider="m" * 129))),
    "ttl short": ("ttl", lambda: requests.reserve(TARGET, Asked(), amount=1, ttl=0.5)),
    "ttl long": ("ttl", lambda: requests.extend(HOLD, Asked(), ttl=timedelta(days=8))),
    "ttl endless": ("ttl", lambda: requests.reserve(
        TARGET, Asked(), amount=1, ttl=float("inf"))),
    "ttl no number": ("ttl", lambda: requests.reserve(
        TARGET, Asked(), amount=1, ttl=float("nan"))),
    "ttl text": ("ttl", lambda: requests.reserve(
        TARGET, Asked(), amount=1, ttl="soon")),  # type: ignore[arg-type]
    "lease short": ("lease", lambda: requests.renew(TARGET, Asked(), lease=0)),
    "lease of a child": ("lease", lambda: requests.delegate(
        TARGET, Asked(), children=[Child("a", 1, lease=-1)])),
    "no children": ("children", lambda: requests.delegate(TARGET, Asked(), children=[])),
    "name empty": ("name", lambda: grant(name="")),
    "name with a slash": ("name", lambda: grant(name="a/b")),
    "name with a control character": ("name", lambda: grant(name="a\x00")),
    "name long": ("name", lambda: grant(name="n" * 129)),
    "name of a child": ("name", lambda: requests.delegate(
        TARGET, Asked(), children=[Child("a/b", 1)])),
    "unit upper case": ("unit", lambda: grant(unit="USD")),
    "unit long": ("unit", lambda: grant(unit="u" * 33)),
    "holder empty": ("holder", lambda: grant(holder="")),
    "receiver short": ("receiver", lambda: grant(receiver=bytes(31))),
    "overrun factor": ("overrun_factor", lambda: requests.delegate(
        TARGET, Asked(), children=[Child("a", 1, overrun_factor=1001)])),
    "overrun factor no int": ("overrun_factor", lambda: requests.delegate(
        TARGET, Asked(), children=[Child("a", 1, overrun_factor=1.5)])),  # type: ignore[arg-type]
    "reason missing": ("reason", lambda: requests.resolve(
        TARGET, Asked(), hold_id=ID, actual=1, reason="")),
    "reason long": ("reason", lambda: requests.freeze(TARGET, Asked(), reason="r" * 513)),
    "hold id short": ("hold_id", lambda: requests.resolve(
        TARGET, Asked(), hold_id=bytes(15), actual=1, reason="why")),
    "label without a key": ("labels", lambda: settle(Asked({"": "x"}))),
    "label with a long value": ("labels", lambda: settle(Asked({"x": "v" * 257}))),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed_before_anything_is_sent(mistake: str) -> None:
    field, make = MISTAKES[mistake]
    with pytest.raises(Malformed) as caught:
        make()
    assert caught.value.field == field
    assert caught.value.problem
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("children", lambda: requests.delegate(
            TARGET, Asked(), children=[Child(str(index), 1) for index in range(257)])),
        ("labels", lambda: settle(Asked({str(index): "" for index in range(17)}))),
        ("holds", lambda: requests.recover(
            PRINCIPALS, Asked(), holds=[rotated(bytes([index, high]) * 8)
                                        for index in range(256) for high in range(2)])),
    ],
    ids=["children", "labels", "holds"],
)  # fmt: skip
def test_more_than_a_request_carries_is_noticed_before_anything_is_sent(
    field: str, make: Callable[[], object]
) -> None:
    with pytest.raises(TooLarge) as caught:
        make()
    assert caught.value.facts["field"] == field


def test_a_request_that_is_larger_than_a_message_is_not_made() -> None:
    labels = {f"{index:064}": "v" * 256 for index in range(16)}
    children = [Child(f"{index}", 1, labels=labels) for index in range(256)]
    operation = requests.delegate(TARGET, Asked(), children=children)
    assert operation.size >= operation.message.ByteSize()


def test_a_reads_authority_is_a_secret_or_the_holder() -> None:
    assert requests.authority(bytes(32)) == types_pb2.Authority(secret=bytes(32))
    assert requests.authority(None).WhichOneof("proof") == "holder"


SECRETS = (f"pec_{'-' * 92}", f"pek_{'_' * 72}", f"whsec_{'/' * 43}=")


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("budget", requests.budget_ref),
        ("name", lambda secret: grant(name=secret)),
        ("holder", lambda secret: grant(holder=f"the one with {secret}")),
        ("labels", lambda secret: settle(Asked({"team": secret}))),
        ("reference", lambda secret: settle(reference=secret)),
        ("reason", lambda secret: requests.freeze(TARGET, Asked(), reason=f"{secret} was found")),
    ],
)  # fmt: skip
def test_a_capability_or_a_key_is_not_sent_where_it_would_be_told_and_not_told_here_either(
    secret: str, field: str, make: Callable[[str], object]
) -> None:
    with pytest.raises(Malformed) as caught:
        make(secret)
    assert caught.value.field == field
    assert secret not in repr(vars(caught.value))
