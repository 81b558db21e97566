-- As in 0004, but for the incarnation, which is that of the checkpoint: those of before have the first one.
CREATE OR REPLACE VIEW audit.checkpoints AS
SELECT
    c.number, c.sealed_at, coalesce(c.incarnation, l.incarnation) AS incarnation, c.positions,
    (SELECT sum(each)::bigint FROM unnest(c.positions) AS each) AS operations,
    c.merkle_root, c.leaves, c.previous_hash, c.hash, c.key_id, c.signature, k.public_key,
    'peculium.checkpoint.v1'::bytea || '\x00'::bytea || audit.item(4, 7)
        || audit.item(0, c.number)
        || audit.item(0, (extract(epoch FROM c.sealed_at) * 1000000)::bigint)
        || audit.item(2, 16) || uuid_send(coalesce(c.incarnation, l.incarnation))
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
