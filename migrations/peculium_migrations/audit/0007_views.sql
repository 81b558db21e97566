-- What auditors read of alerts. An address is shown without its path and query.

CREATE VIEW audit.alert_rules AS
SELECT
    r.name AS root, a.path, a.lane, a.root_id, a.budget_id, a.rule_id,
    (ARRAY['USED', 'DISPUTE', 'OVERRUN', 'FREEZE'])[a.kind] AS kind,
    nullif(a.basis_points, 0)::numeric / 100 AS percent, nullif(a.amount, 0) AS amount,
    a.armed, a.crossings, a.created_at, a.created_by, a.deleted_at, a.deleted_by
FROM alert_rules AS a
LEFT JOIN roots AS r ON r.lane = a.lane AND r.root_id = a.root_id;

CREATE VIEW audit.alerts AS
SELECT
    r.name AS root, a.path, a.lane, a.root_id, a.budget_id, a.number, a.alert_id, a.rule_id,
    (ARRAY['USED', 'DISPUTE', 'OVERRUN', 'FREEZE'])[a.kind] AS kind,
    a.at, a.recorded_at, a.amount,
    CASE WHEN a.kind = 1 THEN a.threshold END AS threshold,
    CASE WHEN a.kind = 1 THEN a.granted END AS granted,
    a.source_id, a.source_path, a.operation_id, a.hold_id, a.principal
FROM alerts AS a
LEFT JOIN roots AS r ON r.lane = a.lane AND r.root_id = a.root_id;

CREATE VIEW audit.webhooks AS
SELECT
    webhook_id, substring(url FROM '^[a-z]+://[^/?#]*') AS origin, root_id, budget_id, path,
    created_at, created_by, deleted_at, deleted_by
FROM webhooks;

CREATE VIEW audit.deliveries AS
SELECT
    d.webhook_id, d.number, a.alert_id,
    (ARRAY['PENDING', 'DELIVERED', 'DEAD'])[d.state] AS state, d.attempts, d.next_at, d.last_at,
    nullif(d.last_status, 0) AS last_status, d.last_problem
FROM webhook_deliveries AS d
LEFT JOIN alerts AS a ON a.number = d.number;
