"""What operators may do with API keys, blocking. Generated from `_aio_keys.py`; do not edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peculium import _key_codec as codec
from peculium._ids import id_text
from peculium._limits import PAGE_SIZE_MAX
from peculium._sync_sender import Sender
from peculium.apikeys import ApiKey, KeyInfo, NewKey, Role
from peculium.capability import BudgetRef
from peculium.errors import KeyUnknown
from peculium.values import Seconds


class Keys:
    """API keys: who may call the ledger, as what, and until when.

    A key's text is made here and told to nobody: the ledger gets a digest of it.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    def create(
        self,
        principal: str,
        *,
        roles: Sequence[Role] = (Role.AGENT,),
        roots: Sequence[BudgetRef | bytes] | None = None,
        label: str = "",
        lifetime: Seconds | None = None,
        timeout: float | None = None,
    ) -> NewKey:
        """Make a key.

        Args:
            principal: Who is to call with it: 1 to 256 bytes.
            roles: As what.
            roots: The roots that it is limited to, at most 100; None: all, also those to come.
            label: What it is for, up to 256 bytes.
            lifetime: How long it is valid; None: until it is revoked.
            timeout: In seconds.

        Raises:
            PermissionDenied: The caller is no admin, or is limited to some roots itself.
        """
        key = ApiKey.new()
        request = codec.create(key, principal, roles, roots, label, lifetime)
        response = self._sender.unary(
            self._sender.admin.CreateKey,
            request,
            timeout,
            operation_id=id_text(request.operation_id),
        )
        return NewKey(codec.info(response.key), key)

    def list(
        self,
        principal: str | None = None,
        *,
        page_size: int = PAGE_SIZE_MAX,
        timeout: float | None = None,
    ) -> Iterator[KeyInfo]:
        """List the keys and all that was done to them, expired and revoked ones included.

        Args:
            principal: Of this one only.
            page_size: How many are fetched at once, 1 to 1000.
            timeout: For each page, in seconds.

        Raises:
            PermissionDenied: The caller is neither admin nor auditor, or is limited to some roots.
        """
        request = codec.listed(principal, None, page_size)
        while True:
            page = self._sender.unary(self._sender.admin.ListKeys, request, timeout)
            for key in page.keys:
                yield codec.info(key)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def show(self, key_id: str | bytes, *, timeout: float | None = None) -> KeyInfo:
        """Tell of one key what it is, and what was done to it.

        Args:
            key_id: Its id.
            timeout: In seconds.

        Raises:
            KeyUnknown: There is none.
            PermissionDenied: The caller is neither admin nor auditor, or is limited to some roots.
        """
        request = codec.listed(None, key_id, 1)
        page = self._sender.unary(self._sender.admin.ListKeys, request, timeout)
        if not page.keys:
            raise KeyUnknown("There is no such API key.", facts={"key": id_text(request.key_id)})
        return codec.info(page.keys[0])

    def rotate(
        self,
        key_id: str | bytes,
        *,
        overlap: Seconds,
        lifetime: Seconds | None = None,
        timeout: float | None = None,
    ) -> NewKey:
        """Give a key a new text.

        Args:
            key_id: Its id.
            overlap: How long the text before stays valid, up to 30 days; 0: not at all.
            lifetime: How long the key is valid from now; None: as long as before.
            timeout: In seconds.

        Raises:
            KeyUnknown: There is none.
            KeyEnded: It was revoked, or has expired.
            PermissionDenied: The caller is no admin, or is limited to some roots itself.
        """
        key = ApiKey.new(codec.id_of(key_id))
        request = codec.rotate(key, overlap, lifetime)
        response = self._sender.unary(
            self._sender.admin.RotateKey,
            request,
            timeout,
            operation_id=id_text(request.operation_id),
        )
        return NewKey(codec.info(response.key), key)

    def revoke(
        self, key_id: str | bytes, reason: str = "", *, timeout: float | None = None
    ) -> KeyInfo:
        """End a key with all its texts: at once on the server that answers, in two seconds on all others.

        Args:
            key_id: Its id.
            reason: Why, up to 512 bytes.
            timeout: In seconds.

        Raises:
            KeyUnknown: There is none.
            KeyEnded: It was revoked before.
            PermissionDenied: The caller is no admin, or is limited to some roots itself.
        """
        request = codec.revoke(key_id, reason)
        response = self._sender.unary(
            self._sender.admin.RevokeKey,
            request,
            timeout,
            operation_id=id_text(request.operation_id),
        )
        return codec.info(response.key)
