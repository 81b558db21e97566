-- What entries say, as JSON: docs/reference/entry-encoding.md. Nothing rests on it but what auditors read.

CREATE FUNCTION audit.fingerprint(token_id bytea) RETURNS text
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN encode(substr(sha256(token_id), 1, 8), 'hex');

-- A layout is how an item is told. An object has the names of a map's keys, or the words for a number's
-- values; a name may come with the layout of what it names, as {"name": …, "of": …}. An array of texts
-- has the names of an array's places; an array of a layout has that of each item. Null: as it is.
--
-- One loop over all items with a stack of what is open; of a map, keys and values are items by turns.
CREATE FUNCTION audit.decoded(encoded bytea, layout jsonb) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE
    size CONSTANT integer := octet_length(encoded);
    -- UTF-8 without the character that PostgreSQL's texts do not have, byte for byte.
    utf8 CONSTANT text := '^('
        '[\u0001-\u007f]|[\u00c2-\u00df][\u0080-\u00bf]|\u00e0[\u00a0-\u00bf][\u0080-\u00bf]|'
        '[\u00e1-\u00ec\u00ee\u00ef][\u0080-\u00bf]{2}|\u00ed[\u0080-\u009f][\u0080-\u00bf]|'
        '\u00f0[\u0090-\u00bf][\u0080-\u00bf]{2}|[\u00f1-\u00f3][\u0080-\u00bf]{3}|'
        '\u00f4[\u0080-\u008f][\u0080-\u00bf]{2})*$';
    deepest CONSTANT integer := 8;
    at integer := 0;
    told text := '';
    shape jsonb := layout;
    major integer;
    argument bigint;
    width integer;
    bytes bytea;
    item text;
    naming jsonb;
    -- The innermost that is open: what it is, its layout, how many items it lacks, and of how many.
    inside text := 'nothing';
    inner_layout jsonb;
    lacking bigint := 1;
    total bigint := 1;
    -- Those around it.
    depth integer := 0;
    insides text[];
    layouts jsonb[];
    lackings bigint[];
    totals bigint[];
BEGIN
    LOOP
        WHILE lacking = 0 AND depth > 0 LOOP
            told := told || CASE inside WHEN 'list' THEN ']' ELSE '}' END;
            inside := insides[depth];
            inner_layout := layouts[depth];
            lacking := lackings[depth];
            total := totals[depth];
            depth := depth - 1;
        END LOOP;
        EXIT WHEN lacking = 0;
        IF at >= size THEN
            RETURN NULL;
        END IF;
        major := get_byte(encoded, at) >> 5;
        argument := get_byte(encoded, at) & 31;
        at := at + 1;
        IF argument >= 24 AND major < 7 THEN
            width := 1 << (argument::integer - 24);
            IF argument > 27 OR width > size - at THEN
                RETURN NULL;
            END IF;
            argument := ('x' || lpad(encode(substr(encoded, at + 1, width), 'hex'), 16, '0'))::bit(64)::bigint;
            at := at + width;
            IF argument < 0 THEN
                RETURN NULL;
            END IF;
        END IF;

        IF inside = 'map' AND lacking % 2 = 0 THEN
            -- A key.
            IF lacking < total THEN
                told := told || ',';
            END IF;
            lacking := lacking - 1;
            IF major = 0 THEN
                naming := inner_layout -> argument::text;
                item := CASE jsonb_typeof(naming)
                    WHEN 'object' THEN naming ->> 'name'
                    WHEN 'string' THEN naming #>> '{}'
                    ELSE argument::text
                END;
                shape := naming -> 'of';
                told := told || '"' || item || '":';
                CONTINUE;
            ELSIF major <> 3 THEN
                RETURN NULL;
            END IF;
            shape := NULL;
        ELSIF inside = 'map' THEN
            lacking := lacking - 1;
        ELSE
            IF lacking < total THEN
                told := told || ',';
            END IF;
            IF inside = 'places' THEN
                told := told || '"' || coalesce(inner_layout ->> (total - lacking)::integer, (total - lacking)::text) || '":';
                shape := NULL;
            ELSIF inside = 'list' THEN
                shape := inner_layout -> 0;
            END IF;
            lacking := lacking - 1;
        END IF;

        CASE major
        WHEN 0 THEN
            item := coalesce(to_json(shape ->> argument::text)::text, argument::text);
        WHEN 1 THEN
            item := (-1 - argument)::text;
        WHEN 2, 3 THEN
            IF argument > size - at THEN
                RETURN NULL;
            END IF;
            bytes := substr(encoded, at + 1, argument::integer);
            at := at + argument::integer;
            IF major = 3 THEN
                IF position('\x00'::bytea IN bytes) > 0 OR convert_from(bytes, 'LATIN1') !~ utf8 THEN
                    RETURN NULL;
                END IF;
                item := to_json(convert_from(bytes, 'UTF8'))::text;
            ELSIF argument = 16 THEN
                item := '"' || encode(bytes, 'hex')::uuid || '"';
            ELSE
                -- A token's id. It may be the live one.
                item := '"' || audit.fingerprint(bytes) || '"';
            END IF;
        WHEN 4, 5 THEN
            depth := depth + 1;
            -- Each item takes a byte at least.
            IF depth > deepest OR argument > size - at THEN
                RETURN NULL;
            END IF;
            insides[depth] := inside;
            layouts[depth] := inner_layout;
            lackings[depth] := lacking;
            totals[depth] := total;
            inner_layout := shape;
            IF major = 5 THEN
                inside := 'map';
                argument := 2 * argument;
            ELSIF jsonb_typeof(shape) = 'array' AND jsonb_typeof(shape -> 0) = 'string' THEN
                inside := 'places';
            ELSE
                inside := 'list';
            END IF;
            lacking := argument;
            total := argument;
            told := told || CASE inside WHEN 'list' THEN '[' ELSE '{' END;
            CONTINUE;
        WHEN 7 THEN
            item := CASE argument WHEN 20 THEN 'false' WHEN 21 THEN 'true' WHEN 22 THEN 'null' END;
            IF item IS NULL THEN
                RETURN NULL;
            END IF;
        ELSE
            RETURN NULL;
        END CASE;
        told := told || item;
        IF inside = 'map' AND lacking % 2 = 1 THEN
            told := told || ':';
        END IF;
    END LOOP;
    RETURN CASE WHEN at = size THEN told::jsonb END;
END
$$;

CREATE FUNCTION audit.request(encoded bytea) RETURNS jsonb
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN audit.decoded(encoded, '{
    "1": {"name": "authority", "of": {"1": "TOKEN", "2": "HOLDER", "3": "ROLE"}},
    "2": "labels", "3": "amount", "4": "ttl_us", "5": "next_token", "6": "hold_id", "7": "hold_token",
    "8": "actual", "9": "keep_open", "10": "next_hold_token", "11": "reference",
    "12": {"name": "usage", "of": {
        "1": "provider", "2": "model", "3": "input_tokens", "4": "output_tokens", "5": "cached_tokens"
    }},
    "13": "estimated",
    "14": {"name": "children", "of": [{
        "2": "labels", "3": "amount", "15": "name", "17": "token", "18": "holder", "19": "lease_us",
        "20": "lease_latest_us", "21": "overrun_factor", "22": "budget_id"
    }]},
    "15": "name", "16": "unit", "17": "token", "18": "holder", "19": "lease_us", "20": "lease_latest_us",
    "21": "overrun_factor", "22": "budget_id",
    "23": {"name": "holds", "of": [["hold_id", "next_token"]]},
    "24": "descendant_id", "25": "cascade", "26": "reason",
    "27": {"name": "batch", "of": ["batch_id", "size"]},
    "28": "if_seq"
}'::jsonb);

CREATE FUNCTION audit.effect(encoded bytea) RETURNS jsonb
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN audit.decoded(encoded, '{
    "1": {"name": "changes", "of": {
        "1": "granted", "2": "available", "3": "held", "4": "delegated", "5": "spent", "6": "forfeited",
        "7": "overrun", "8": "advanced"
    }},
    "2": "disputed", "3": "disputes", "4": "holds_live", "5": "closed", "6": "frozen", "7": "lease_until",
    "8": "lease_latest", "9": "version", "10": "versions",
    "11": {"name": "hold", "of": {
        "1": "hold_id",
        "2": {"name": "state", "of": {
            "1": "LIVE", "2": "LAPSED", "3": "SETTLED", "4": "RELEASED", "5": "DISPUTED"
        }},
        "3": "amount", "4": "remaining", "5": "booked", "6": "disputed", "7": "created_at",
        "8": "expires_at"
    }},
    "12": "returned", "13": "pending",
    "14": {"name": "holds", "of": [{
        "1": "hold_id",
        "2": {"name": "state", "of": {
            "1": "LIVE", "2": "LAPSED", "3": "SETTLED", "4": "RELEASED", "5": "DISPUTED"
        }},
        "3": "amount", "4": "remaining", "5": "booked", "6": "disputed", "7": "created_at",
        "8": "expires_at"
    }]},
    "15": "holds_truncated"
}'::jsonb);
