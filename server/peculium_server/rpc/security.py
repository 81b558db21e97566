"""What auditors are told of secrets that were shown by another than whose they were."""

from __future__ import annotations

import struct
from typing import Final

from peculium.v1.audit_service_pb2 import ListSecurityEventsRequest, ListSecurityEventsResponse
from peculium_server.core.reuse import ReuseKind
from peculium_server.rpc.calls import CallRefused
from peculium_server.rpc.pages import page_token, read_page
from peculium_server.rpc.reading import Reader
from peculium_server.rpc.responses import write_time
from peculium_server.rpc.scoping import narrowed
from peculium_server.store.refusals import NOBODY
from peculium_server.store.security import Asked, Listed, Place
from peculium_server.store.store import Store

_AT: Final = struct.Struct(">q")


class SecurityReading:
    """Answers about security events."""

    def __init__(self, reader: Reader, store: Store) -> None:
        self._reader = reader
        self._store = store

    async def events(self, request: ListSecurityEventsRequest) -> ListSecurityEventsResponse:
        """A page of what was noticed.

        Raises:
            CallRefused: BUDGET_UNKNOWN, MALFORMED.
        """
        wanted = await self._wanted(request)
        scope = b"security events" + repr((wanted, request.descending)).encode()
        asked = read_page(scope, request.page_size, request.page_token)
        found = await self._store.security.page(
            wanted,
            limit=asked.size + 1,
            after=None if asked.after is None else _read_place(asked.after),
            descending=request.descending,
        )
        page, more = found[: asked.size], len(found) > asked.size
        last = _write_place(page[-1]) if more else None
        response = ListSecurityEventsResponse(next_page_token=page_token(scope, last))
        for listed in page:
            _write(listed, response)
        return response

    async def _wanted(self, request: ListSecurityEventsRequest) -> Asked:
        kinds = set()
        for index, number in enumerate(request.kinds):
            try:
                kinds.add(int(ReuseKind(number)))
            except ValueError:
                problem = "must be a kind that this server knows"
                raise CallRefused.malformed(f"kinds[{index}]", problem) from None
        return await narrowed(Asked(kinds=sorted(kinds)), request, self._reader, self._store)


def _write_place(listed: Listed) -> bytes:
    return _AT.pack(listed.event.at) + listed.event.event_id


def _read_place(said: bytes) -> Place:
    """As it was written: the token that it came in was checked."""
    (at,) = _AT.unpack_from(said)
    return Place(at, said[_AT.size :])


def _write(listed: Listed, response: ListSecurityEventsResponse) -> None:
    event, message = listed.event, response.events.add()
    message.event_id = event.event_id
    write_time(event.at, message.at)
    message.kind = event.kind  # type: ignore[assignment]
    if event.root_id != NOBODY:
        message.root_id = event.root_id
        message.budget_id = event.budget_id
    message.path = listed.path
    message.principal = event.principal
    message.operation_id = event.operation_id
    if event.consumed_by is not None:
        message.consumed_by = event.consumed_by
    if event.consumed_operation_id is not None:
        message.consumed_operation_id = event.consumed_operation_id
    if event.consumed_kind is not None:
        message.consumed_kind = event.consumed_kind  # type: ignore[assignment]
    if event.consumed_at is not None:
        write_time(event.consumed_at, message.consumed_at)
    if event.holder is not None:
        message.holder = event.holder
    message.count = event.number
    if event.freeze_id is not None:
        message.freeze_id = event.freeze_id
