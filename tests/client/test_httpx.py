"""The transports against a real ledger and a real provider's process, by httpx and by real clients."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import httpx2
import pytest

import peculium
import peculium.client
from peculium import EntryFilter, Usage, aio
from peculium.errors import BudgetExhausted, PriceUnknown
from peculium.httpx import AsyncTransport, Transport
from peculium.httpx2 import AsyncTransport as AsyncTransport2, Transport as Transport2
from peculium.metering import Call
from peculium_server.store import roles
from tests.forked import Forked
from tests.postgres import Server, as_role
from tests.replay.provider import PATHS, Fate, Running, Script, running
from tests.server import RunningServer, starting

CHAT, RESPONSES, MESSAGES = PATHS
ESTIMATE, COST = 100, 23
TOLD_STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
names = (f"t{number}" for number in itertools.count())


class Told:
    """Prices: what the script says is estimated, and a token costs one."""

    def estimate(self, call: Call) -> int | None:
        return _script(call).estimate if call.method == "POST" else None

    def cost(self, call: Call, usage: Usage, reported: Mapping[str, Any]) -> int:
        return usage.input_tokens + usage.output_tokens


def _script(call: Call) -> Script:
    given = call.body.get("input") or call.body["messages"][0]["content"]
    return Script.parsed(given)


def script(
    trial: str, *fates: Fate, reports: int | None = COST, name: str = "c", cost: int = COST
) -> Script:
    return Script(
        trial=trial,
        call=name,
        estimate=ESTIMATE,
        cost=cost,
        reports=reports,
        fates=fates or (Fate.ANSWERED,),
    )


def body(script: Script, path: str = CHAT, **more: Any) -> dict[str, Any]:
    message = [{"role": "user", "content": script.prompt()}]
    asked = {"input": script.prompt()} if path == RESPONSES else {"messages": message}
    return {"model": "m", **asked, **more}


@pytest.fixture(scope="module")
def provider() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def address(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a ledger for all tests, but for those that kill theirs."""
    with (
        postgres.fresh_database(postgres.migrated_template()) as url,
        starting(tmp_path_factory.mktemp("ledger"), Forked) as start,
    ):
        yield start("--database-url", as_role(url, roles.SERVER)).address


@pytest.fixture
async def ledger(address: str) -> AsyncIterator[aio.Client]:
    async with aio.connect(address, timeout=20) as client:
        yield client


@pytest.fixture
async def budget(ledger: aio.Client) -> aio.Budget:
    """A budget of ten times what a call is expected to cost, at most."""
    name = next(names)
    await ledger.admin.grant(name, unit="tokens", amount=10 * ESTIMATE, holder="dev")
    return await ledger.open(name)


@asynccontextmanager
async def own_budget(server: RunningServer) -> AsyncIterator[aio.Budget]:
    """A budget in a ledger that may be killed."""
    name = next(names)
    async with aio.connect(server.address, timeout=20) as client:
        await client.admin.grant(name, unit="tokens", amount=10 * ESTIMATE, holder="dev")
        yield await client.open(name)


@asynccontextmanager
async def http(
    budget: aio.Budget | None,
    *,
    timeout: float = 20,
    ledger_timeout: float | None = None,
    **terms: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    transport = AsyncTransport(Told(), budget=budget, timeout=ledger_timeout, **terms)
    async with httpx.AsyncClient(transport=transport, timeout=timeout) as client:
        yield client


def name_of(budget: aio.Budget | peculium.client.Budget) -> str:
    return budget.ref.path


async def spent(budget: aio.Budget) -> int:
    """What was spent so far. Nothing may be in flight."""
    balances = await budget.balances()
    assert (balances.held, balances.forfeited) == (0, 0)
    return balances.spent


# --- what ends a hold ---


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_call_is_settled_by_the_usage_in_its_answer(
    provider: Running, budget: aio.Budget, path: str, streamed: bool
) -> None:
    asked = script(name_of(budget))
    more: dict[str, Any] = TOLD_STREAM if streamed else {}
    async with http(budget) as client:
        answer = await client.post(provider.url + path, json=body(asked, path, **more))
    assert answer.status_code == 200
    assert "words" in answer.text.replace('"wo"', '"words"')
    assert await spent(budget) == COST == provider.meter(asked.trial)["billed"]


async def test_what_is_settled_says_which_call_it_was(
    provider: Running, ledger: aio.Client, budget: aio.Budget
) -> None:
    asked = script(name_of(budget))
    async with http(budget, labels={"team": "red"}) as client:
        await client.post(provider.url + CHAT, json=body(asked))
    by = ("provider", "model", "label:team", "label:model")
    [group] = (await ledger.audit.usage(name_of(budget), by)).groups
    assert group.keys == ("127.0.0.1", "m", "red", "m")
    assert (group.input_tokens, group.output_tokens, group.estimated) == (1, COST - 1, 0)
    found = EntryFilter(reference="call-c-1")
    [settled] = [entry async for entry in ledger.audit.entries(name_of(budget), selected=found)]
    assert (settled.kind, settled.amount) == ("SETTLE", COST)


@pytest.mark.parametrize("reports", [None, 0])
@pytest.mark.parametrize("streamed", [False, True])
async def test_an_answer_without_usage_spends_the_whole_hold(
    provider: Running, budget: aio.Budget, reports: int | None, streamed: bool
) -> None:
    asked = script(name_of(budget), reports=reports)
    more: dict[str, Any] = TOLD_STREAM if streamed else {}
    async with http(budget) as client:
        await client.post(provider.url + CHAT, json=body(asked, **more))
    assert await spent(budget) == ESTIMATE


async def test_a_stream_that_was_not_asked_for_its_usage_spends_the_whole_hold(
    provider: Running, budget: aio.Budget
) -> None:
    async with http(budget) as client:
        await client.post(provider.url + CHAT, json=body(script(name_of(budget)), stream=True))
    assert await spent(budget) == ESTIMATE


async def test_more_than_was_held_is_booked_in_full(provider: Running, budget: aio.Budget) -> None:
    asked = script(name_of(budget), reports=3 * ESTIMATE, cost=3 * ESTIMATE)
    async with http(budget) as client:
        await client.post(provider.url + CHAT, json=body(asked))
    assert await spent(budget) == 3 * ESTIMATE


@pytest.mark.parametrize("fate", [Fate.LIMITED, Fate.DENIED])
async def test_an_answer_before_any_work_releases(
    provider: Running, budget: aio.Budget, fate: Fate
) -> None:
    async with http(budget) as client:
        answer = await client.post(provider.url + CHAT, json=body(script(name_of(budget), fate)))
    assert answer.status_code in {401, 429}
    assert await spent(budget) == 0


@pytest.mark.parametrize("status", [300, 307, 400, 403, 404, 413, 422, 429])
async def test_statuses_that_release(budget: aio.Budget, status: int) -> None:
    inner = httpx.MockTransport(lambda _: httpx.Response(status))
    async with http(budget, inner=inner) as client:
        await client.post("http://provider/", json=body(script("t")))
    assert await spent(budget) == 0


@pytest.mark.parametrize("status", [408, 409, 500, 502, 503, 504, 529])
async def test_statuses_that_may_have_been_billed(budget: aio.Budget, status: int) -> None:
    inner = httpx.MockTransport(lambda _: httpx.Response(status, headers={"x-request-id": "r"}))
    async with http(budget, inner=inner) as client:
        await client.post("http://provider/", json=body(script("t")))
    assert await spent(budget) == ESTIMATE


async def test_an_answer_that_an_inner_transport_has_read_is_settled(budget: aio.Budget) -> None:
    told = {"usage": {"prompt_tokens": 1, "completion_tokens": COST - 1}}
    inner = httpx.MockTransport(lambda _: httpx.Response(200, json=told))
    async with http(budget, inner=inner) as client:
        answer = await client.post("http://provider/", json=body(script("t")))
    assert answer.json() == told
    assert await spent(budget) == COST


async def test_a_provider_that_is_not_there_bills_nothing(budget: aio.Budget) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    async with http(budget) as client:
        with pytest.raises(httpx.ConnectError):
            await client.post(f"http://127.0.0.1:{port}{CHAT}", json=body(script("t")))
    assert await spent(budget) == 0


@pytest.mark.parametrize("fate", [Fate.DROPPED, Fate.HUNG])
async def test_no_answer_to_what_was_sent_spends_the_whole_hold(
    provider: Running, budget: aio.Budget, fate: Fate
) -> None:
    asked = script(name_of(budget), fate)
    async with http(budget, timeout=0.3) as client:
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError, httpx.ReadTimeout)):
            await client.post(provider.url + CHAT, json=body(asked))
    assert provider.meter(asked.trial)["billed"] == COST
    assert await spent(budget) == ESTIMATE


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_that_is_cut_spends_the_whole_hold(
    provider: Running, budget: aio.Budget, path: str
) -> None:
    asked = script(name_of(budget), Fate.CUT)
    async with http(budget) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(provider.url + path, json=body(asked, path, stream=True))
    assert await spent(budget) == ESTIMATE


async def test_who_leaves_a_stream_early_spends_the_whole_hold(
    provider: Running, budget: aio.Budget
) -> None:
    asked = body(script(name_of(budget)), stream=True, stream_options={"include_usage": True})
    async with (
        http(budget) as client,
        client.stream("POST", provider.url + CHAT, json=asked) as answer,
    ):
        async for _ in answer.aiter_lines():
            break
    assert await spent(budget) == ESTIMATE


async def test_a_call_that_is_cancelled_spends_the_whole_hold(
    provider: Running, ledger: aio.Client, budget: aio.Budget
) -> None:
    asked = script(name_of(budget), Fate.HUNG)
    async with http(budget) as client:
        task = asyncio.create_task(client.post(provider.url + CHAT, json=body(asked)))
        while provider.meter(asked.trial)["attempts"] == 0:
            await asyncio.sleep(0.01)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    while (await budget.balances()).held:
        await asyncio.sleep(0.01)
    assert await spent(budget) == ESTIMATE


async def test_prices_that_fail_after_the_call_spend_the_whole_hold_and_keep_the_answer(
    provider: Running, budget: aio.Budget
) -> None:
    class Broken(Told):
        def cost(self, call: Call, usage: Usage, reported: Mapping[str, Any]) -> int:
            raise ZeroDivisionError

    transport = AsyncTransport(Broken(), budget=budget)
    async with httpx.AsyncClient(transport=transport) as client:
        answer = await client.post(provider.url + CHAT, json=body(script(name_of(budget))))
    assert "words" in answer.text
    assert await spent(budget) == ESTIMATE


async def test_what_costs_nothing_needs_no_budget(provider: Running) -> None:
    async with http(None) as client:
        answer = await client.get(f"{provider.url}/v1/models")
    assert answer.json() == {"object": "list", "data": []}


async def test_the_current_budget_pays_if_none_was_given(
    provider: Running, budget: aio.Budget
) -> None:
    async with http(None) as client:
        with peculium.use(budget):
            await client.post(provider.url + CHAT, json=body(script(name_of(budget))))
    assert await spent(budget) == COST


# --- refusals ---


async def test_without_money_nothing_is_sent(provider: Running, ledger: aio.Client) -> None:
    name = next(names)
    await ledger.admin.grant(name, unit="tokens", amount=ESTIMATE - 1, holder="dev")
    async with http(await ledger.open(name)) as client:
        with pytest.raises(BudgetExhausted):
            await client.post(provider.url + CHAT, json=body(script(name)))
    assert provider.meter(name)["attempts"] == 0


async def test_a_refusal_can_be_an_answer(provider: Running, ledger: aio.Client) -> None:
    name = next(names)
    await ledger.admin.grant(name, unit="tokens", amount=ESTIMATE - 1, holder="dev")
    async with http(await ledger.open(name), on_refusal="respond") as client:
        answer = await client.post(provider.url + CHAT, json=body(script(name)))
    assert (answer.status_code, answer.headers["x-should-retry"]) == (402, "false")
    error = answer.json()["error"]
    assert (error["code"], error["budget"]) == ("BUDGET_EXHAUSTED", name)
    assert provider.meter(name)["attempts"] == 0


async def test_without_a_ledger_nothing_is_sent(
    provider: Running, running_server: RunningServer
) -> None:
    async with own_budget(running_server) as budget:
        asked = script(name_of(budget))
        running_server.kill()
        async with http(budget, ledger_timeout=0.3) as client:
            with pytest.raises(peculium.Unavailable):
                await client.post(provider.url + CHAT, json=body(asked))
        async with http(budget, on_refusal="respond", ledger_timeout=0.3) as client:
            answer = await client.post(provider.url + CHAT, json=body(asked))
    assert answer.status_code == 503
    assert provider.meter(asked.trial)["attempts"] == 0


async def test_a_call_without_a_price_is_not_sent(provider: Running, budget: aio.Budget) -> None:
    class Unknown(Told):
        def estimate(self, call: Call) -> int | None:
            raise PriceUnknown("no price is known")

    asked = script(name_of(budget))
    transport = AsyncTransport(Unknown(), budget=budget, on_refusal="respond")
    async with httpx.AsyncClient(transport=transport) as client:
        answer = await client.post(provider.url + CHAT, json=body(asked))
    assert answer.status_code == 400
    assert provider.meter(asked.trial)["attempts"] == 0


async def test_an_answer_survives_that_its_hold_was_ended_by_somebody_else(
    provider: Running, ledger: aio.Client, budget: aio.Budget, caplog: pytest.LogCaptureFixture
) -> None:
    class Resolving(httpx.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            [hold] = await budget.holds()
            await ledger.admin.resolve(name_of(budget), hold.hold_id, 5, "by hand")
            return await super().handle_async_request(request)

    async with http(budget, inner=Resolving()) as client:
        answer = await client.post(provider.url + CHAT, json=body(script(name_of(budget))))
    assert "words" in answer.text
    assert "was not ended" in caplog.text
    assert await spent(budget) == 5


# --- blocking ---


@pytest.mark.parametrize(
    ("fate", "booked"),
    [(Fate.ANSWERED, COST), (Fate.LIMITED, 0), (Fate.FAILED, ESTIMATE), (Fate.DROPPED, ESTIMATE)],
)
def test_the_blocking_transport_does_the_same(
    provider: Running, address: str, fate: Fate, booked: int
) -> None:
    name = next(names)
    with peculium.connect(address, timeout=20) as ledger:
        ledger.admin.grant(name, unit="tokens", amount=10 * ESTIMATE, holder="dev")
        budget = ledger.open(name)
        with (
            suppress(httpx.TransportError),
            httpx.Client(transport=Transport(Told(), budget=budget)) as client,
        ):
            client.post(provider.url + CHAT, json=body(script(name, fate)))
        assert budget.balances().spent == booked
        read = httpx.MockTransport(lambda _: httpx.Response(200))
        with httpx.Client(transport=Transport(Told(), budget=budget, inner=read)) as client:
            client.post("http://provider/", json=body(script(name)))
        booked += ESTIMATE
        assert budget.balances().spent == booked
        refusing = Transport(Told(), budget=budget, on_refusal="respond")
        with httpx.Client(transport=refusing) as client:
            asked = Script(trial=name, call="d", estimate=10**6, cost=1, reports=1)
            assert client.post(provider.url + CHAT, json=body(asked)).status_code == 402
            assert client.get(f"{provider.url}/v1/models").status_code == 200
        with httpx.Client(transport=Transport(Told(), budget=budget)) as client:
            streamed = body(script(name, name="e"), **TOLD_STREAM)
            with client.stream("POST", provider.url + CHAT, json=streamed) as answer:
                next(answer.iter_lines())
        assert budget.balances().spent == booked + ESTIMATE
        with (
            pytest.raises(BudgetExhausted),
            httpx.Client(transport=Transport(Told(), budget=budget)) as client,
        ):
            client.post(
                provider.url + CHAT,
                json=body(Script(trial=name, call="f", estimate=10**6, cost=1, reports=1)),
            )


# --- the real clients, which try again by themselves; they take seconds to import ---

FLAKY = (Fate.DROPPED, Fate.FAILED, Fate.ANSWERED)
"""The first two attempts are billed and come to nothing."""


async def chat(url: str, transport: AsyncTransport, asked: Script) -> None:
    import openai

    client = openai.AsyncOpenAI(
        api_key="k",
        base_url=f"{url}/v1",
        max_retries=2,
        http_client=httpx.AsyncClient(transport=transport),  # type: ignore[arg-type]
    )
    async with client:
        await client.chat.completions.create(**body(asked))


async def chat2(url: str, transport: AsyncTransport2, asked: Script) -> None:
    import openai

    client = openai.AsyncOpenAI(
        api_key="k",
        base_url=f"{url}/v1",
        max_retries=2,
        http_client=httpx2.AsyncClient(transport=transport),
    )
    async with client:
        answer = await client.responses.create(**body(asked, RESPONSES))
        assert answer.output_text == "words"


async def message(url: str, transport: AsyncTransport2, asked: Script) -> None:
    import anthropic

    client = anthropic.AsyncAnthropic(
        api_key="k",
        base_url=url,
        max_retries=2,
        http_client=httpx2.AsyncClient(transport=transport),
    )
    async with client:
        text = ""
        async with client.messages.stream(**body(asked, MESSAGES, max_tokens=9)) as stream:
            async for part in stream.text_stream:
                text += part
        assert text == "words"


CLIENTS = [
    pytest.param(AsyncTransport, chat, id="openai-httpx"),
    pytest.param(AsyncTransport2, chat2, id="openai-httpx2"),
    pytest.param(AsyncTransport2, message, id="anthropic-httpx2"),
]


@pytest.mark.parametrize(("transport", "ask"), CLIENTS)
async def test_each_hidden_retry_of_a_real_client_is_reserved_for(
    provider: Running,
    ledger: aio.Client,
    budget: aio.Budget,
    transport: Callable[..., Any],
    ask: Callable[..., Any],
) -> None:
    asked = script(name_of(budget), *FLAKY)
    await ask(provider.url, transport(Told(), budget=budget), asked)
    meter = provider.meter(asked.trial)
    assert (meter["attempts"], meter["billed"]) == (3, 3 * COST)
    assert await spent(budget) == 2 * ESTIMATE + COST
    groups = (await ledger.audit.usage(name_of(budget), ["label:retry"])).groups
    assert [(group.keys, group.spent, group.estimated) for group in groups] == [
        (("",), ESTIMATE, 1),
        (("1",), ESTIMATE, 1),
        (("2",), COST, 0),
    ]


@pytest.mark.parametrize(("transport", "ask"), CLIENTS)
async def test_hidden_retries_end_where_the_budget_does(
    provider: Running,
    ledger: aio.Client,
    transport: Callable[..., Any],
    ask: Callable[..., Any],
) -> None:
    import anthropic
    import openai

    name = next(names)
    await ledger.admin.grant(name, unit="tokens", amount=2 * ESTIMATE, holder="dev")
    budget = await ledger.open(name)
    asked = script(name, *FLAKY)
    with pytest.raises((openai.APIStatusError, anthropic.APIStatusError)) as refused:
        await ask(provider.url, transport(Told(), budget=budget, on_refusal="respond"), asked)
    assert isinstance(refused.value, openai.APIStatusError | anthropic.APIStatusError)
    assert refused.value.status_code == 402
    assert "available" in str(refused.value)
    assert provider.meter(name)["attempts"] == 2


async def test_a_refusal_that_is_raised_reaches_the_caller_of_a_real_client(
    provider: Running, ledger: aio.Client
) -> None:
    import anthropic

    name = next(names)
    await ledger.admin.grant(name, unit="tokens", amount=1, holder="dev")
    budget = await ledger.open(name)
    with pytest.raises(BudgetExhausted):
        await chat(provider.url, AsyncTransport(Told(), budget=budget), script(name))
    with pytest.raises(anthropic.APIConnectionError) as failed:
        await message(provider.url, AsyncTransport2(Told(), budget=budget), script(name))
    assert isinstance(failed.value.__cause__, BudgetExhausted)
    assert provider.meter(name)["attempts"] == 0


def test_the_blocking_clients_retries_are_reserved_for(provider: Running, address: str) -> None:
    import openai

    name = next(names)
    with peculium.connect(address, timeout=20) as ledger:
        ledger.admin.grant(name, unit="tokens", amount=10 * ESTIMATE, holder="dev")
        budget = ledger.open(name)
        transport = Transport2(Told(), budget=budget)
        with openai.OpenAI(
            api_key="k",
            base_url=f"{provider.url}/v1",
            max_retries=2,
            http_client=httpx2.Client(transport=transport),
        ) as client:
            client.chat.completions.create(**body(script(name, *FLAKY)))
        assert budget.balances().spent == 2 * ESTIMATE + COST
