"""The right to spend, as something to hand over, and the reference that carries no right at all."""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, Self, SupportsIndex

from peculium._ids import id_text, new_secret, token_id
from peculium._limits import ID_BYTES, SECRET_BYTES
from peculium.errors import CapabilityMoved, Malformed, NotCopyable

PREFIX = "pec_"
"""How every capability begins, so that secret scanners find it."""

_VERSION = 1
_BODY_BYTES = 1 + ID_BYTES + ID_BYTES + SECRET_BYTES
_CHECKSUM_BYTES = 4
# 69 bytes are 23 groups of three: the text has no padding and no unused bits.
_TEXT_CHARACTERS = (_BODY_BYTES + _CHECKSUM_BYTES) * 4 // 3

_TEXT = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class BudgetRef:
    """Which budget, without any authority over it. Can be copied, pickled, stored and logged.

    Attributes:
        path: Names from the root downwards, joined by "/"; empty where only the ids are known.
        root_id: The tree's root, 16 bytes.
        budget_id: The budget, 16 bytes.
    """

    path: str
    root_id: bytes
    budget_id: bytes

    def __str__(self) -> str:
        return self.path or id_text(self.budget_id)

    def __repr__(self) -> str:
        return f"BudgetRef({self.path!r}, {id_text(self.budget_id)})"


class Affine:
    """Refuses to be copied or pickled: the guarantee is that authority exists once."""

    __slots__ = ()

    def __copy__(self) -> NoReturn:
        self._refuse("copied")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse("copied")

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        self._refuse("pickled")

    def __reduce__(self) -> NoReturn:
        self._refuse("pickled")

    def _refuse(self, what: str) -> NoReturn:
        raise NotCopyable(
            f"a {type(self).__name__} cannot be {what}: authority to spend exists once; "
            "a BudgetRef (`.ref`) names the same budget without authority"
        )


class Capability(Affine):
    """The right to spend from one budget, on its way from one owner to the next.

    `str()` and `repr()` show which budget, never the secret; `reveal()` shows everything. Whoever
    accepts it first owns the budget; the text is worthless from then on.
    """

    __slots__ = ("_left", "_moved", "_secret", "budget_id", "carrier", "path", "root_id")

    def __init__(
        self,
        *,
        root_id: bytes,
        budget_id: bytes,
        secret: bytes,
        path: str = "",
        left: Callable[[], None] | None = None,
        carrier: Mapping[str, str] | None = None,
    ) -> None:
        self._left = left
        self.carrier: Mapping[str, str] = carrier or {}
        """The W3C trace context to send beside it, for `accept(..., carrier=...)`; no part of the text."""
        self.root_id = root_id
        self.budget_id = budget_id
        self.path = path
        self._secret: bytes = secret
        self._moved: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `reveal()` wrote. Space around it does not matter.

        Raises:
            Malformed: It has another beginning, length, alphabet, version or checksum. The message
                does not repeat the text.
        """
        if not isinstance(text, str):
            raise _malformed(f"is text, not {type(text).__name__}")
        text = text.strip()
        if not text.startswith(PREFIX):
            raise _malformed(f'begins with "{PREFIX}"')
        encoded = text.removeprefix(PREFIX)
        if len(encoded) != _TEXT_CHARACTERS:
            raise _malformed(
                f'has {_TEXT_CHARACTERS} characters after "{PREFIX}", this one {len(encoded)}'
            )
        # The decoder would also take "+", "/" and "=": then one capability had several texts.
        if not _TEXT.fullmatch(encoded):
            raise _malformed('consists of letters, digits, "-" and "_"')
        data = base64.urlsafe_b64decode(encoded)
        body, checksum = data[:_BODY_BYTES], data[_BODY_BYTES:]
        if _checksum(body) != checksum:
            raise _malformed("has a checksum, and this one is wrong: was it cut or mistyped?")
        if body[0] != _VERSION:
            raise _malformed(f"of version {body[0]} needs a newer peculium")
        ids, secret = body[1:-SECRET_BYTES], body[-SECRET_BYTES:]
        return cls(root_id=ids[:ID_BYTES], budget_id=ids[ID_BYTES:], secret=secret)

    def reveal(self) -> str:
        """The whole capability as text, secret included: to be sent to its receiver only.

        Raises:
            CapabilityMoved: It was accepted here.
        """
        if self._moved is not None:
            raise CapabilityMoved(f"the capability was accepted at {self._moved}", budget=str(self))
        if self._left is not None:
            self._left()
        body = bytes([_VERSION]) + self.root_id + self.budget_id + self._secret
        return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode("ascii")

    def take(self, where: str) -> bytes:
        """Take the secret out to use it, once: for the client that accepts the capability.

        Args:
            where: The place in the caller's code, for whoever tries again.

        Raises:
            CapabilityMoved: It was accepted here before.
        """
        if self._moved is not None:
            raise CapabilityMoved(f"the capability was accepted at {self._moved}", budget=str(self))
        self._moved = where
        return self._secret

    def put_back(self) -> None:
        """Undo `take`: nothing was done with the secret."""
        self._moved = None

    @property
    def ref(self) -> BudgetRef:
        """Which budget, without authority."""
        return BudgetRef(self.path, self.root_id, self.budget_id)

    def __str__(self) -> str:
        return f"capability for {self.ref}"

    def __repr__(self) -> str:
        return f"<Capability for {self.ref}>"


class Receiver(Affine):
    """Makes the secret of a budget that is still to be delegated, so that the sender never knows it.

    Give `token_id` to the sender, who names it in `Child(receiver=...)` or `grant(receiver=...)` and
    answers with the new budget's `BudgetRef`; then accept `capability(ref)`.
    """

    __slots__ = ("_secret", "token_id")

    def __init__(self) -> None:
        self._secret: bytes | None = new_secret()
        self.token_id = token_id(self._secret)
        """What the sender needs; it reveals nothing about the secret. 32 bytes."""

    def capability(self, ref: BudgetRef) -> Capability:
        """The capability for the budget that was made for this receiver, once.

        Raises:
            CapabilityMoved: It was taken out before.
        """
        if self._secret is None:
            raise CapabilityMoved("the receiver's capability was taken out before", budget=str(ref))
        secret, self._secret = self._secret, None
        return Capability(
            root_id=ref.root_id, budget_id=ref.budget_id, secret=secret, path=ref.path
        )

    def __repr__(self) -> str:
        return f"<Receiver {self.token_id.hex()}>"


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(_CHECKSUM_BYTES)


def _malformed(problem: str) -> Malformed:
    return Malformed(f"a capability {problem}", facts={"field": "capability", "problem": problem})
