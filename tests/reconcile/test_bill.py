"""Bills of well-known providers and gateways, and what becomes of those that are none."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from peculium_server.reconcile.bill import AmountIn, Bill, Line, Reading
from peculium_server.reconcile.columns import Columns
from peculium_server.reconcile.problems import BillInvalid
from peculium_server.reconcile.rows import Format
from peculium_server.reconcile.times import Period, parse_moment, time_text

FILES = Path(__file__).parent / "files"
DOLLARS = Reading(unit="usd_nanos")
DAY_1, DAY_2, DAY_3 = (parse_moment(f"2025-11-{day}").at for day in (25, 26, 27))


def read(name: str, reading: Reading = DOLLARS) -> list[Line]:
    with (FILES / name).open("rb") as file:
        return list(Bill(file, reading))


def said(text: str | bytes, reading: Reading = DOLLARS) -> list[Line]:
    data = text if isinstance(text, bytes) else text.encode()
    return list(Bill(io.BytesIO(data), reading))


@pytest.mark.parametrize("name", ["openai-costs.json", "openai-costs.csv"])
def test_costs_of_openai_are_dollars_of_a_day_and_a_model(name: str) -> None:
    lines = read(name)
    assert [(line.model, line.amount) for line in lines] == [
        ("gpt-4o-2024-08-06", 61_234_500),
        ("gpt-4o-2024-08-06", 30_000_000),
        ("web search", 1_500_000_000),
    ]
    assert [line.moment and line.moment.at for line in lines] == [DAY_1, DAY_1, DAY_3]
    assert {line.reference for line in lines} == {""}


def test_the_cost_report_of_anthropic_is_in_cents() -> None:
    tokens, search = read("anthropic-cost-report.json")
    assert (tokens.amount, tokens.model) == (1_237_891_200, "claude-sonnet-4-20250514")
    assert (search.amount, search.model) == (20_000_000, "")
    assert tokens.moment is not None
    assert tokens.moment.at == DAY_1


def test_spend_logs_of_litellm_name_calls_and_lose_no_digit() -> None:
    first, second = read("litellm-spend-logs.jsonl")
    assert first.reference == "chatcmpl-A1"
    assert first.amount == Decimal("123450.00000000001")
    assert first.hold_id is not None
    assert first.hold_id.hex() == "019ac0de000070008000000000000001"
    assert (second.amount, second.hold_id) == (10_000, None)
    assert second.moment is not None
    assert time_text(second.moment.at) == "2025-11-25T10:00:02Z"
    assert [line.amount for line in read("litellm-spend-logs.json")] == [123_450, 0]


def test_exports_of_gateways_are_read_whatever_separates_their_columns() -> None:
    first, second = read("gateway.csv")
    assert (first.reference, first.amount, first.model) == (
        "gen-1764063000-a",
        2_100_000,
        "openai/gpt-4o",
    )
    assert (second.amount, second.model) == (1, "meta-llama/llama-4;x")
    labelled = replace(DOLLARS, columns=Columns(labels={"team": "properties.team"}))
    [line] = read("helicone.jsonl", labelled)
    assert (line.reference, line.amount, line.labels) == ("5f0e", 250_000_000, ("a",))


def test_columns_can_be_named_and_models_renamed() -> None:
    columns = Columns(reference="call", amount="price", time="when", model="engine")
    reading = replace(DOLLARS, columns=columns, models={"4o": "gpt-4o"})
    [line] = said("call,price,when,engine,amount\nr1,0.5,1764028800,4o,99\n", reading)
    assert line[1:] == ("r1", None, 500_000_000, parse_moment(1764028800), "gpt-4o", ())


@pytest.mark.parametrize(
    ("amount_in", "unit", "amount"),
    [
        (None, "usd_nanos", 3_000_000_000),
        (AmountIn.USD, "usd_nanos", 3_000_000_000),
        (AmountIn.CENTS, "usd_nanos", 30_000_000),
        (AmountIn.UNIT, "usd_nanos", 3),
        (None, "tokens", 3),
        (AmountIn.UNIT, "tokens", 3),
    ],
)
def test_amounts_become_those_of_the_trees_unit(
    amount_in: AmountIn | None, unit: str, amount: int
) -> None:
    [line] = said("id,cost\na,3\n", Reading(unit=unit, amount_in=amount_in))
    assert line.amount == amount


def test_a_bill_tells_how_long_it_is_and_what_it_sums_up_to() -> None:
    text = "id,cost,time\na,1,2025-11-25T10:00:00Z\nb,2,2025-11-25T09:00:00Z\nc,4,2025-11-27\n"
    bill = Bill(io.BytesIO(text.encode()), DOLLARS)
    assert len(list(bill)) == bill.lines == 3
    assert bill.total == 7 * 10**9
    assert bill.extent == Period(parse_moment("2025-11-25T09:00:00Z").at, DAY_3 + DAY_2 - DAY_1)
    assert bill.extent.whole_days().start == DAY_1


def test_the_last_time_of_a_bill_is_in_its_extent() -> None:
    bill = Bill(io.BytesIO(b"id,cost,time\na,1,2025-11-25T10:00:00Z\n"), DOLLARS)
    assert list(bill)
    at = parse_moment("2025-11-25T10:00:00Z").at
    assert bill.extent.has(at)
    assert not bill.extent.has(at + 1)
    assert bill.extent.whole_days() == Period(DAY_1, DAY_2)


@pytest.mark.parametrize("text", ["9999-12-31T23:59:59-10:00", "0001-01-01T00:00+14:00"])
def test_a_time_in_a_year_that_no_date_has_is_none(text: str) -> None:
    with pytest.raises(BillInvalid, match=r"line 2, column time: .* is no time"):
        said(f"id,cost,time\na,1,{text}\n")


@pytest.mark.parametrize("last", ["9999-12-31", "9999-12-31T23:59:59.999999Z", "253402214400000"])
def test_the_extent_of_any_bill_can_be_told_in_whole_days(last: str) -> None:
    rows = f"id,1,0001-01-01T00:00Z\nid,1,{last}\n"
    bill = Bill(io.BytesIO(f"id,cost,time\n{rows}".encode()), DOLLARS)
    assert len(list(bill)) == 2
    start, end = bill.extent.whole_days()
    assert start is not None
    assert end is not None
    told = (time_text(start), time_text(end))
    assert told == ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z")


def test_lines_of_another_time_are_left_out() -> None:
    text = "id,cost,time\na,1,2025-11-24T23:59:59.999999Z\nb,2,2025-11-25\nc,4,2025-11-26\n"
    reading = replace(DOLLARS, period=Period(DAY_1, DAY_2))
    bill = Bill(io.BytesIO(text.encode()), reading)
    assert [line.reference for line in bill] == ["b"]
    assert bill.outside == 2


PAGES = [
    (
        '{"data": [{"start_time": 1, "results": [{"amount": {"value": 1}}]}], "has_more": true}\n'
        '{"data": [{"start_time": 1, "results": [{"amount": {"value": 2}}]}], "has_more": false}\n'
    ),
    '[{"data": [{"id": "a", "cost": 1}], "has_more": true}, {"data": [{"id": "b", "cost": 2}]}]',
    '{"id": "a", "cost": 1}\n\n{"id": "b", "cost": 2}',
    '\ufeff[ {"id": "a", "cost": 1}\n,\n{"id": "b", "cost": 2} ]\n\n',
    "\ufeffid,cost\r\na,1\r\nb,2\r\n",
    "\nid\tcost\na\t1\n\nb\t2",
]


@pytest.mark.parametrize("text", PAGES)
def test_rows_are_found_in_whatever_they_are_wrapped_in(text: str) -> None:
    assert [line.amount for line in said(text)] == [10**9, 2 * 10**9]


def test_an_array_is_read_piece_by_piece_wherever_it_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # All of it may be on one line, which is longer than a line of another format may be.
    monkeypatch.setattr("peculium_server.reconcile.rows._LINE_MAX", 1 << 19)
    rows = [{"id": f"réf-{number}", "cost": number, "text": "x" * 997} for number in range(1200)]
    for indent in (None, 1):
        data = json.dumps(rows, ensure_ascii=False, indent=indent).encode()
        assert len(data) > 4 * (1 << 18)
        lines = said(data)
        assert [line.reference for line in lines] == [row["id"] for row in rows]
        assert lines[-1].line == (1 if indent is None else 1199 * 5 + 2)


CSV = "id,cost,time\n"
MALFORMED = [
    ("", None, "", "the file is empty"),
    (" \n\n", None, "", "the file is empty"),
    ("id,cost\n", None, "", "not one row"),
    ("[]", None, "", "not one row"),
    ('{"data": []}', None, "", "not one row"),
    ("id,price\na,1\n", 2, "", "no column is known to be the amount"),
    ("id,cost,id\na,1,b\n", 1, "id", "twice"),
    (CSV + "a,1,2025-11-25\nb,2\n", 3, "", "has 2 columns, the header 3"),
    (CSV + 'a,"1', 2, "", "not CSV"),
    (CSV + 'a,1,"x\ny"z\n', 3, "", "not CSV"),
    (CSV + "a,-1,2025-11-25\n", 2, "cost", "negative"),
    (CSV + "a,nan,2025-11-25\n", 2, "cost", "no amount"),
    (CSV + "a,Infinity,2025-11-25\n", 2, "cost", "no amount"),
    (CSV + "a,1_0,2025-11-25\n", 2, "cost", "no amount"),
    (CSV + "a,$1,2025-11-25\n", 2, "cost", "'$1' is no amount"),
    (CSV + '"a","1,000.00",2025-11-25\n', 2, "cost", "no amount"),
    (CSV + "a,,2025-11-25\n", 2, "cost", "has no amount"),
    (CSV + "a,1e99,2025-11-25\n", 2, "cost", "more than a budget can hold"),
    (CSV + "a,4611686018.5,2025-11-25\n", 2, "cost", "more than a budget can hold"),
    (CSV + "a,1e999999999,2025-11-25\n", 2, "cost", "more than a budget can hold"),
    (CSV + "a,1e-999999,2025-11-25\n", 2, "cost", "too many digits"),
    (CSV + f"a,{'1' * 99},2025-11-25\n", 2, "cost", "no amount"),
    (CSV + "a,1,yesterday\n", 2, "time", "no time"),
    (CSV + "a,1,2025-13-01\n", 2, "time", "month"),
    (CSV + "a,1,2025-11-25\nb,2,99999999999999999\n", 3, "time", "no time"),
    (CSV + f"{'a' * 2000},1,2025-11-25\n", 2, "id", "longer than"),
    ("id,cost,currency\na,1,EUR\n", 2, "currency", "'EUR', and the tree counts US dollars"),
    ("id,cost,hold_id\na,1,7\n", 2, "hold_id", "no hold's id"),
    ('{"id": "a", "cost": 1}\n{"id": "b", "co', 2, "", "not JSON"),
    ('{"id": "a", "cost": 1}\n{"id": "b"}', 2, "cost", "has no amount"),
    ('{"id": "a", "cost": NaN}', 1, "", "NaN is no number"),
    ('{"id": "a", "cost": true}', 1, "cost", "no amount"),
    ('{"id": "a", "cost": 1' + "0" * 5000 + "}", 1, "", "not JSON"),
    ('{"id": "a", "cost": 1}\n[1]', 2, "", "not an object"),
    (
        '{"id": {"x": 1}, "cost": 1, "reference": "r"}\n{"reference": {}, "cost": 1}',
        2,
        "reference",
        "not one value",
    ),
    ('{\n"data": [\n{"start_time": 1, "results": [{"amount', 3, "", "not JSON"),
    ('[{"id": "a", "cost": 1},\n{"id": "b", "cost"', 2, "", "not JSON"),
    ('[{"id": "a", "cost": 1},\n{"id": "b", "cost": 2}', 2, "", "was the file cut?"),
    ('[{"id": "a", "cost": 1}]\n[]', 2, "", "something follows"),
    ('[{"id": "a", "cost": 1},\n 7]', 2, "", "not an object"),
    ("[" * 100_000, 1, "", "not JSON"),
    ('{"error": {"message": "invalid key"}}', 1, "", "there are error"),
    ('{"data": [{"start_time": 1, "results": [7]}]}', 1, "", "data[0].results[0] is not an object"),
    ('{"data": [{"id": "a", "cost": 1}], "has_more": true}', 1, "", "goes on"),
    (
        '{"data": [{"start_time": 1, "results": [{"amount": {"value": -1}}]}]}',
        1,
        "data[0].results[0].amount.value",
        "negative",
    ),
    (CSV.encode("utf-16"), 1, "", "not in UTF-8"),
    (CSV.encode() + b"a,1,2025-11-25\nb\xe9,2,2025-11-25\n", 3, "", "not in UTF-8 (byte 2"),
    (b'[{"id": "a", "cost": 1},\n{"id": "\xe9", "cost": 1}]', 2, "", "not in UTF-8"),
]


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    MALFORMED,
    ids=[str(number) for number in range(len(MALFORMED))],
)
def test_what_is_no_bill_is_refused_with_the_place(
    text: str | bytes, line: int | None, column: str, words: str
) -> None:
    with pytest.raises(BillInvalid) as refused:
        said(text)
    assert words in str(refused.value)
    assert (refused.value.line, refused.value.column) == (line, column)


@pytest.mark.parametrize(
    ("text", "form", "words"),
    [
        ("id,cost\na,1\n", Format.JSON, "not JSON"),
        ("id,cost\na,1\n", Format.JSONL, "not JSON"),
        ("", Format.JSONL, "not one row"),
        ('{"id": "a", "cost": 1}', Format.CSV, "no column is known"),
    ],
)
def test_a_format_that_is_not_the_files_is_refused(text: str, form: Format, words: str) -> None:
    # A line of JSON is a header without rows, and with one a header of strange names.
    text = text + "\nx,y" if form is Format.CSV else text
    with pytest.raises(BillInvalid, match=words):
        said(text, replace(DOLLARS, form=form))


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (Columns(amount="price"), "line 2, column price: is not there; there are id, cost"),
        (Columns(labels={"team": "team"}), "column team: is in no row; the first has id, cost"),
        (Columns(model="x.y"), "column x.y: is in no row; the first has id, cost"),
    ],
)
def test_a_column_that_is_named_has_to_be_there(named: Columns, words: str) -> None:
    with pytest.raises(BillInvalid, match=f"^{words}$"):
        said("id,cost\na,1\n", replace(DOLLARS, columns=named))


def test_rows_of_json_may_leave_out_what_they_do_not_have() -> None:
    rows = '{"id": "a", "cost": 1}\n{"id": "b", "cost": 2, "meta": {"team": "x"}}'
    reading = replace(DOLLARS, columns=Columns(labels={"team": "meta.team"}))
    assert [line.labels for line in said(rows, reading)] == [("",), ("x",)]


def test_an_amount_may_be_as_much_as_a_budget_can_hold() -> None:
    [line] = said("id,cost\na,4611686018\n")
    assert line.amount == 4_611_686_018 * 10**9


@pytest.mark.parametrize(
    ("column", "model"), [("line_item", "4o"), ("model", "4o, input"), ("engine", "4o, input")]
)
def test_only_a_line_item_says_more_than_the_model(column: str, model: str) -> None:
    reading = replace(DOLLARS, columns=Columns(model=column))
    [line] = said(f'{column},cost\n"4o, input",1\n', reading)
    assert line.model == model


def test_a_cell_may_be_as_long_as_a_prompt() -> None:
    [line] = said(f"id,cost,prompt\na,1,{'x' * 1_000_000}\n")
    assert line.reference == "a"


def test_dollars_are_no_tokens() -> None:
    tokens = Reading(unit="tokens")
    for reading in (replace(tokens, amount_in=AmountIn.USD), tokens):
        with pytest.raises(BillInvalid, match="the tree counts tokens"):
            said("id,cost,currency\na,1,usd\n", reading)
    with pytest.raises(BillInvalid, match="the tree counts tokens"):
        read("anthropic-cost-report.json", tokens)
