-- What auditors read. Views have their owner's rights, functions those of whoever calls, who has none on
-- the tables: so functions read views only. Nothing here has the token of a budget or hold; of a token,
-- that it was consumed, or its fingerprint. The lane is in each view, so that joins stay within it.

CREATE FUNCTION audit.kind(number smallint) RETURNS text
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN coalesce((ARRAY[
    'GRANT', 'TOP_UP', 'WITHDRAW', 'RESERVE', 'SETTLE', 'RELEASE', 'EXTEND', 'SPEND', 'DELEGATE',
    'ACCEPT', 'RECOVER', 'FUND', 'RENEW', 'RETURN', 'REVOKE', 'RESOLVE', 'FREEZE', 'UNFREEZE', 'LAPSE',
    'EXPIRE', 'COLLECT'
])[number], number::text);

CREATE FUNCTION audit.instant(microseconds bigint) RETURNS timestamptz
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN timestamptz 'epoch' + microseconds * interval '1 microsecond';

CREATE VIEW audit.paths AS
SELECT
    lane, root_id, budget_id,
    (
        SELECT string_agg(above.name, '/' ORDER BY cardinality(above.ancestors))
        FROM budgets AS above
        WHERE above.lane = budgets.lane AND above.root_id = budgets.root_id
            AND above.budget_id = ANY (budgets.ancestors || budgets.budget_id)
    ) AS path
FROM budgets;

CREATE VIEW audit.budgets AS
SELECT
    r.name AS root,
    (
        SELECT p.path FROM audit.paths AS p
        WHERE p.lane = b.lane AND p.root_id = b.root_id AND p.budget_id = b.budget_id
    ) AS path,
    b.lane, b.root_id, b.budget_id, b.parent_id, b.ancestors, cardinality(b.ancestors) AS depth,
    b.name, b.unit,
    (
        SELECT (ARRAY['OPEN', 'FROZEN', 'EXPIRED', 'CLOSED'])[max(
            CASE
                WHEN above.closed THEN 4
                WHEN above.lease_until <= statement_timestamp() THEN 3
                WHEN above.frozen OR above.disputes > 0 THEN 2
                ELSE 1
            END
        )]
        FROM budgets AS above
        WHERE above.lane = b.lane AND above.root_id = b.root_id
            AND above.budget_id = ANY (b.ancestors || b.budget_id)
    ) AS state,
    b.closed, b.frozen, b.disputes, b.disputed,
    (ARRAY['TOKEN', 'PRINCIPAL'])[b.custody] AS custody, b.holder,
    b.granted, b.available, b.held, b.delegated, b.spent, b.forfeited, b.overrun, b.advanced,
    b.holds_live, b.overrun_factor, b.lease_until, b.lease_latest, b.labels,
    b.created_at, b.last_at, b.seq, b.version, b.head
FROM budgets AS b
LEFT JOIN roots AS r ON r.lane = b.lane AND r.root_id = b.root_id;

CREATE VIEW audit.subtrees AS
SELECT
    r.name AS root,
    (
        SELECT p.path FROM audit.paths AS p
        WHERE p.lane = b.lane AND p.root_id = b.root_id AND p.budget_id = b.budget_id
    ) AS path,
    b.lane, b.root_id, b.budget_id, b.unit, below.budgets, below.used, below.disputed, below.in_flight
FROM budgets AS b
LEFT JOIN roots AS r ON r.lane = b.lane AND r.root_id = b.root_id
CROSS JOIN LATERAL (
    WITH RECURSIVE below AS (
        SELECT b.budget_id, b.spent, b.forfeited, b.disputed, b.held
        UNION ALL
        SELECT child.budget_id, child.spent, child.forfeited, child.disputed, child.held
        FROM below
        JOIN budgets AS child
            ON child.lane = b.lane AND child.root_id = b.root_id AND child.parent_id = below.budget_id
    )
    SELECT
        count(*) AS budgets, sum(spent) + sum(forfeited) AS used, sum(disputed) AS disputed,
        sum(held) AS in_flight
    FROM below
) AS below;

CREATE VIEW audit.holds AS
SELECT
    r.name AS root,
    (
        SELECT p.path FROM audit.paths AS p
        WHERE p.lane = h.lane AND p.root_id = h.root_id AND p.budget_id = h.budget_id
    ) AS path,
    h.lane, h.root_id, h.budget_id, h.hold_id,
    (ARRAY['LIVE', 'LAPSED', 'SETTLED', 'RELEASED', 'DISPUTED'])[h.state] AS state,
    h.amount, h.remaining, h.booked, h.disputed, h.created_at, h.expires_at
FROM holds AS h
LEFT JOIN roots AS r ON r.lane = h.lane AND r.root_id = h.root_id;

-- OFFSET 0: what is decoded is decoded once for a row, and not at all where nothing of it is asked for.
CREATE VIEW audit.entries AS
SELECT
    r.name AS root,
    (
        SELECT p.path FROM audit.paths AS p
        WHERE p.lane = e.lane AND p.root_id = e.root_id AND p.budget_id = e.budget_id
    ) AS path,
    e.lane, e.root_id, e.budget_id, e.seq, e.position, e.part, e.parts, e.operation_id,
    audit.kind(e.kind) AS kind, e.at, e.principal, encode(e.trace_id, 'hex') AS trace_id,
    e.consumed, audit.fingerprint(e.consumed) AS consumed_token,
    CASE
        WHEN e.part = 0 THEN coalesce(asked.request ->> 'next_token', asked.request ->> 'token')
        ELSE jsonb_path_query_first(
            asked.request, '$.children[*] ? (@.budget_id == $id).token',
            jsonb_build_object('id', e.budget_id)
        ) #>> '{}'
    END AS produced_token,
    e.amount, e.granted, e.available, e.held, coalesce(e.delegated, 0) AS delegated, e.spent,
    coalesce(e.forfeited, 0) AS forfeited, coalesce(e.overrun, 0) AS overrun,
    coalesce(e.advanced, 0) AS advanced,
    coalesce((done.effect -> 'changes' ->> 'granted')::bigint, 0) AS granted_change,
    coalesce((done.effect -> 'changes' ->> 'available')::bigint, 0) AS available_change,
    coalesce((done.effect -> 'changes' ->> 'held')::bigint, 0) AS held_change,
    coalesce((done.effect -> 'changes' ->> 'delegated')::bigint, 0) AS delegated_change,
    coalesce((done.effect -> 'changes' ->> 'spent')::bigint, 0) AS spent_change,
    coalesce((done.effect -> 'changes' ->> 'forfeited')::bigint, 0) AS forfeited_change,
    coalesce((done.effect -> 'changes' ->> 'overrun')::bigint, 0) AS overrun_change,
    coalesce((done.effect -> 'changes' ->> 'advanced')::bigint, 0) AS advanced_change,
    coalesce((done.effect ->> 'disputed')::bigint, 0) AS disputed,
    coalesce((done.effect ->> 'closed')::boolean, false) AS closed,
    coalesce((done.effect ->> 'frozen')::boolean, false) AS frozen,
    audit.instant((done.effect ->> 'lease_until')::bigint) AS lease_until,
    (done.effect -> 'hold' ->> 'hold_id')::uuid AS hold_id,
    done.effect -> 'hold' ->> 'state' AS hold_state,
    asked.request ->> 'authority' AS authority,
    coalesce(asked.request -> 'labels', '{}') AS labels,
    asked.request ->> 'reference' AS reference, asked.request ->> 'reason' AS reason,
    asked.request, done.effect, e.digest, e.hash
FROM entries AS e
LEFT JOIN roots AS r ON r.lane = e.lane AND r.root_id = e.root_id
CROSS JOIN LATERAL (
    SELECT audit.request(coalesce(e.request, (
        SELECT first.request FROM entries AS first
        WHERE first.lane = e.lane AND first.root_id = e.root_id
            AND first.operation_id = e.operation_id AND first.part = 0
    ))) AS request
    OFFSET 0
) AS asked
CROSS JOIN LATERAL (SELECT audit.effect(e.effect) AS effect OFFSET 0) AS done;

-- A change is the difference from the budget's entry before, which is quicker than to decode it.
CREATE VIEW audit.statements AS
SELECT
    moved.root,
    (
        SELECT p.path FROM audit.paths AS p
        WHERE p.lane = moved.lane AND p.root_id = moved.root_id AND p.budget_id = moved.budget_id
    ) AS path,
    moved.lane, moved.root_id, moved.budget_id, moved.day, moved.kind, moved.operations, moved.entries,
    moved.granted, moved.available, moved.held, moved.delegated, moved.spent, moved.forfeited,
    moved.overrun, moved.advanced
FROM (
    SELECT
        root, lane, root_id, budget_id, (at AT TIME ZONE 'UTC')::date AS day, kind,
        count(DISTINCT operation_id) AS operations, count(*) AS entries,
        sum(granted) AS granted, sum(available) AS available, sum(held) AS held,
        sum(delegated) AS delegated, sum(spent) AS spent, sum(forfeited) AS forfeited,
        sum(overrun) AS overrun, sum(advanced) AS advanced
    FROM (
        SELECT
            root, lane, root_id, budget_id, at, kind, operation_id,
            granted - lag(granted, 1, 0::bigint) OVER history AS granted,
            available - lag(available, 1, 0::bigint) OVER history AS available,
            held - lag(held, 1, 0::bigint) OVER history AS held,
            delegated - lag(delegated, 1, 0::bigint) OVER history AS delegated,
            spent - lag(spent, 1, 0::bigint) OVER history AS spent,
            forfeited - lag(forfeited, 1, 0::bigint) OVER history AS forfeited,
            overrun - lag(overrun, 1, 0::bigint) OVER history AS overrun,
            advanced - lag(advanced, 1, 0::bigint) OVER history AS advanced
        FROM audit.entries
        WINDOW history AS (PARTITION BY root, lane, root_id, budget_id ORDER BY seq)
    ) AS change
    GROUP BY root, lane, root_id, budget_id, day, kind
) AS moved;

CREATE VIEW audit.usage AS
SELECT
    used.root,
    (
        SELECT p.path FROM audit.paths AS p
        WHERE p.lane = used.lane AND p.root_id = used.root_id AND p.budget_id = used.budget_id
    ) AS path,
    used.lane, used.root_id, used.budget_id, used.day, used.principal, used.provider, used.model,
    used.labels, used.operations, used.spent, used.forfeited, used.estimated, used.input_tokens,
    used.output_tokens, used.cached_tokens
FROM (
    SELECT
        e.root, e.lane, e.root_id, e.budget_id, (e.at AT TIME ZONE 'UTC')::date AS day, e.principal,
        coalesce(e.request -> 'usage' ->> 'provider', '') AS provider,
        coalesce(e.request -> 'usage' ->> 'model', given.labels ->> 'model', '') AS model,
        given.labels,
        count(*) FILTER (WHERE e.part = 0 AND e.kind IN ('SETTLE', 'SPEND', 'RESOLVE')) AS operations,
        sum(e.spent_change) AS spent, sum(e.forfeited_change) AS forfeited,
        count(*) FILTER (WHERE e.part = 0 AND (e.request ->> 'estimated')::boolean) AS estimated,
        coalesce(sum((e.request -> 'usage' ->> 'input_tokens')::bigint) FILTER (WHERE e.part = 0), 0)
            AS input_tokens,
        coalesce(sum((e.request -> 'usage' ->> 'output_tokens')::bigint) FILTER (WHERE e.part = 0), 0)
            AS output_tokens,
        coalesce(sum((e.request -> 'usage' ->> 'cached_tokens')::bigint) FILTER (WHERE e.part = 0), 0)
            AS cached_tokens
    FROM audit.entries AS e
    CROSS JOIN LATERAL (
        SELECT coalesce((
            SELECT jsonb_object_agg(label.key, label.value ORDER BY cardinality(above.ancestors))
            FROM budgets AS b
            JOIN budgets AS above
                ON above.lane = b.lane AND above.root_id = b.root_id
                AND above.budget_id = ANY (b.ancestors || b.budget_id)
            CROSS JOIN jsonb_each(above.labels) AS label
            WHERE b.lane = e.lane AND b.root_id = e.root_id AND b.budget_id = e.budget_id
        ), '{}') || e.labels AS labels
        OFFSET 0
    ) AS given
    WHERE e.kind IN ('SETTLE', 'SPEND', 'RESOLVE', 'LAPSE', 'RELEASE')
        AND (e.part = 0 OR e.spent_change <> 0 OR e.forfeited_change <> 0)
    GROUP BY
        e.root, e.lane, e.root_id, e.budget_id, day, e.principal, provider, model, given.labels
) AS used
WHERE used.operations > 0 OR used.spent <> 0 OR used.forfeited <> 0;

CREATE VIEW audit.lineage AS
SELECT
    r.name AS root,
    (
        SELECT p.path FROM audit.paths AS p
        WHERE p.lane = b.lane AND p.root_id = b.root_id AND p.budget_id = b.budget_id
    ) AS path,
    b.lane, b.root_id, b.budget_id, cardinality(above.ancestors) AS depth, above.budget_id AS above_id,
    (
        SELECT p.path FROM audit.paths AS p
        WHERE p.lane = above.lane AND p.root_id = above.root_id AND p.budget_id = above.budget_id
    ) AS above_path,
    made.at AS made_at, first.principal AS made_by,
    audit.request(first.request) ->> 'authority' AS authority,
    audit.fingerprint(first.consumed) AS consumed_token,
    audit.kind(first.kind) AS kind, first.operation_id, made.granted AS amount
FROM budgets AS b
LEFT JOIN roots AS r ON r.lane = b.lane AND r.root_id = b.root_id
JOIN budgets AS above
    ON above.lane = b.lane AND above.root_id = b.root_id
    AND above.budget_id = ANY (b.ancestors || b.budget_id)
LEFT JOIN LATERAL (
    SELECT e.at, e.operation_id, e.granted FROM entries AS e
    WHERE e.lane = b.lane AND e.root_id = b.root_id AND e.budget_id = above.budget_id
        AND e.seq >> 6 = 0 AND e.seq = 1
    OFFSET 0
) AS made ON true
LEFT JOIN LATERAL (
    SELECT e.principal, e.request, e.consumed, e.kind, e.operation_id FROM entries AS e
    WHERE e.lane = b.lane AND e.root_id = b.root_id AND e.operation_id = made.operation_id
        AND e.part = 0
    OFFSET 0
) AS first ON true;

-- The head of an item of deterministic CBOR: what the item is, and its number or how long it is.
CREATE FUNCTION audit.item(major integer, argument bigint) RETURNS bytea
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE
    WHEN argument < 24 THEN substr(int4send(major * 32 + argument::integer), 4)
    WHEN argument < 256 THEN substr(int4send(major * 32 + 24), 4) || substr(int8send(argument), 8)
    WHEN argument < 65536 THEN substr(int4send(major * 32 + 25), 4) || substr(int8send(argument), 7)
    WHEN argument < 4294967296 THEN substr(int4send(major * 32 + 26), 4) || substr(int8send(argument), 5)
    ELSE substr(int4send(major * 32 + 27), 4) || int8send(argument)
END;

CREATE VIEW audit.checkpoints AS
SELECT
    c.number, c.sealed_at, l.incarnation, c.positions,
    (SELECT sum(each)::bigint FROM unnest(c.positions) AS each) AS operations,
    c.merkle_root, c.leaves, c.previous_hash, c.hash, c.key_id, c.signature, k.public_key,
    'peculium.checkpoint.v1'::bytea || '\x00'::bytea || audit.item(4, 7)
        || audit.item(0, c.number)
        || audit.item(0, (extract(epoch FROM c.sealed_at) * 1000000)::bigint)
        || audit.item(2, 16) || uuid_send(l.incarnation)
        || audit.item(4, cardinality(c.positions)) || (
            SELECT string_agg(audit.item(0, lane.position), ''::bytea ORDER BY lane.nth)
            FROM unnest(c.positions) WITH ORDINALITY AS lane (position, nth)
        )
        || audit.item(2, octet_length(c.merkle_root)) || c.merkle_root
        || audit.item(0, c.leaves)
        || audit.item(2, octet_length(c.previous_hash)) || c.previous_hash AS hashed,
    'peculium.checkpoint-signature.v1'::bytea || '\x00'::bytea || c.hash AS signed
FROM checkpoints AS c
CROSS JOIN ledger AS l
LEFT JOIN checkpoint_keys AS k ON k.key_id = c.key_id;

-- OFFSET 0 here: one look-up by the index for each budget, in its lane, however the planner would join.
CREATE FUNCTION audit.budget(place text)
RETURNS TABLE (lane smallint, root_id uuid, budget_id uuid)
LANGUAGE sql STABLE STRICT PARALLEL SAFE
BEGIN ATOMIC
    WITH RECURSIVE line AS (
        SELECT b.lane, b.root_id, b.budget_id, 1 AS names
        FROM audit.budgets AS b
        WHERE b.root = split_part(place, '/', 1) AND b.budget_id = b.root_id
        UNION ALL
        SELECT child.*, line.names + 1
        FROM line
        CROSS JOIN LATERAL (
            SELECT b.lane, b.root_id, b.budget_id
            FROM audit.budgets AS b
            WHERE b.lane = line.lane AND b.root_id = line.root_id AND b.parent_id = line.budget_id
                AND b.name = split_part(place, '/', line.names + 1)
            OFFSET 0
        ) AS child
    )
    SELECT line.lane, line.root_id, line.budget_id
    FROM line
    WHERE line.names = cardinality(string_to_array(place, '/'));
END;

CREATE FUNCTION audit.subtree(top text)
RETURNS TABLE (lane smallint, root_id uuid, budget_id uuid, path text, depth integer)
LANGUAGE sql STABLE STRICT PARALLEL SAFE
BEGIN ATOMIC
    WITH RECURSIVE below AS (
        SELECT
            b.lane, b.root_id, b.budget_id, top COLLATE "C" AS path,
            cardinality(string_to_array(top, '/')) - 1 AS depth
        FROM audit.budget(top) AS b
        UNION ALL
        SELECT child.lane, child.root_id, child.budget_id, below.path || '/' || child.name, below.depth + 1
        FROM below
        CROSS JOIN LATERAL (
            SELECT b.lane, b.root_id, b.budget_id, b.name
            FROM audit.budgets AS b
            WHERE b.lane = below.lane AND b.root_id = below.root_id AND b.parent_id = below.budget_id
            OFFSET 0
        ) AS child
    )
    SELECT below.lane, below.root_id, below.budget_id, below.path, below.depth FROM below;
END;

CREATE FUNCTION audit.as_of(top text, moment timestamptz)
RETURNS TABLE (
    path text, root_id uuid, budget_id uuid, seq bigint, last_at timestamptz, closed boolean,
    frozen boolean, granted bigint, available bigint, held bigint, delegated bigint, spent bigint,
    forfeited bigint, overrun bigint, advanced bigint, disputed bigint
)
LANGUAGE sql STABLE STRICT PARALLEL SAFE
BEGIN ATOMIC
    SELECT
        b.path, b.root_id, b.budget_id, last.seq, last.at, last.closed, last.frozen, last.granted,
        last.available, last.held, last.delegated, last.spent, last.forfeited, last.overrun,
        last.advanced, last.disputed
    FROM audit.subtree(top) AS b
    CROSS JOIN LATERAL (
        SELECT e.* FROM audit.entries AS e
        WHERE e.lane = b.lane AND e.root_id = b.root_id AND e.budget_id = b.budget_id
            AND e.at <= moment
        ORDER BY e.seq >> 6 DESC, e.seq DESC
        LIMIT 1
    ) AS last;
END;

-- A subtree is told as one account: what it was granted, its overrun and what was advanced to it are those
-- of its top, and what its budgets have delegated to each other is inside of it. So its money adds up as
-- that of a budget does.
CREATE FUNCTION audit.statement(
    top text, since timestamptz DEFAULT '-infinity', until timestamptz DEFAULT 'infinity',
    subtree boolean DEFAULT false
)
RETURNS TABLE (
    line text, operations bigint, entries bigint, granted numeric, available numeric, held numeric,
    delegated numeric, spent numeric, forfeited numeric, overrun numeric, advanced numeric
)
LANGUAGE sql STABLE STRICT PARALLEL SAFE
BEGIN ATOMIC
    WITH counted AS (
        SELECT
            e.budget_id, e.seq, e.at, e.kind, e.operation_id, e.available, e.held, e.spent, e.forfeited,
            CASE WHEN b.path = top THEN e.granted ELSE 0 END AS granted,
            CASE WHEN subtree THEN 0 ELSE e.delegated END AS delegated,
            CASE WHEN b.path = top THEN e.overrun ELSE 0 END AS overrun,
            CASE WHEN b.path = top THEN e.advanced ELSE 0 END AS advanced
        FROM audit.subtree(top) AS b
        CROSS JOIN LATERAL (
            SELECT
                e.budget_id, e.seq, e.at, e.kind, e.operation_id, e.granted, e.available, e.held,
                e.delegated, e.spent, e.forfeited, e.overrun, e.advanced
            FROM audit.entries AS e
            WHERE e.lane = b.lane AND e.root_id = b.root_id AND e.budget_id = b.budget_id
                AND e.at < until
            OFFSET 0
        ) AS e
        WHERE subtree OR b.path = top
    ), history AS (
        SELECT
            c.*, lead(c.at) OVER later AS next_at,
            c.granted - lag(c.granted, 1, 0::bigint) OVER later AS granted_change,
            c.available - lag(c.available, 1, 0::bigint) OVER later AS available_change,
            c.held - lag(c.held, 1, 0::bigint) OVER later AS held_change,
            c.delegated - lag(c.delegated, 1, 0::bigint) OVER later AS delegated_change,
            c.spent - lag(c.spent, 1, 0::bigint) OVER later AS spent_change,
            c.forfeited - lag(c.forfeited, 1, 0::bigint) OVER later AS forfeited_change,
            c.overrun - lag(c.overrun, 1, 0::bigint) OVER later AS overrun_change,
            c.advanced - lag(c.advanced, 1, 0::bigint) OVER later AS advanced_change
        FROM counted AS c
        WINDOW later AS (PARTITION BY c.budget_id ORDER BY c.seq)
    ), lines AS (
        SELECT
            bound.nth, bound.line, NULL::bigint AS operations, NULL::bigint AS entries,
            coalesce(sum(h.granted), 0) AS granted, coalesce(sum(h.available), 0) AS available,
            coalesce(sum(h.held), 0) AS held, coalesce(sum(h.delegated), 0) AS delegated,
            coalesce(sum(h.spent), 0) AS spent, coalesce(sum(h.forfeited), 0) AS forfeited,
            coalesce(sum(h.overrun), 0) AS overrun, coalesce(sum(h.advanced), 0) AS advanced
        FROM (VALUES ('OPENING', 1, since), ('CLOSING', 3, until)) AS bound (line, nth, moment)
        LEFT JOIN history AS h
            ON h.at < bound.moment AND (h.next_at IS NULL OR h.next_at >= bound.moment)
        GROUP BY bound.nth, bound.line
        UNION ALL
        SELECT
            2, h.kind, count(DISTINCT h.operation_id), count(*),
            sum(h.granted_change), sum(h.available_change), sum(h.held_change),
            sum(h.delegated_change), sum(h.spent_change), sum(h.forfeited_change),
            sum(h.overrun_change), sum(h.advanced_change)
        FROM history AS h
        WHERE h.at >= since
        GROUP BY h.kind
    )
    SELECT
        lines.line, lines.operations, lines.entries, lines.granted, lines.available, lines.held,
        lines.delegated, lines.spent, lines.forfeited, lines.overrun, lines.advanced
    FROM lines
    ORDER BY lines.nth, lines.line;
END;
