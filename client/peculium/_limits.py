"""What a request may carry: the bounds of the wire, checked here so that a mistake costs no call."""

from __future__ import annotations

AMOUNT_MAX = 2**62 - 1
"""The largest amount that a request may name, in the tree's unit."""

OPERATIONS_MAX = 256
"""Operations in one batch."""

REQUEST_BYTES_MAX = 1024 * 1024
"""A batch is sent before it grows beyond this; an operation that is larger travels alone."""

MESSAGE_BYTES_MAX = 4 * 1024 * 1024
"""The largest message that is sent or taken."""

CHILDREN_MAX = 256
"""Children of one Delegate."""

ROTATIONS_MAX = 256
"""Holds that one Recover rotates."""

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
OVERRUN_FACTOR_MAX = 1000

KEY_LABEL_BYTES_MAX = 256
KEY_ROOTS_MAX = 100

ID_BYTES = 16
SECRET_BYTES = 32
TOKEN_ID_BYTES = 32

SECOND_US = 1_000_000
HOLD_TTL_US_MIN = 1 * SECOND_US
HOLD_TTL_US_MAX = 7 * 86_400 * SECOND_US
LEASE_US_MIN = 1 * SECOND_US
LEASE_US_MAX = 3_660 * 86_400 * SECOND_US
KEY_LIFETIME_US_MIN = 1 * SECOND_US
KEY_LIFETIME_US_MAX = 3_660 * 86_400 * SECOND_US
KEY_OVERLAP_US_MAX = 30 * 86_400 * SECOND_US

PAGE_SIZE_MAX = 1000
