"""Large trees in no time: a few spends are done, and copied in the database.

Hashes, balances and rows of budgets are not those of a ledger then: it is for reads that do not look at them.
"""

from __future__ import annotations

import psycopg
from psycopg import sql

SHIFTED = {
    "position": sql.SQL("position + copy * {spends}"),
    "seq": sql.SQL("seq + copy * {of_each}"),
    "operation_id": sql.SQL("gen_random_uuid()"),
}


def multiply(dsn: str, spends: int, of_each: int, copies: int) -> int:
    """Copy the spends of a ledger's only tree, which are the last that was done in it.

    Args:
        dsn: Of the database's owner.
        spends: How many there are, by budgets that their principals hold.
        of_each: How many of them are of each budget.
        copies: How many times as many there are to be.

    Returns:
        How many entries there are then.
    """
    numbers = {"spends": sql.Literal(spends), "of_each": sql.Literal(of_each)}
    with psycopg.connect(dsn, autocommit=True) as connection:
        described = connection.execute("SELECT * FROM entries LIMIT 0").description or ()
        columns = [
            SHIFTED[each.name].format(**numbers)
            if each.name in SHIFTED
            else sql.Identifier(each.name)
            for each in described
        ]
        connection.execute(
            sql.SQL(
                "INSERT INTO entries SELECT {} FROM entries, generate_series(1, {}) AS copy"
                " WHERE consumed IS NULL AND parts = 1 AND kind = 8 ORDER BY copy, position"
            ).format(sql.SQL(", ").join(columns), sql.Literal(copies - 1))
        )
        connection.execute("UPDATE lanes SET position = position + %s WHERE position > 0", [
            spends * (copies - 1)
        ])  # fmt: skip
        connection.execute(
            "UPDATE budgets SET seq = seq + %s WHERE seq > %s", [of_each * (copies - 1), of_each]
        )
        connection.execute("VACUUM (ANALYZE)")
        ((entries,),) = connection.execute("SELECT count(*) FROM entries").fetchall()
    return int(entries)
