"""Every bound that a request or a balance has to keep, with its unit and its reason."""

from __future__ import annotations

AMOUNT_MAX = 2**62 - 1
"""The largest amount that a request may name, in the tree's unit.

Sums of two stay within the signed 64 bits of the wire and of the database.
"""

BALANCE_MAX = 2**62
"""No balance may pass this, in the tree's unit."""

DEPTH_MAX = 16
"""Levels of a tree, the root included: bounds what one decision has to read."""

OPERATIONS_MAX = 256
"""Operations in one batch: bounds a lane's transaction."""

CHILDREN_MAX = 256
"""Children of one Delegate: each is a budget row and an entry of the same transaction."""

ROTATIONS_MAX = 256
"""Holds that one Recover rotates: each is an entry of the same transaction."""

OPEN_HOLDS_MAX = ROTATIONS_MAX + OPERATIONS_MAX
"""Open holds of a budget that are loaded for a Recover, the lowest ids first: those that it lists, one
more to know that there are more, and one for each earlier operation of the transaction, which may
end one of them."""

EAGER_COLLECTIONS_MAX = 64
"""Budgets below a closed top that are emptied with the closing itself; Collect empties the rest."""

LABELS_MAX = 16
LABEL_KEY_BYTES_MAX = 64
LABEL_VALUE_BYTES_MAX = 256

NAME_BYTES_MAX = 128
PRINCIPAL_BYTES_MAX = 256
UNIT_BYTES_MAX = 32
REFERENCE_BYTES_MAX = 256
REASON_BYTES_MAX = 512
PROVIDER_BYTES_MAX = 128
USAGE_TOKENS_MAX = 2**53
"""The largest count of tokens that a usage report may name."""

OVERRUN_FACTOR_MAX = 1000

KEY_LABEL_BYTES_MAX = 256
KEY_ROOTS_MAX = 100
"""Trees that one key is limited to: they are looked through for each call."""

ID_BYTES = 16
SECRET_BYTES = 32
TOKEN_ID_BYTES = 32
KEY_DIGEST_BYTES = 32

SECOND_US = 1_000_000
HOLD_TTL_US_MIN = 1 * SECOND_US
HOLD_TTL_US_DEFAULT = 600 * SECOND_US
HOLD_AGE_US_MAX = 7 * 86_400 * SECOND_US
"""A hold lives at most a week: no model call does."""

LEASE_US_MIN = 1 * SECOND_US
LEASE_US_MAX = 3_660 * 86_400 * SECOND_US

OPERATION_AGE_US_MAX = 600 * SECOND_US
"""On a principal-held budget, where no token fences a delayed duplicate, an operation's UUIDv7 time
may differ from the database's by this much."""

KEY_LIFETIME_US_MIN = 1 * SECOND_US
KEY_LIFETIME_US_MAX = 3_660 * 86_400 * SECOND_US
KEY_OVERLAP_US_MAX = 30 * 86_400 * SECOND_US
"""A key that was rotated is valid beside the new one for a month at most: then it is two keys."""
