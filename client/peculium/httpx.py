"""Transports for httpx that reserve for every attempt, and settle by the answer (`peculium[httpx]`).

    prices = ListPrices(PriceList({"gpt-5": Price(...)}))
    http = httpx.AsyncClient(transport=AsyncTransport(prices, budget=budget))
    openai = AsyncOpenAI(http_client=http)

A client that tries again sends again, and each attempt is reserved for: none is hidden from the budget.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from types import TracebackType
from typing import Self

import httpx

from peculium import aio, client
from peculium._context import current
from peculium._metered import (
    Ending,
    OnRefusal,
    Settlement,
    Terms,
    ending,
    log,
    reference_of,
    refusal,
)
from peculium.errors import PeculiumError
from peculium.metering import AnswerReader, Call, Prices
from peculium.values import Seconds

__all__ = ["UNBILLED", "AsyncTransport", "Transport"]

UNBILLED = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.UnsupportedProtocol,
)
"""Raised before anything of the request was sent. Whatever else goes wrong may have been billed."""

_PLAIN = "identity"
"""How answers are encoded: they are read on their way."""


class AsyncTransport(httpx.AsyncBaseTransport):
    """Reserves for each attempt, sends it through another transport, and ends the hold.

    What is surely not billed is released: a connection that was not made, and answers from 300 to 499
    but for 408 and 409. An answer with usage is settled by it, also at the end of a stream. Everything
    else spends the whole hold, marked as an estimate: time-outs and lost connections after sending,
    408, 409 and 500 and above, a stream that was cut or left early, and an answer without usage or with
    usage that cannot be true, such as none for something written. A process that dies leaves the hold
    to lapse.

    Args:
        prices: What calls cost, before and after.
        budget: Pays for them; absent: whichever is current when a call is made (`peculium.use`).
        inner: Sends them; absent: an `httpx.AsyncHTTPTransport`. A proxy or retries of connections
            belong there.
        ttl: Of the holds, longer than any call may take; absent: 10 minutes.
        labels: Of the holds, beside the model and, as OpenAI's and Anthropic's clients count them, the
            retry.
        on_refusal: What a call comes to that the ledger does not permit. "raise" raises the error, a
            `PeculiumError`; Anthropic's client and older ones of OpenAI take it for a lost connection, try
            again, and name it as the cause of their own error. "respond" gives an answer of status 402
            (refused), 503 (no answer from the ledger) or 400 (no price, no such budget), with the error's
            words, and a header by which those clients do not try again.
        timeout: For each verb of the ledger, in seconds; absent: the budget's client's own.
    """

    def __init__(
        self,
        prices: Prices,
        *,
        budget: aio.Budget | None = None,
        inner: httpx.AsyncBaseTransport | None = None,
        ttl: Seconds | None = None,
        labels: Mapping[str, str] | None = None,
        on_refusal: OnRefusal = "raise",
        timeout: float | None = None,
    ) -> None:
        self._terms = Terms(prices, ttl, dict(labels or {}), on_refusal, timeout)
        self._budget = budget
        self._inner = httpx.AsyncHTTPTransport() if inner is None else inner

    async def __aenter__(self) -> Self:
        """Enter the inner transport."""
        await self._inner.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        """Leave the inner transport."""
        await self._inner.__aexit__(exc_type, exc_value, traceback)

    async def aclose(self) -> None:
        """Close the inner transport."""
        await self._inner.aclose()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Make one attempt.

        Raises:
            PeculiumError: It was not permitted, and not made (with `on_refusal="raise"`).
        """
        call = _call(request, await request.aread())
        try:
            hold = await self._reserve(call, request)
        except PeculiumError as error:
            if self._terms.on_refusal == "raise":
                raise
            return _refused(request, error)
        if hold is None:
            return await self._inner.handle_async_request(request)
        request.headers["accept-encoding"] = _PLAIN
        try:
            response = await self._inner.handle_async_request(request)
        except BaseException as error:
            await hold.__aexit__(type(error), error, error.__traceback__)
            raise
        match ending(response.status_code):
            case Ending.READ:
                await self._read(call, hold, response)
            case Ending.RELEASED:
                await _end(hold, None)
            case Ending.SPENT:
                await _end(hold, Settlement(None, reference_of(response.headers), None))
        return response

    async def _read(self, call: Call, hold: aio.Hold, response: httpx.Response) -> None:
        """Settle by the answer, when it has been read. Some inner transports have read it already."""
        reader = self._terms.reader(call, response.headers)
        try:
            reader.feed(response.content)
        except httpx.ResponseNotRead:
            assert isinstance(response.stream, httpx.AsyncByteStream)  # noqa: S101 - for the types
            response.stream = _AsyncMetered(response.stream, hold, reader, self._settlement(call))
        else:
            await _end(hold, self._terms.settlement(call, reader, whole=True))

    async def _reserve(self, call: Call, request: httpx.Request) -> aio.Hold | None:
        terms = self._terms
        amount = terms.prices.estimate(call)
        if amount is None:
            return None
        budget: aio.Budget = current() if self._budget is None else self._budget
        return await budget.reserve(
            amount,
            ttl=terms.ttl,
            labels=terms.labels_of(call, request.headers),
            unbilled=UNBILLED,
            timeout=terms.timeout,
        )

    def _settlement(self, call: Call) -> _Settle:
        return lambda reader, whole: self._terms.settlement(call, reader, whole=whole)


class Transport(httpx.BaseTransport):
    """As `AsyncTransport`, blocking."""

    def __init__(
        self,
        prices: Prices,
        *,
        budget: client.Budget | None = None,
        inner: httpx.BaseTransport | None = None,
        ttl: Seconds | None = None,
        labels: Mapping[str, str] | None = None,
        on_refusal: OnRefusal = "raise",
        timeout: float | None = None,
    ) -> None:
        self._terms = Terms(prices, ttl, dict(labels or {}), on_refusal, timeout)
        self._budget = budget
        self._inner = httpx.HTTPTransport() if inner is None else inner

    def __enter__(self) -> Self:
        """Enter the inner transport."""
        self._inner.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        """Leave the inner transport."""
        self._inner.__exit__(exc_type, exc_value, traceback)

    def close(self) -> None:
        """Close the inner transport."""
        self._inner.close()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Make one attempt.

        Raises:
            PeculiumError: It was not permitted, and not made (with `on_refusal="raise"`).
        """
        call = _call(request, request.read())
        try:
            hold = self._reserve(call, request)
        except PeculiumError as error:
            if self._terms.on_refusal == "raise":
                raise
            return _refused(request, error)
        if hold is None:
            return self._inner.handle_request(request)
        request.headers["accept-encoding"] = _PLAIN
        try:
            response = self._inner.handle_request(request)
        except BaseException as error:
            hold.__exit__(type(error), error, error.__traceback__)
            raise
        match ending(response.status_code):
            case Ending.READ:
                self._read(call, hold, response)
            case Ending.RELEASED:
                _end_now(hold, None)
            case Ending.SPENT:
                _end_now(hold, Settlement(None, reference_of(response.headers), None))
        return response

    def _read(self, call: Call, hold: client.Hold, response: httpx.Response) -> None:
        """Settle by the answer, when it has been read. Some inner transports have read it already."""
        reader = self._terms.reader(call, response.headers)
        try:
            reader.feed(response.content)
        except httpx.ResponseNotRead:
            assert isinstance(response.stream, httpx.SyncByteStream)  # noqa: S101 - for the types
            response.stream = _Metered(response.stream, hold, reader, self._settlement(call))
        else:
            _end_now(hold, self._terms.settlement(call, reader, whole=True))

    def _reserve(self, call: Call, request: httpx.Request) -> client.Hold | None:
        terms = self._terms
        amount = terms.prices.estimate(call)
        if amount is None:
            return None
        budget: client.Budget = current() if self._budget is None else self._budget
        return budget.reserve(
            amount,
            ttl=terms.ttl,
            labels=terms.labels_of(call, request.headers),
            unbilled=UNBILLED,
            timeout=terms.timeout,
        )

    def _settlement(self, call: Call) -> _Settle:
        return lambda reader, whole: self._terms.settlement(call, reader, whole=whole)


_Settle = Callable[[AnswerReader, bool], Settlement]


class _AsyncMetered(httpx.AsyncByteStream):
    """An answer's bytes, read on their way; at their end, or when nobody wants more, the hold ends."""

    def __init__(
        self, inner: httpx.AsyncByteStream, hold: aio.Hold, reader: AnswerReader, settle: _Settle
    ) -> None:
        self._inner = inner
        self._hold = hold
        self._reader = reader
        self._settle = settle
        self._ended = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for content in self._inner:
            self._reader.feed(content)
            yield content
        await self._over(whole=True)

    async def aclose(self) -> None:
        try:
            await self._inner.aclose()
        finally:
            await self._over(whole=False)

    async def _over(self, *, whole: bool) -> None:
        if not self._ended:
            self._ended = True
            await _end(self._hold, self._settle(self._reader, whole))


class _Metered(httpx.SyncByteStream):
    """As `_AsyncMetered`, blocking."""

    def __init__(
        self, inner: httpx.SyncByteStream, hold: client.Hold, reader: AnswerReader, settle: _Settle
    ) -> None:
        self._inner = inner
        self._hold = hold
        self._reader = reader
        self._settle = settle
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        for content in self._inner:
            self._reader.feed(content)
            yield content
        self._over(whole=True)

    def close(self) -> None:
        try:
            self._inner.close()
        finally:
            self._over(whole=False)

    def _over(self, *, whole: bool) -> None:
        if not self._ended:
            self._ended = True
            _end_now(self._hold, self._settle(self._reader, whole))


async def _end(hold: aio.Hold, settlement: Settlement | None) -> None:
    """Settle or release. An answer that is paid for is not lost because the ledger did not hear of it."""
    try:
        if settlement is None:
            await hold.release()
        else:
            await hold.settle(
                settlement.actual,
                reference=settlement.reference,
                usage=settlement.usage,
                estimated=settlement.actual is None,
            )
    except PeculiumError as error:
        log.warning("the hold of a call was not ended, and lapses: %s", error)


def _end_now(hold: client.Hold, settlement: Settlement | None) -> None:
    """As `_end`, blocking."""
    try:
        if settlement is None:
            hold.release()
        else:
            hold.settle(
                settlement.actual,
                reference=settlement.reference,
                usage=settlement.usage,
                estimated=settlement.actual is None,
            )
    except PeculiumError as error:
        log.warning("the hold of a call was not ended, and lapses: %s", error)


def _call(request: httpx.Request, content: bytes) -> Call:
    return Call(request.method, request.url.host, request.url.path, content)


def _refused(request: httpx.Request, error: PeculiumError) -> httpx.Response:
    status, headers, content = refusal(error)
    return httpx.Response(status, headers=headers, json=content, request=request)
