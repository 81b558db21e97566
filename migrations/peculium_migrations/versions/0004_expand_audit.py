"""Views for auditors who ask with SQL: the schema `audit`.

Why: entries are bytes, and the tables have the ids of live tokens, so an auditor could neither read
them nor be given them. The views say everything in words and numbers, without those ids
(docs/reference/schema.md). `peculium migrate` grants them to the role peculium_auditor afterwards.
Locks: none that anyone could wait for; views and functions are new, and no table is touched.
Duration: well under a second.
Undo: DROP SCHEMA audit CASCADE, and set alembic_version to 0003. Nothing is lost. `downgrade` refuses
all the same: there is one way.

The user who migrates needs the right to make a schema: whoever owns the database has it.
A view depends on the columns that it reads: a later step that drops or retypes one has to drop the view.
"""

from __future__ import annotations

import importlib.resources

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

SOURCES = ("0004_decoder.sql", "0004_views.sql")

BUDGET = {
    "root": "The name of the tree.",
    "path": "The names from the root to the budget, separated by slashes.",
    "lane": "The lane that the tree belongs to: with it, the others are not searched.",
    "root_id": "The id of the tree's root.",
    "budget_id": "The budget.",
}
BALANCES = {
    "granted": "Put in so far, less what was taken back.",
    "available": "What can be reserved, spent, delegated.",
    "held": "In live holds.",
    "delegated": "The sum of what its children were granted.",
    "spent": "Booked as spent.",
    "forfeited": "In holds that lapsed: the call may have been billed.",
    "overrun": "Billed beyond what the tree had; above zero in a root only.",
    "advanced": "The part of granted that its ancestors lent for settles beyond their holds.",
}
MOVED = {name: f"The sum of the changes of {name}, with sign." for name in BALANCES}

VIEWS: dict[str, tuple[str, dict[str, str]]] = {
    "paths": (
        "Where budgets lie in their trees.",
        {name: text for name, text in BUDGET.items() if name != "root"},
    ),
    "budgets": (
        "Budgets as they are now.",
        BUDGET
        | BALANCES
        | {
            "parent_id": "The parent; NULL for a root.",
            "ancestors": "The parent first, the root last; empty for a root.",
            "depth": "Levels below the root.",
            "name": "Unique among its siblings.",
            "unit": "What all amounts of the tree count.",
            "state": "OPEN, FROZEN, EXPIRED (not closed yet) or CLOSED: of it and its ancestors the strictest.",
            "closed": "It is closed itself.",
            "frozen": "An admin's flag is set on it itself.",
            "disputes": "Its holds whose dispute is open; while there is one it is frozen.",
            "disputed": "Reported beyond what the overrun factor allows, booked to nobody.",
            "custody": "TOKEN: whoever has the live token may spend; PRINCIPAL: the holder may.",
            "holder": "The principal that it belongs to; NULL while its token is a bearer's.",
            "holds_live": "How many live holds it has.",
            "overrun_factor": "How many times its amount a hold may bill beyond it; NULL for a root: no limit.",
            "lease_until": "When its lease ends; NULL: never.",
            "lease_latest": "The latest end to which the holder may renew the lease.",
            "labels": "As given when it was made.",
            "created_at": "When it was made.",
            "last_at": "When its last entry was decided.",
            "seq": "How many entries it has.",
            "version": "Raised by freezing, disputes, closing, lease and overrun.",
            "head": "The hash of its last entry.",
        },
    ),
    "subtrees": (
        "What budgets have used together with everything below them. Adds up rows: say which budget.",
        BUDGET
        | {
            "unit": "What all amounts of the tree count.",
            "budgets": "How many budgets that are, closed ones included.",
            "used": "The sum of spent and forfeited.",
            "disputed": "The sum of what is disputed, beside what is used.",
            "in_flight": "The sum of what is held.",
        },
    ),
    "holds": (
        "Holds as they are now; ended ones stay.",
        BUDGET
        | {
            "hold_id": "The hold.",
            "state": "LIVE, LAPSED (can be settled still), SETTLED, RELEASED or DISPUTED.",
            "amount": "As reserved.",
            "remaining": "Still held, or forfeited if it has lapsed.",
            "booked": "Booked as spent over its life.",
            "disputed": "Reported and booked to nobody; waits for an admin.",
            "created_at": "When it was reserved.",
            "expires_at": "When its time is over.",
        },
    ),
    "entries": (
        "The immutable record: one row for each budget that an operation touched.",
        BUDGET
        | {name: f"{name.capitalize()} after the operation." for name in BALANCES}
        | {f"{name}_change": f"What the operation added to {name}." for name in BALANCES}
        | {
            "seq": "1, 2, 3, … within the budget.",
            "position": "The operation's place in its lane.",
            "part": "Which part of the operation this is; 0 is of the budget that it names.",
            "parts": "How many parts the operation has.",
            "operation_id": "The operation.",
            "kind": "GRANT, RESERVE, SETTLE, …",
            "at": "When it was decided, by the database's clock.",
            "principal": "Who did it; 'system' is the ledger itself.",
            "trace_id": "W3C trace id, 32 hexadecimal digits; NULL if the caller had none.",
            "consumed": "The id of the token that this entry ended; NULL if none.",
            "consumed_token": "The fingerprint of that token.",
            "produced_token": "The fingerprint of the token that the budget has from then on; NULL if none was made.",
            "amount": "The operation's headline amount, by kind.",
            "disputed": "What is disputed after the operation.",
            "closed": "The budget is closed after the operation.",
            "frozen": "An admin's flag is set on the budget after the operation.",
            "lease_until": "When the budget's lease ends, after the operation; NULL: never.",
            "hold_id": "The hold concerned; NULL if none is, and in parts of other budgets.",
            "hold_state": "Its state after the operation.",
            "authority": "By what right: TOKEN, HOLDER (by name), ROLE (as admin, or the ledger itself).",
            "labels": "The operation's own labels.",
            "reference": "The provider's id of the call, as told by a settle or spend.",
            "reason": "As told by an admin, or whoever resolved.",
            "request": "All that was asked, in every part; tokens as their fingerprints. NULL if unreadable.",
            "effect": "All that was done to the budget, beside the balances; times in microseconds.",
            "digest": "Over the operation and all its parts; NULL if it has one part.",
            "hash": "Of this entry, chained to the budget's entry before.",
        },
    ),
    "statements": (
        "What moved, by budget, day and kind of operation.",
        BUDGET
        | MOVED
        | {
            "day": "In UTC.",
            "kind": "The kind of operation.",
            "operations": "How many operations.",
            "entries": "How many entries they have.",
        },
    ),
    "usage": (
        "What was spent, by budget, day, principal, provider, model and labels.",
        BUDGET
        | {
            "day": "In UTC.",
            "principal": "Who reported it; 'system' for what lapsed.",
            "provider": "From the usage facts; empty if they have none.",
            "model": "From the usage facts, or else the label model; empty if there is none.",
            "labels": "Of the operation, or else of the budget or its nearest ancestor that has the label.",
            "operations": "Settles, spends and resolves.",
            "spent": "Booked as spent, less what was taken back.",
            "forfeited": "Forfeited by lapses, less what was settled, released or resolved afterwards.",
            "estimated": "Operations whose amount was an estimate, as they said.",
            "input_tokens": "Tokens read, as reported.",
            "output_tokens": "Tokens written, as reported.",
            "cached_tokens": "Of the tokens read, those from a cache.",
        },
    ),
    "lineage": (
        "By whose authority a budget exists: a row for it and for each of its ancestors.",
        BUDGET
        | {
            "depth": "Levels of the ancestor below the root: 0 is the root.",
            "above_id": "The ancestor, or the budget itself.",
            "above_path": "Its path.",
            "made_at": "When it was made.",
            "made_by": "The principal that made it.",
            "authority": "By what right: TOKEN (of its parent), HOLDER (of its parent), ROLE (as admin).",
            "consumed_token": "The fingerprint of the parent's token that making it consumed.",
            "kind": "GRANT, or DELEGATE.",
            "operation_id": "The operation that made it.",
            "amount": "What it was made with.",
        },
    ),
    "checkpoints": (
        "Sealed checkpoints, of the whole ledger: docs/reference/checkpoints.md.",
        {
            "number": "1, 2, 3, …",
            "sealed_at": "When it was sealed, by the database's clock.",
            "incarnation": "Of the ledger.",
            "positions": "The position in each lane up to which all is sealed: positions[lane + 1].",
            "operations": "How many operations are sealed by it and those before.",
            "merkle_root": "Over the heads of the budgets that moved since the checkpoint before.",
            "leaves": "How many these are.",
            "previous_hash": "The hash of the checkpoint before; 32 zero bytes for the first one.",
            "hash": "Of this checkpoint, as recorded: SHA-256 of hashed, if nobody has altered anything.",
            "key_id": "The first 8 bytes of SHA-256 of the public key.",
            "signature": "Ed25519 over signed.",
            "public_key": "As the ledger has it, which proves nothing: compare it with what was published.",
            "hashed": "What the checkpoint says, in the bytes that its hash is made of.",
            "signed": "The bytes that its signature is made over.",
        },
    ),
}

FUNCTIONS = {
    "fingerprint(bytea)": "What is shown of a token: the first 8 bytes of SHA-256 of its id.",
    "decoded(bytea, jsonb)": "Deterministic CBOR as JSON, by a layout. NULL if it is none.",
    "request(bytea)": "An encoded request with its fields' names; tokens as their fingerprints.",
    "effect(bytea)": "An encoded effect with its fields' names.",
    "kind(smallint)": "The name of a kind of operation.",
    "instant(bigint)": "The time so many microseconds after the Unix epoch.",
    "item(integer, bigint)": "The head of an item of deterministic CBOR: its kind, and its number or length.",
    "budget(text)": "The keys of the budget at a path: to ask for its rows by the index.",
    "subtree(text)": "The budget at a path and all budgets below it.",
    "as_of(text, timestamptz)": "The balances of a budget and of those below it, as they were at a time.",
    "statement(text, timestamptz, timestamptz, boolean)": (
        "What moved from a time until before another: opening, a line for each kind, closing."
    ),
}


def upgrade() -> None:
    """Make the schema, and say what everything in it is."""
    op.execute("CREATE SCHEMA audit")
    folder = importlib.resources.files("peculium_migrations") / "audit"
    for name in SOURCES:
        op.execute((folder / name).read_text(encoding="utf-8"))
    _comment("SCHEMA", "audit", "What auditors read: docs/reference/schema.md of Peculium.")
    for view, (comment, columns) in VIEWS.items():
        _comment("VIEW", f"audit.{view}", comment)
        for column, text in columns.items():
            _comment("COLUMN", f"audit.{view}.{column}", text)
    for function, comment in FUNCTIONS.items():
        _comment("FUNCTION", f"audit.{function}", comment)


def _comment(what: str, name: str, text: str) -> None:
    quoted = text.replace("'", "''")
    op.execute(f"COMMENT ON {what} {name} IS '{quoted}'")


def downgrade() -> None:
    """Refuse."""
    raise NotImplementedError("there is no way back: see what the revision says of undoing it")
