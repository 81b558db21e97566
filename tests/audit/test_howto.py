"""What docs/how-to/audit.md shows answers its questions: by command, SDK and SQL alike, and truly.

Everything on the page is run, as it stands, against a real server and its database, by an auditor who may
do nothing else. What the three means say to each question is compared with what is known of the ledger.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import psycopg
import pytest
from psycopg.rows import dict_row

from peculium_server.core.reuse import ReuseKind
from peculium_server.signing import SigningKey, public_pem
from peculium_server.store import roles
from peculium_server.store.security import SecurityEvent
from peculium_server.store.store import Store
from tests.audit.march import March, usd
from tests.audit_sql.filling import fill
from tests.cli.test_cli import Cli
from tests.forked import Forked
from tests.postgres import Server, as_role
from tests.sealer.sealing import Sealing
from tests.server import starting
from tests.test_readme import ROOT, commands, fenced

pytestmark = pytest.mark.timeout(120)

INTRODUCTION, *SECTIONS = (ROOT / "docs" / "how-to" / "audit.md").read_text().split("\n## ")
QUESTIONS = {title: text for title, _, text in (each.partition("\n") for each in SECTIONS)}

Lines = list[dict[str, Any]]
"""Of a command with --json."""

RUN_7 = "acme/research/run-7"


class Told(NamedTuple):
    """What the page's means say to one question."""

    commands: list[Lines]
    """What each command prints for machines."""
    sdk: Mapping[str, Any]
    """What the program has called by a name at its end."""
    sql: list[Lines]
    """The rows of each query."""


@pytest.fixture(scope="module")
def march() -> March:
    return March.lived()


class Audited:
    """A server with that ledger, its database, and an auditor of both with a folder."""

    def __init__(self, march: March, target: str, key: str, database: str, folder: Path) -> None:
        self.database = database
        self.folder = folder
        self._hold_id = march.late.id.hex()
        variables = {"PECULIUM_TARGET": target, "PECULIUM_API_KEY": key}
        self._environment = mock.patch.dict(os.environ, variables)
        self._cli = Cli(target, **variables)

    def told(self, question: str) -> Told:
        """Run everything that the page has on a question."""
        text = QUESTIONS[question]
        for bill in fenced(text, "csv"):
            (self.folder / "bill.csv").write_text(bill)
        said = [self.command(words) for words in commands(text)]
        return Told(said, self.program(text), self.queries(text))

    def command(self, words: list[str]) -> Lines:
        """What a command prints for machines; with `> FILE` that is there, too."""
        arguments = [self._filled(word) for word in words[1:]]
        file = None
        if ">" in arguments:
            *arguments, _, file = arguments
        finished = self._cli.run(*arguments, *([] if "--json" in arguments else ["--json"]))
        # Not verified, not proven and not reconciled are answers, too.
        assert finished.code in {0, 1}, finished.err
        if file is not None:
            (self.folder / file).write_text(finished.out)
        return [json.loads(line) for line in finished.out.splitlines()]

    def program(self, text: str) -> dict[str, Any]:
        """The names that a question's program leaves, begun as the page says."""
        names: dict[str, Any] = {}
        with self._environment:
            try:
                for program in fenced(INTRODUCTION, "python") + fenced(text, "python"):
                    exec(self._filled(program), names)  # noqa: S102 - that is what is tested
            finally:
                names["client"].close()
        return names

    def queries(self, text: str) -> list[Lines]:
        """The rows of each query."""
        queries = "".join(self._filled(each) for each in fenced(text, "sql")).split(";\n")
        dsn = as_role(self.database, roles.AUDITOR)
        with psycopg.connect(dsn, row_factory=dict_row) as auditor:
            # The page says zones: which one the session has makes no difference.
            auditor.execute("SET TIME ZONE 'Pacific/Kiritimati'")
            return [auditor.execute(each.encode()).fetchall() for each in queries if each.strip()]

    def _filled(self, text: str) -> str:
        """With the id of a hold that there is."""
        return text.replace("HOLD_ID", self._hold_id)


@pytest.fixture(scope="module")
def audited(
    march: March, postgres: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Audited]:
    folder = tmp_path_factory.mktemp("auditor")
    signing = SigningKey.make(folder / "key.pem")
    (folder / "published.pem").write_text(public_pem(signing.public_key))
    key = secrets.token_urlsafe()
    digest = hashlib.sha256(key.encode()).hexdigest()
    keys = folder / "keys.toml"
    keys.write_text(f'[[keys]]\nprincipal = "auditor"\nrole = "auditor"\nsha256 = "{digest}"\n')
    with (
        postgres.fresh_database(postgres.migrated_template()) as database,
        starting(folder, Forked) as start,
    ):
        fill(database, march.ledger)
        asyncio.run(sealed(database, signing))
        asyncio.run(reused_by_the_lead(database, march))
        server = start(
            *("--database-url", as_role(database, roles.SERVER), "--keys-file", str(keys)),
            # In the ledger it is March: what was not over then is over now.
            *("--sweep-seconds", "0", "--seal-seconds", "0"),
        )
        yield Audited(march, server.address, key, database, folder)


async def sealed(database: str, key: SigningKey) -> None:
    async with Sealing.opened(database, key) as sealing:
        await sealing.seal_all()


async def reused_by_the_lead(database: str, march: March) -> None:
    """Record that who delegated run-7 has presented what worker-3 had accepted."""
    accepted = next(entry for entry in march.ledger.journal if entry.principal == "worker-3")
    store = await Store.open(database)
    await store.security.add(
        [
            SecurityEvent(
                at=accepted.at + 60_000_000,
                event_id=secrets.token_bytes(16),
                kind=ReuseKind.CONSUMED_TOKEN,
                number=3,
                root_id=accepted.root_id,
                budget_id=accepted.budget_id,
                principal="lead",
                operation_id=secrets.token_bytes(16),
                consumed_by=accepted.principal,
                consumed_operation_id=accepted.operation_id,
                consumed_kind=accepted.kind,
                consumed_at=accepted.at,
                holder=accepted.principal,
                freeze_id=None,
            )
        ]
    )
    await store.close()


@pytest.fixture(autouse=True)
def at_the_auditors(audited: Audited, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(audited.folder)


Check = Callable[[Told, March], None]
CHECKS: dict[str, Check] = {}


def answers(question: str) -> Callable[[Check], Check]:
    """Name what compares the answers to a question of the page."""

    def named(check: Check) -> Check:
        CHECKS[question] = check
        return check

    return named


def same(*answers: Any) -> None:
    """What is told by several means is one and the same."""
    first, *others = answers
    for other in others:
        assert other == first


# -- The answers -------------------------------------------------------------------------------------------


@answers("What was a budget's balance at a time?")
def balance_at_a_time(told: Told, _: March) -> None:
    [[line]], [[row]] = told.commands, told.sql
    then = told.sdk["then"].balances
    names = ("available", "spent", "forfeited")
    same(
        (usd(6.9), usd(1.6), usd(1.5)),
        tuple(line[name] for name in names),
        tuple(getattr(then, name) for name in names),
        tuple(row[name] for name in names),
    )


@answers("What is in a tree, and what was used?")
def tree_and_used(told: Told, _: March) -> None:
    [listed, [summed]], [rows, [row]] = told.commands, told.sql
    same(
        {
            ("acme", "open", usd(79.2), usd(0.8)),
            ("acme/research", "open", usd(29.25), 0),
            (RUN_7, "frozen", usd(7.1), usd(2.4)),
            ("acme/research/run-8", "closed", 0, usd(0.75)),
        },
        {(each["path"], each["state"], each["available"], each["spent"]) for each in listed},
        {
            (each.path, each.state.name.lower(), each.balances.available, each.balances.spent)
            for each in told.sdk["tree"]
        },
        {(each["path"], each["state"].lower(), each["available"], each["spent"]) for each in rows},
    )
    top = told.sdk["top"]
    same(
        (usd(4.45), usd(0.5)),
        (summed["subtree_used"], summed["subtree_disputed"]),
        (top.subtree_used, top.subtree_disputed),
        (row["used"], row["disputed"]),
    )


@answers("Who spent what?")
def spenders(told: Told, _: March) -> None:
    [listed], [rows] = told.commands, told.sql
    same(
        [
            ("gateway", "acme", usd(0.8), 0),
            ("system", RUN_7, 0, usd(1.5)),
            ("treasurer", RUN_7, usd(0.15), 0),
            ("worker-3", RUN_7, usd(2.25), -usd(1)),
            ("worker-4", "acme/research/run-8", usd(0.75), 0),
        ],
        [(*each["group"].values(), each["spent"], each["forfeited"]) for each in listed],
        [(*each.keys, each.spent, each.forfeited) for each in told.sdk["usage"].groups],
        [(each["principal"], each["path"], each["spent"], each["forfeited"]) for each in rows],
    )


@answers("By whose authority?")
def authority(told: Told, march: March) -> None:
    [listed], [levels, rows] = told.commands, told.sql
    same(
        [
            ("acme", usd(100), "treasurer", "role"),
            ("acme/research", usd(40), "gateway", "holder"),
            (RUN_7, usd(10), "lead", "token"),
        ],
        [(each["path"], each["amount"], each["by"], each["right"]) for each in listed[:3]],
        [
            (each.budget.path, each.amount, each.by, each.right) for each in told.sdk["line"]
        ],
        [
            (each["above_path"], each["amount"], each["made_by"], each["authority"].lower())
            for each in levels
        ],
    )  # fmt: skip
    steps = [
        (each["seq"], each["kind"], each["by"], each["consumed"], each["produced_fingerprint"])
        for each in listed[3:]
    ]
    same(
        [("DELEGATE", "lead"), ("ACCEPT", "worker-3"), *[("RESERVE", "worker-3")] * 5],
        [each[1:3] for each in steps],
    )
    same(
        steps,
        [
            (each.seq, each.kind, each.by, hexadecimal(each.consumed), hexadecimal(each.produced))
            for each in told.sdk["steps"]
        ],
    )
    same(
        [(seq, kind, by, fingerprint(consumed), made) for seq, kind, by, consumed, made in steps],
        [tuple(each.values()) for each in rows],
    )
    for before, after in itertools.pairwise(rows):
        assert after["consumed_token"] == before["produced_token"]


def hexadecimal(value: bytes | None) -> str | None:
    return None if value is None else value.hex()


def fingerprint(token_id: str | None) -> str | None:
    """What is shown of a token that may be live."""
    return token_id and hashlib.sha256(bytes.fromhex(token_id)).digest()[:8].hex()


BALANCES = ("granted", "available", "held", "delegated", "spent", "forfeited", "overrun")


@answers("What did a subtree open with, move, and close with?")
def statement(told: Told, _: March) -> None:
    [[line]], [[first, *moved, last]] = told.commands, told.sql
    statement = told.sdk["statement"]
    same(
        (usd(40), usd(36.9), 0, 0, usd(1.6), usd(1.5), 0),
        tuple(line["opening"][name] for name in BALANCES),
        tuple(getattr(statement.opening, name) for name in BALANCES),
        tuple(first[name] for name in BALANCES),
    )
    same(
        (usd(40), usd(36.35), 0, 0, usd(3.15), usd(0.5), 0),
        tuple(line["closing"][name] for name in BALANCES),
        tuple(getattr(statement.closing, name) for name in BALANCES),
        tuple(last[name] for name in BALANCES),
    )
    same(
        {
            ("RESERVE", 1, 0, -usd(0.2)),
            ("SETTLE", 2, usd(0.8), usd(0.4)),
            ("SPEND", 1, usd(0.75), -usd(0.75)),
            ("FREEZE", 1, 0, 0),
            ("REVOKE", 1, 0, 0),
        },
        {
            (each["kind"], each["operations"], *(each["changes"][name] for name in MOVED))
            for each in line["movements"]
        },
        {
            (each.kind, each.operations, *(getattr(each.changes, name) for name in MOVED))
            for each in statement.movements
        },
        {(each["line"], each["operations"], *(each[name] for name in MOVED)) for each in moved},
    )


MOVED = ("spent", "available")


@answers("How was it used, by day, model and label?")
def usage(told: Told, _: March) -> None:
    [listed], [rows] = told.commands, told.sql
    same(
        [
            ("2026-03-02", "", "research", usd(0.15), usd(1.5), 0),
            ("2026-03-02", "gpt-5", "research", usd(1.45), 0, 2_400),
            ("2026-03-03", "claude", "research", usd(0.75), 0, 700),
            ("2026-03-03", "gpt-5", "research", usd(0.4), 0, 1_200),
            ("2026-03-03", "gpt-5-mini", "research", usd(0.4), -usd(1), 5_000),
            ("2026-03-06", "gpt-5", "platform", usd(0.6), 0, 1_200),
        ],
        [
            (*each["group"].values(), each["spent"], each["forfeited"], each["input_tokens"])
            for each in listed
        ],
        [
            (*each.keys, each.spent, each.forfeited, each.input_tokens)
            for each in told.sdk["march"].groups
        ],
        [tuple(each.values()) for each in rows],
    )


@answers("What happened to a hold?")
def hold(told: Told, _: March) -> None:
    [listed], [rows] = told.commands, told.sql
    same(
        [
            ("RESERVE", "worker-3", usd(1), False),
            ("LAPSE", "system", usd(1), False),
            ("SETTLE", "worker-3", usd(0.4), True),
        ],
        [
            (each["kind"], each["actor"], each["amount"], late(each["kind"], each["changes"]))
            for each in listed
        ],
        [
            (each.kind, each.actor, each.amount, late(each.kind, vars_of(each.changes)))
            for each in told.sdk["history"]
        ],
        [(each["kind"], each["principal"], each["amount"], each["late"]) for each in rows],
    )
    assert told.sdk["late"] is True
    assert [each["hold_state"] for each in rows] == ["LIVE", "LAPSED", "SETTLED"]
    same([each["at"] for each in rows], [each.at for each in told.sdk["history"]])


def late(kind: str, changes: Mapping[str, int]) -> bool:
    return kind == "SETTLE" and changes["forfeited"] < 0


def vars_of(balances: Any) -> dict[str, int]:
    return {name: getattr(balances, name) for name in balances.__dataclass_fields__}


@answers("What did a principal do?")
def principal(told: Told, _: March) -> None:
    [listed], [rows] = told.commands, told.sql
    same(
        ["ACCEPT", "RESERVE", "SETTLE", *["RESERVE"] * 3, *["SETTLE"] * 2, "RESERVE", "SETTLE"],
        [each["kind"] for each in rows],
    )
    same(
        [(each["at"], each["kind"], each["amount"]) for each in rows],
        [(each.at, each.kind, each.amount) for each in told.sdk["done"]],
        [
            (datetime.fromisoformat(each["at"]), each["kind"], each["amount"])
            for each in listed
            if each["part"] == 0
        ],
    )


@answers("What belongs to a trace?")
def trace(told: Told, _: March) -> None:
    [listed], [rows] = told.commands, told.sql
    same(
        [
            ("RESERVE", "worker-3", usd(2)),
            ("SETTLE", "worker-3", usd(1.25)),
            ("SPEND", "worker-4", usd(0.75)),
        ],
        [(each["kind"], each["actor"], each["amount"]) for each in listed],
        [(each.kind, each.actor, each.amount) for each in told.sdk["traced"]],
        [(each["kind"], each["principal"], each["amount"]) for each in rows],
    )


@answers("Who froze, revoked or resolved, and why?")
def interventions(told: Told, _: March) -> None:
    [listed], [rows] = told.commands, told.sql
    same(
        [
            ("RESOLVE", "treasurer", RUN_7),
            ("FREEZE", "treasurer", "acme/research/run-8"),
            ("REVOKE", "lead", "acme/research"),
            ("REVOKE", "lead", "acme/research/run-8"),
        ],
        [
            (each["kind"], each["actor"], told.sdk["paths"][id_of(each["budget_id"])])
            for each in listed
        ],
        [
            (each.kind, each.actor, told.sdk["paths"][each.budget_id])
            for each in told.sdk["interventions"]
        ],
        [(each["kind"], each["principal"], each["path"]) for each in rows],
    )
    same(
        ["the provider's log says so", "it goes in circles", None],
        [each["reason"] for each in listed if each["part"] == 0],
        [each["reason"] for each in rows if each["part"] == 0],
    )


def id_of(text: str) -> bytes:
    return bytes.fromhex(text.replace("-", ""))


@answers("Was a token used by two principals?")
def reused(told: Told, march: March) -> None:
    [[line]], [[row]] = told.commands, told.sql
    [event] = told.sdk["events"]
    [accepted] = [entry for entry in march.ledger.journal if entry.principal == "worker-3"][:1]
    same(
        ("CONSUMED_TOKEN", RUN_7, "lead", "worker-3", "ACCEPT", 3),
        tuple(line[name] for name in ("kind", "path", "principal", *CONSUMED, "count")),
        (
            *(event.kind, str(event.ref), event.principal),
            *(event.consumed_by, event.consumed_kind, event.count),
        ),
        tuple(row[name] for name in ("kind", "path", "principal", *CONSUMED, "number")),
    )
    same(accepted.seq, row["consumed_seq"])
    same(
        accepted.operation_id,
        id_of(line["consumed_operation_id"]),
        id_of(event.consumed_operation_id),
    )
    same(event.at, row["at"], datetime.fromisoformat(line["at"]))


CONSUMED = ("consumed_by", "consumed_kind")


@answers("Which money is stranded?")
def stranded(told: Told, march: March) -> None:
    [listed], [rows, holds] = told.commands, told.sql
    same(
        [(RUN_7, usd(0.5), usd(0.5))],
        [
            (each["path"], each["forfeited"], each["disputed"])
            for each in listed
            if each["forfeited"] or each["disputed"]
        ],
        [
            (each.path, each.balances.forfeited, each.disputed)
            for each in told.sdk["stranded"]
        ],
        [tuple(each.values()) for each in rows],
    )  # fmt: skip
    same(
        {
            (march.forfeited.id, "LAPSED", usd(0.5), 0),
            (march.disputed.id, "DISPUTED", 0, usd(0.5)),
        },
        {
            (each.hold_id, each.state.name, each.remaining, each.disputed)
            for each in told.sdk["open_holds"]
        },
        {
            (each["hold_id"].bytes, each["state"], each["remaining"], each["disputed"])
            for each in holds
        },
    )


@answers("Is this entry in the ledger for good?")
def proof(told: Told, _: March) -> None:
    [[line]], [[row]] = told.commands, told.sql
    proof = told.sdk["proof"]
    assert (line["proven"], line["public_key_given"], told.sdk["flaw"]) == (True, True, None)
    same(1, line["checkpoint"]["number"], proof.checkpoint.number, row["number"])
    same(line["entry"]["hash"], proof.entry.hash.hex())
    assert proof.entry.seq == 3


@answers("Was anything altered?")
def verification(told: Told, march: March) -> None:
    [[online], [exported], [offline]], [chain] = told.commands, told.sql
    entries = len(march.ledger.journal)
    assert (online["verified"], online["findings"]) == (True, [])
    assert told.sdk["verdict"].verified is True
    same(entries, online["entries"], told.sdk["verdict"].entries, exported["entries"])
    assert (offline["verified"], offline["keys_trusted"], offline["unsealed"]) == (True, True, 0)
    same(entries, offline["entries"])
    assert chain == [{"number": 1, "says_so": True, "follows": True}]


@answers("Was anything cut off?")
def cut_off(told: Told, _: March) -> None:
    [[kept], listed], [rows] = told.commands, told.sql
    assert told.sdk["cut_off"] is False
    same(
        [(kept["number"], kept["hash"])],
        [(each["number"], each["hash"]) for each in listed],
        list(told.sdk["there"].items()),
        [tuple(each.values()) for each in rows],
    )


@answers("Does the provider's bill agree?")
def bill(told: Told, _: March) -> None:
    [[*found, summary]], [rows] = told.commands, told.sql
    assert summary["status"] != "reconciled"
    booked = {
        "call-1": usd(1.25),
        "call-2": usd(0.4),
        "call-4": usd(0.35),
        "call-5": usd(0.75),
        "call-6": usd(0.4),
        "call-7": usd(0.6),
    }
    same(booked, {each["reference"]: each["booked"] for each in rows})
    billed = dict(line.split(",")[::2] for line in fenced(QUESTIONS[BILL], "csv")[0].split()[1:])
    differing = {call for call, cost in billed.items() if usd(float(cost)) != booked[call]}
    same(
        differing, {"call-6"}, {name for each in found for name in each["references"] if name in booked}
    )  # fmt: skip


BILL = "Does the provider's bill agree?"


@answers("What is happening?")
def watch(told: Told, march: March) -> None:
    [listed], [rows] = told.commands, told.sql
    same(
        [(each.kind.name, each.amount) for each in march.ledger.journal[:10]],
        [(each["kind"], each["amount"]) for each in listed],
        [(each.kind, each.amount) for each in told.sdk["seen"][:10]],
        [(each["kind"], each["amount"]) for each in rows],
    )
    assert told.sdk["cursor"]


# -- The tests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered_truly_by_every_means(
    audited: Audited, march: March, question: str
) -> None:
    CHECKS[question](audited.told(question), march)


@pytest.mark.parametrize("question", QUESTIONS)
def test_of_a_means_that_has_no_answer_that_is_said(question: str) -> None:
    text = QUESTIONS[question]
    means = {
        "No command": commands(text),
        "The SDK": fenced(text, "python"),
        "SQL": fenced(text, "sql"),
    }
    said = re.findall(r"\*\*([\w ]+)\*\*", text)
    assert {name for name, there in means.items() if not there} <= set(said)


def test_checkpoints_that_were_cut_off_are_missed_by_every_means(audited: Audited) -> None:
    question = "Was anything cut off?"
    audited.told(question)
    text = QUESTIONS[question]
    [_, listing] = commands(text)
    with psycopg.connect(audited.database, autocommit=True) as connection:
        connection.execute("CREATE TABLE cut AS SELECT * FROM checkpoints")
        connection.execute("DELETE FROM checkpoints")
        try:
            assert audited.command(listing) == []
            assert audited.program(text)["cut_off"] is True
            assert audited.queries(text) == [[]]
        finally:
            connection.execute("INSERT INTO checkpoints SELECT * FROM cut")
            connection.execute("DROP TABLE cut")
