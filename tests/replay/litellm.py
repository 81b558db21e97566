"""LiteLLM's proxy as a contestant: the real one, in an environment of its own, before the same provider.

Its virtual keys need a database that its own client reaches, and that client's program is downloaded when it is
first used. So keys come from `custom_auth`, as its documentation has it for those without a database; what
LiteLLM does with a key's budgets then is its own code. Agents know the proxy's address and a key, and call.

A token costs 2^-10 dollars, so that sums of what LiteLLM keeps as floats are exact.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import urllib.request
import venv
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from tests.replay.agents import MODEL, CallFailed, Gate, Llm, Result, Seat
from tests.replay.contestants import AGAIN_SECONDS, ROOT, Contestant
from tests.replay.findings import KEY, MODELS, STRICT
from tests.replay.in_redis import Redis, connection, redis_program
from tests.replay.plays import PROCESSES, Custody, Scenario
from tests.replay.provider import PATHS, Script

LOCK = Path(__file__).with_name("litellm.lock")
ENVIRONMENT = ROOT / ".venv.litellm"
TOKEN_DOLLARS = 2.0**-10
_START_SECONDS_MAX = 300.0
_MASTER = "sk-master"
_BOOKED_SECONDS = 0.25
"""What has not changed for so long is booked: it books after it has answered."""
_SPENT = (
    "return math.floor(tonumber(redis.call('GET', KEYS[1]) or 0)"
    f" * {round(1 / TOKEN_DOLLARS)} + 0.5)"
)
"""What a counter of dollars says, in tokens."""

SCENARIOS = frozenset(
    {
        *("S1", "S1b", "S2d", "S3", "S5a", "S7a", "D2", "D10", "D11"),
        *("S2-50-3p", "S2-60-3p", "S2-69-3p", "S2-100-3p", "S2-16a", "S2-64a"),
        *("S2-u124", "S2-u248", "S2-u496", "S2-u744"),
        *("S6-true", "S6-missing", "S6-zero", "S6-stream", "S6-unasked", "S6-cut"),
    }
)
"""Those that say something of it, and need neither its database nor a restart, which takes it seconds."""

_AUTH = f'''"""Keys say themselves what they may spend."""

from litellm.proxy._types import UserAPIKeyAuth


async def user_api_key_auth(request, api_key):
    kind, cap, _ = api_key.removeprefix("sk-").split(".", 2)
    dollars = int(cap) * {TOKEN_DOLLARS!r}
    if kind == "model":
        budgets = {{"{MODEL}": {{"budget_limit": dollars, "time_period": "1d"}}}}
        return UserAPIKeyAuth(api_key=api_key, model_max_budget=budgets)
    return UserAPIKeyAuth(api_key=api_key, max_budget=dollars)
'''


def version() -> str:
    """The one that is pinned."""
    lines = LOCK.read_text().splitlines()
    return next(line for line in lines if line.startswith("litellm==")).split("==")[1].split()[0]


def install() -> None:
    """Make its environment by the lock, unless it is there: a minute, and the network.

    Raises:
        subprocess.CalledProcessError: It cannot be installed.
    """
    stamp = ENVIRONMENT / ".installed"
    wanted = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    venv.create(ENVIRONMENT, with_pip=True, clear=True, symlinks=True)
    pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    quiet = ["--disable-pip-version-check", "--no-input", "--no-deps"]
    subprocess.run(
        [*pip, *quiet, "--require-hashes", "--requirement", str(LOCK)],
        check=True,
        stdout=sys.stderr,
    )
    stamp.write_text(wanted)


class Proxies:
    """Proxies with one configuration, which share a Redis where there is one.

    Args:
        folder: For what they need.
        provider: Where it is.
        strict: They are told to refuse what they cannot check, and what does not fit.
        count: How many there are.
    """

    def __init__(self, folder: Path, provider: str, *, strict: bool, count: int) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._provider = provider
        self._strict = strict
        self._count = count
        self.redis = Redis(folder / "redis") if redis_program() is not None else None
        self.urls: list[str] = []
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Start them, and end them."""
        with contextlib.ExitStack() as open_:
            if self.redis is not None:
                open_.enter_context(self.redis.running())
            (self._folder / "keys.py").write_text(_AUTH)
            (self._folder / "config.yaml").write_text(json.dumps(self._configuration()))
            self._processes = [
                open_.enter_context(self._started(number)) for number in range(self._count)
            ]
            self.urls = [url for url, _ in self._processes]
            yield

    def wait(self) -> None:
        """Wait until they answer, and let each make a call: the first takes it long."""
        for url, process in self._processes:
            _wait(url, process, self._folder)
            script = Script(trial="warm", call=url, estimate=1, cost=1, reports=1, input_tokens=0)
            for budget in ("key", "model"):
                httpx.post(
                    f"{url}{PATHS[0]}",
                    headers={"authorization": f"Bearer sk-{budget}.1000.warm"},
                    json=_request(script),
                    timeout=_START_SECONDS_MAX,
                ).raise_for_status()

    @contextlib.contextmanager
    def _started(self, number: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [str(ENVIRONMENT / "bin" / "litellm"), "--config", "config.yaml"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
        with (self._folder / f"proxy-{number}.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=self._folder, stdout=log, stderr=log, env=_environment() | offline
            )
        try:
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.kill()
            process.wait()

    def _configuration(self) -> dict[str, Any]:
        """As the documentation tells. YAML is wanted, and JSON is YAML."""
        settings: dict[str, Any] = {"enable_post_custom_auth_checks": True}
        if self.redis is not None:
            settings["cache"] = True
            settings["cache_params"] = {
                "type": "redis",
                "host": "127.0.0.1",
                "port": self.redis.port,
                "supported_call_types": [],
            }
        return {
            "model_list": [
                {
                    "model_name": MODEL,
                    "litellm_params": {
                        "model": f"openai/{MODEL}",
                        "api_base": f"{self._provider}/v1",
                        "api_key": "sk-provider",
                        "input_cost_per_token": 0.0,
                        "output_cost_per_token": TOKEN_DOLLARS,
                    },
                }
            ],
            "litellm_settings": settings,
            # One trial's failures are not to keep others from the provider, and trying again is the agents' part.
            "router_settings": {"disable_cooldowns": True, "num_retries": 0},
            "general_settings": {
                "master_key": _MASTER,
                "custom_auth": "keys.user_api_key_auth",
                "custom_auth_run_common_checks": True,
                "fail_closed_budget_enforcement": self._strict,
            },
        }


def _environment() -> dict[str, str]:
    """Without this project's own, and without what LiteLLM would take from it."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ}


def _wait(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until a proxy answers.

    Raises:
        RuntimeError: It has ended instead, or does not answer.
    """
    tries = int(_START_SECONDS_MAX / AGAIN_SECONDS)
    for _ in range(tries):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health/liveliness").close()  # noqa: S310 - it is ours
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(AGAIN_SECONDS)
            break
    logs = "\n".join(log.read_text()[-2_000:] for log in sorted(folder.glob("proxy-*.log")))
    raise RuntimeError(f"LiteLLM's proxy does not answer:\n{logs}")


class LiteLlm(Contestant):
    """LiteLLM's proxy, with one kind of its budgets.

    Args:
        proxies: Run already.
        name: Of the contestant.
        title: The same in more words.
        budget: `key` or `model`: the key has a budget, or one for the model.
    """

    def __init__(self, proxies: Proxies, name: str, title: str, budget: str) -> None:
        super().__init__()
        self._proxies = proxies
        self._budget = budget
        self._keys: dict[str, str] = {}
        self.name = name
        self.title = f"LiteLLM {version()}'s proxy, {title}"

    def plays(self, scenario: Scenario) -> bool:
        """Whether it takes part."""
        several = scenario.custody is not Custody.REPLICAS or len(self._proxies.urls) > 1
        return scenario.name in SCENARIOS and several

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The proxies run already, for all kinds."""
        yield

    async def seats(self, trial: str, scenario: Scenario) -> Sequence[Seat]:
        """A key for all, and the address of a proxy; of two, where there are replicas."""
        key = self._keys[trial] = f"sk-{self._budget}.{scenario.cap}.{trial}"
        several = scenario.custody is Custody.REPLICAS
        urls = [self._proxies.urls[process % 2 if several else 0] for process in range(PROCESSES)]
        return [LiteLlmSeat(url, key) for url in urls]

    async def left(self, trial: str) -> int | None:
        """What its counter in Redis leaves; of a budget for a model it keeps most in its memory."""
        if self._proxies.redis is None or self._budget == "model":
            return None
        key = self._keys[trial]
        counter = f"spend:key:{hashlib.sha256(key.encode()).hexdigest()}"
        redis = connection(self._proxies.redis.port)
        before, spent = None, await redis.run(_SPENT, counter)
        while spent != before:
            await asyncio.sleep(_BOOKED_SECONDS)
            before, spent = spent, await redis.run(_SPENT, counter)
        return int(key.split(".")[1]) - spent


@asynccontextmanager
async def contestants(folder: Path, provider: str) -> AsyncIterator[list[Contestant]]:
    """All kinds, with what they need."""
    usual = Proxies(folder / "litellm", provider, strict=False, count=2)
    strict = Proxies(folder / "litellm-strict", provider, strict=True, count=1)
    with contextlib.ExitStack() as open_:
        started = [each for each in (usual, strict) if each is usual or each.redis is not None]
        for each in started:
            open_.enter_context(each.starting())
        for each in started:
            each.wait()
        found: list[Contestant] = [
            LiteLlm(usual, KEY, "a key's budget", "key"),
            LiteLlm(usual, MODELS, "a key's budget for a model", "model"),
        ]
        if strict.redis is not None:
            # Without a database it has to have a Redis to check anything by.
            words = "a key's budget, failing closed"
            found.insert(1, LiteLlm(strict, STRICT, words, "key"))
        yield found


@dataclass(frozen=True)
class LiteLlmSeat:
    """Where the proxy is, and the key."""

    url: str
    key: str

    @asynccontextmanager
    async def sit(self, process: int) -> AsyncIterator[Gate]:
        """Call by the proxy."""
        del process
        yield LiteLlmGate(self.url, self.key)


class _RefusedByProxy(Exception):
    """The budget does not permit it, says the proxy."""


class LiteLlmGate(Gate):
    """The provider's client has the proxy's address in place of the provider's."""

    carries = True

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._key = key

    def transport(self, wire: httpx.AsyncBaseTransport) -> httpx.AsyncBaseTransport:
        """Send to the proxy."""
        return _ByProxy(self._url, self._key, wire)

    async def call(self, llm: Llm, script: Script, attempts: int, agent: str) -> Result:
        """Make a call, in as many attempts as the proxy permits."""
        del agent
        try:
            await llm.complete(script, attempts)
        except _RefusedByProxy:
            return Result.REFUSED
        except CallFailed:
            return Result.FAILED
        return Result.DONE


class _ByProxy(httpx.AsyncBaseTransport):
    def __init__(self, url: str, key: str, wire: httpx.AsyncBaseTransport) -> None:
        self._target = f"{url}{PATHS[0]}"
        self._headers = {"authorization": f"Bearer {key}"}
        self._wire = wire

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        # Its prompt is a script, which is longer than what an agent would send: only what is written has a price.
        script = replace(Script.parsed(body["messages"][0]["content"]), input_tokens=0)
        sent = httpx.Request(
            "POST", self._target, headers=self._headers, json=body | _request(script)
        )
        answer = await self._wire.handle_async_request(sent)
        if answer.is_error and b"budget_exceeded" in answer.content:
            raise _RefusedByProxy
        return answer


def _request(script: Script) -> dict[str, Any]:
    """A call that may write what its agent expects it to cost."""
    return {
        "model": MODEL,
        "max_tokens": script.estimate,
        "messages": [{"role": "user", "content": script.prompt()}],
    }
