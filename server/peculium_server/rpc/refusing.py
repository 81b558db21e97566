"""What auditors are told of refusals: how often which budget was refused what, by minute."""

from __future__ import annotations

import struct
from typing import Final, Protocol

from peculium.v1.audit_service_pb2 import ListRefusalsRequest, ListRefusalsResponse
from peculium_server.core.limits import ID_BYTES
from peculium_server.core.refusals import Refusal
from peculium_server.rpc.calls import CallRefused
from peculium_server.rpc.pages import page_token, read_page
from peculium_server.rpc.reading import Reader
from peculium_server.rpc.responses import write_time
from peculium_server.rpc.scoping import narrowed
from peculium_server.store.refusals import NOBODY, Asked, Counted, Key
from peculium_server.store.store import Store

_MINUTE: Final = struct.Struct(">q")


class Counting(Protocol):
    """What the services need of whoever counts refusals."""

    def count(self, root_id: bytes, budget_id: bytes, reason: Refusal, /) -> None:
        """A budget was refused something, just now."""
        ...


class Refusing:
    """Answers about refusals."""

    def __init__(self, reader: Reader, store: Store) -> None:
        self._reader = reader
        self._store = store

    async def refusals(self, request: ListRefusalsRequest) -> ListRefusalsResponse:
        """A page of what was refused.

        Raises:
            CallRefused: BUDGET_UNKNOWN, MALFORMED.
        """
        wanted = await self._wanted(request)
        scope = b"refusals" + repr((wanted, request.descending)).encode()
        asked = read_page(scope, request.page_size, request.page_token)
        found = await self._store.refusals.page(
            wanted,
            limit=asked.size + 1,
            after=None if asked.after is None else _read_key(asked.after),
            descending=request.descending,
        )
        page, more = found[: asked.size], len(found) > asked.size
        last = _write_key(page[-1].key) if more else None
        response = ListRefusalsResponse(next_page_token=page_token(scope, last))
        for counted in page:
            _write(counted, response)
        return response

    async def _wanted(self, request: ListRefusalsRequest) -> Asked:
        reasons = set()
        for index, number in enumerate(request.reasons):
            try:
                reasons.add(Refusal(number).name)
            except ValueError:
                problem = "must be a reason that this server knows"
                raise CallRefused.malformed(f"reasons[{index}]", problem) from None
        return await narrowed(Asked(reasons=sorted(reasons)), request, self._reader, self._store)


def _write_key(key: Key) -> bytes:
    return _MINUTE.pack(key.minute) + key.root_id + key.budget_id + key.reason.encode()


def _read_key(said: bytes) -> Key:
    """As it was written: the token that it came in was checked."""
    (minute,) = _MINUTE.unpack_from(said)
    rest = said[_MINUTE.size :]
    ids, reason = rest[: 2 * ID_BYTES], rest[2 * ID_BYTES :]
    return Key(minute, ids[:ID_BYTES], ids[ID_BYTES:], reason.decode())


def _write(counted: Counted, response: ListRefusalsResponse) -> None:
    key, message = counted.key, response.refusals.add()
    write_time(key.minute, message.minute)
    if key.root_id != NOBODY:
        message.root_id = key.root_id
        message.budget_id = key.budget_id
    message.path = counted.path
    if key.reason in Refusal.__members__:
        # Another server's may be newer.
        message.reason = Refusal[key.reason]  # type: ignore[assignment]
    message.count = counted.number
