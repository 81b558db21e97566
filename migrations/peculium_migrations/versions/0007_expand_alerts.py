"""Alerts: rules, what they have found, webhooks, and the outbox of deliveries; their views for auditors.

Why: operators want to hear of what a subtree has used, of disputes, overruns and freezes, without asking
(docs/operating/alerts.md). All of it is written by the servers' background tasks and by admins' calls; no
operation touches these tables.
Locks: none that anyone could wait for; all tables and views are new, and no other one is touched.
Duration: under a second.
Undo: DROP VIEW audit.deliveries, audit.webhooks, audit.alerts, audit.alert_rules; DROP TABLE
webhook_deliveries, webhooks, alerts, alert_rules, alert_progress; set alembic_version to 0006. The rules and
webhooks are lost, and what was found. `downgrade` refuses: there is one way.

A server of the schema before that still runs finds no alerts, and is not disturbed.
"""

from __future__ import annotations

import importlib.resources

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE alert_progress (
    alerts bigint NOT NULL,
    changes bigint NOT NULL,
    looked_at timestamptz NOT NULL,
    singleton boolean NOT NULL,
    more boolean NOT NULL,
    positions bigint[] NOT NULL,
    CONSTRAINT pk_alert_progress PRIMARY KEY (singleton),
    CONSTRAINT ck_alert_progress_singleton CHECK (singleton),
    CONSTRAINT ck_alert_progress_counters CHECK (alerts >= 0 AND changes >= 0)
);

INSERT INTO alert_progress (singleton, alerts, changes, looked_at, more, positions)
SELECT true, 0, 0, clock_timestamp(), false, array_agg(position ORDER BY lane) FROM lanes;

CREATE TABLE alert_rules (
    amount bigint NOT NULL,
    since bigint NOT NULL,
    crossings bigint NOT NULL,
    basis_points bigint NOT NULL,
    created_at timestamptz NOT NULL,
    deleted_at timestamptz,
    lane smallint NOT NULL,
    kind smallint NOT NULL,
    armed boolean NOT NULL,
    due boolean NOT NULL,
    rule_id uuid NOT NULL,
    root_id uuid NOT NULL,
    budget_id uuid NOT NULL,
    line uuid[] NOT NULL,
    path text NOT NULL,
    unit text NOT NULL,
    created_by text NOT NULL,
    deleted_by text,
    CONSTRAINT pk_alert_rules PRIMARY KEY (rule_id),
    CONSTRAINT ck_alert_rules_threshold CHECK (
        kind BETWEEN 1 AND 4 AND basis_points BETWEEN 0 AND 100000
        AND amount BETWEEN 0 AND 4611686018427387904
        AND (kind = 1) = (basis_points > 0 OR amount > 0)
        AND (basis_points = 0 OR amount = 0)
    ),
    CONSTRAINT ck_alert_rules_counters CHECK (since >= 0 AND crossings >= 0),
    CONSTRAINT ck_alert_rules_line CHECK (
        line[1] = budget_id AND line[cardinality(line)] = root_id
    ),
    CONSTRAINT ck_alert_rules_deleted CHECK ((deleted_at IS NULL) = (deleted_by IS NULL))
);

CREATE INDEX ix_alert_rules_root ON alert_rules (lane, root_id);

CREATE TABLE alerts (
    number bigint NOT NULL,
    at timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL,
    amount bigint NOT NULL,
    threshold bigint NOT NULL,
    granted bigint NOT NULL,
    lane smallint NOT NULL,
    kind smallint NOT NULL,
    alert_id uuid NOT NULL,
    rule_id uuid NOT NULL,
    root_id uuid NOT NULL,
    budget_id uuid NOT NULL,
    source_id uuid NOT NULL,
    operation_id uuid,
    hold_id uuid,
    line uuid[] NOT NULL,
    path text NOT NULL,
    source_path text NOT NULL,
    unit text NOT NULL,
    principal text,
    CONSTRAINT pk_alerts PRIMARY KEY (number),
    CONSTRAINT uq_alerts_id UNIQUE (alert_id),
    CONSTRAINT ck_alerts_counters CHECK (
        number >= 1 AND amount >= 0 AND threshold >= 0 AND granted >= 0
    ),
    CONSTRAINT ck_alerts_kind CHECK (kind BETWEEN 1 AND 4)
);

CREATE INDEX ix_alerts_root ON alerts (root_id, number);

CREATE TABLE webhooks (
    created_at timestamptz NOT NULL,
    deleted_at timestamptz,
    webhook_id uuid NOT NULL,
    root_id uuid,
    budget_id uuid,
    url text NOT NULL,
    path text NOT NULL,
    created_by text NOT NULL,
    deleted_by text,
    CONSTRAINT pk_webhooks PRIMARY KEY (webhook_id),
    CONSTRAINT ck_webhooks_url CHECK (octet_length(url) BETWEEN 1 AND 2048),
    CONSTRAINT ck_webhooks_budget CHECK ((root_id IS NULL) = (budget_id IS NULL)),
    CONSTRAINT ck_webhooks_deleted CHECK ((deleted_at IS NULL) = (deleted_by IS NULL))
);

CREATE TABLE webhook_deliveries (
    number bigint NOT NULL,
    next_at timestamptz NOT NULL,
    last_at timestamptz,
    attempts smallint NOT NULL,
    last_status smallint NOT NULL,
    state smallint NOT NULL,
    webhook_id uuid NOT NULL,
    last_problem text NOT NULL,
    CONSTRAINT pk_webhook_deliveries PRIMARY KEY (webhook_id, number),
    CONSTRAINT ck_webhook_deliveries_counters CHECK (
        number >= 1 AND attempts >= 0 AND last_status >= 0 AND state BETWEEN 1 AND 3
    )
);

CREATE INDEX ix_webhook_deliveries_due ON webhook_deliveries (webhook_id, next_at) WHERE state = 1;
CREATE INDEX ix_webhook_deliveries_number ON webhook_deliveries (number);
"""

BUDGET = {
    "root": "The name of the tree.",
    "path": "The names from the root to the budget, separated by slashes.",
    "lane": "The lane that the tree belongs to.",
    "root_id": "The id of the tree's root.",
    "budget_id": "The budget at the top of the subtree.",
}

VIEWS: dict[str, tuple[str, dict[str, str]]] = {
    "alert_rules": (
        "What is watched for; deleted rules stay for as long as alerts do.",
        BUDGET
        | {
            "rule_id": "The rule.",
            "kind": "USED, DISPUTE, OVERRUN or FREEZE.",
            "percent": "Of what the budget was granted; NULL if the threshold is an amount, or there is none.",
            "amount": "The threshold in the tree's unit; NULL if it is a share, or there is none.",
            "armed": "It fires when it finds its threshold crossed.",
            "crossings": "How often it has fired, if it has a threshold.",
            "created_at": "When it was made.",
            "created_by": "Who made it.",
            "deleted_at": "When it was deleted; NULL if it was not.",
            "deleted_by": "Who deleted it; NULL if it was not.",
        },
    ),
    "alerts": (
        "What rules have found.",
        BUDGET
        | {
            "number": "1, 2, 3, … in the ledger.",
            "alert_id": "The id that receivers are told.",
            "rule_id": "The rule.",
            "kind": "USED, DISPUTE, OVERRUN or FREEZE.",
            "at": "When it was found, or when the event was decided.",
            "recorded_at": "When it was recorded.",
            "amount": "Used; disputed by the operation; the overrun after it; 0 of a freeze.",
            "threshold": "What was crossed; NULL of an event.",
            "granted": "What the budget was granted; NULL of an event.",
            "source_id": "The budget where it has happened.",
            "source_path": "Its path.",
            "operation_id": "The operation of an event.",
            "hold_id": "The hold of a dispute.",
            "principal": "Who has done what an event is of.",
        },
    ),
    "webhooks": (
        "Where alerts are sent to; of the address without its path, which may be meant for the receiver only.",
        {
            "webhook_id": "The webhook.",
            "origin": "Scheme, host and port.",
            "root_id": "The id of the tree whose alerts it gets; NULL: all alerts of the ledger.",
            "budget_id": "The top of the subtree whose alerts it gets; NULL: all alerts of the ledger.",
            "path": "The names from the root to that budget; empty if there is none.",
            "created_at": "When it was made.",
            "created_by": "Who made it.",
            "deleted_at": "When it was deleted; NULL if it was not.",
            "deleted_by": "Who deleted it; NULL if it was not.",
        },
    ),
    "deliveries": (
        "What became of each alert at each webhook.",
        {
            "webhook_id": "The webhook.",
            "number": "The alert's.",
            "alert_id": "The alert.",
            "state": "PENDING, DELIVERED or DEAD.",
            "attempts": "How often it was tried, since it was made or replayed.",
            "next_at": "When it is tried next, if it is pending.",
            "last_at": "When it was tried last; NULL: never.",
            "last_status": "The HTTP status of the last answer; NULL if there was none.",
            "last_problem": "What went wrong the last time; empty if nothing did.",
        },
    ),
}


def upgrade() -> None:
    """Make the tables and views, and say what is in the views."""
    op.execute(TABLES)
    folder = importlib.resources.files("peculium_migrations") / "audit"
    op.execute((folder / "0007_views.sql").read_text(encoding="utf-8"))
    for view, (comment, columns) in VIEWS.items():
        _comment("VIEW", f"audit.{view}", comment)
        for column, text in columns.items():
            _comment("COLUMN", f"audit.{view}.{column}", text)


def _comment(what: str, name: str, text: str) -> None:
    quoted = text.replace("'", "''")
    op.execute(f"COMMENT ON {what} {name} IS '{quoted}'")


def downgrade() -> None:
    """Refuse."""
    raise NotImplementedError("there is no way back: see what the revision says of undoing it")
