"""One server, from its settings to its last answer: start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import json
import logging
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable
from typing import Final

from peculium_server.config import Config
from peculium_server.embedded import EmbeddedPostgres, EmbeddedPostgresError
from peculium_server.identity import DEV_PRINCIPAL, Identities
from peculium_server.lanes.ledger import Ledger
from peculium_server.rpc.server import Server
from peculium_server.sealer import Sealer
from peculium_server.signing import SigningKey, SigningKeyInvalid
from peculium_server.store import migrate
from peculium_server.store.store import Store
from peculium_server.sweeper import Sweeper

PROBE_SECONDS: Final = 2.0
"""How often the server makes sure that the database takes commits, for its health service."""
PROBE_SECONDS_MAX: Final = 5.0
"""A database that takes longer to say where it stands is not one to send callers to."""

COMMIT_SECONDS_MAX: Final = 2.0
"""How long what is being committed may go on after the last call has ended."""

OWN_KEY: Final = "checkpoint-key.pem"
"""In the data directory: what signs the checkpoints of a server with a PostgreSQL of its own."""

FILES_MAX: Final = 65_536
"""Open files, so connections, that the server asks to be allowed."""

YOUNG_OBJECTS_MAX: Final = 10_000
"""Objects made and not gone yet, before cyclic garbage is looked for among them. What a transaction makes
is gone when it is answered, and counts thousands: at Python's own 700 each is searched several times
over, in vain, for a tenth of the time that a server is busy."""

Tell = Callable[[str], None]
"""Is told each step of starting and stopping, as a sentence."""

_logger = logging.getLogger(__name__)


def run(config: Config, tell: Tell) -> None:
    """Serve until the process is told to stop.

    Raises:
        KeysInvalid: The key file cannot be used.
        SigningKeyInvalid: The file of the key for checkpoints cannot be used.
        EmbeddedPostgresError: The server's own PostgreSQL cannot be started.
        StoreError: The database cannot be reached, or not be relied upon.
        CannotListen: The address is taken.
    """
    _allow_files()
    with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
        runner.run(_serve(config, tell))


def _allow_files() -> None:
    """Let as many connect as the machine allows: each is an open file, and shells allow few."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if most == resource.RLIM_INFINITY else min(most, FILES_MAX)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Uvloop's, where it is installed; it is not made for every platform."""
    found = importlib.util.find_spec("uvloop")
    return None if found is None else importlib.import_module("uvloop").new_event_loop


async def _serve(config: Config, tell: Tell) -> None:
    stop = _stop_signal()
    identities = Identities.dev() if config.keys_file is None else Identities.load(config.keys_file)
    async with _database(config, tell, stop) as dsn, _store(config, dsn, tell) as store:
        sealer = _sealer(config, store, tell)
        ledger = Ledger(store, queue_rows_max=config.queue_max)
        server = Server(
            ledger,
            store,
            identities,
            message_bytes_max=config.message_bytes_max,
            call_seconds_max=config.call_seconds_max,
        )
        address = config.listen._replace(port=await server.start(str(config.listen)))
        if identities.dev_mode:
            tell(
                f"WARNING: there is no key file: whoever can connect to {address} may do everything,"
                f" as the principal {DEV_PRINCIPAL!r}"
            )
        elif not address.loopback:
            tell(
                "WARNING: connections are not encrypted here: let something before this server do it"
            )
        _collect_seldom()
        probe = asyncio.create_task(_tell_health(server, store))
        working = [asyncio.create_task(_sweep(config, ledger, store, tell))]
        if sealer is not None:
            working.append(asyncio.create_task(sealer.run()))
        _announce(config, str(address))
        tell(f"listening on {address}")
        await stop.wait()
        stop.clear()
        if config.ready_file is not None:
            config.ready_file.unlink(missing_ok=True)
        tell(f"stopping; what was accepted is finished, for at most {config.drain_seconds} s")
        probe.cancel()
        for task in working:
            task.cancel()
        await asyncio.wait(working)
        await _drain(server, ledger, config.drain_seconds, stop)
        # A database that is silent would keep the rest waiting.
        ledger.abandon()
    tell("stopped")


def _collect_seldom() -> None:
    """Look for cyclic garbage less often, and never among what the server was started with."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS_MAX, *gc.get_threshold()[1:])


def _stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


@contextlib.asynccontextmanager
async def _database(config: Config, tell: Tell, stop: asyncio.Event) -> AsyncIterator[str]:
    """The ledger's database: the configured one, or one of the server's own."""
    if config.database_url is not None:
        tell(f"database: {config.told_database}")
        yield config.database_url
        return
    tell(f"no database is configured: using a PostgreSQL of the server's own in {config.data_dir}")
    postgres = await asyncio.to_thread(EmbeddedPostgres.start, config.data_dir, progress=tell)
    watching = asyncio.create_task(_stop_without(postgres, stop))
    try:
        # Nobody else decides when this one is migrated; of a configured one its operator does.
        await asyncio.to_thread(migrate.upgrade, postgres.dsn)
        yield postgres.dsn
        if not postgres.running:
            raise EmbeddedPostgresError(
                f"the server's own PostgreSQL has ended: {postgres.log_file}"
            )
    finally:
        watching.cancel()
        await asyncio.to_thread(postgres.stop)


async def _stop_without(postgres: EmbeddedPostgres, stop: asyncio.Event) -> None:
    """Stop when the server's own PostgreSQL has ended: whatever starts the server starts both again."""
    while postgres.running:  # noqa: ASYNC110 - nobody tells of the end of a process that is no child
        await asyncio.sleep(PROBE_SECONDS)
    stop.set()


@contextlib.asynccontextmanager
async def _store(config: Config, dsn: str, tell: Tell) -> AsyncIterator[Store]:
    if config.unsafe_settings:
        tell("WARNING: a database that may forget what it has recorded is accepted, as told")
    store = await Store.open(
        dsn,
        readers=config.database_connections,
        unsafe_settings_allowed=config.unsafe_settings,
    )
    try:
        yield store
    finally:
        await store.close()


async def _tell_health(server: Server, store: Store) -> None:
    """Keep the health service true: the server is of use as long as the database takes commits."""
    serving: bool | None = None
    while True:
        try:
            async with asyncio.timeout(PROBE_SECONDS_MAX):
                await store.probe()
            works = True
        except Exception as error:  # noqa: BLE001 - whatever it is, callers would not be served either
            works = False
            if serving is not False:
                reason = str(error) or f"no answer in {PROBE_SECONDS_MAX:g} s"
                _logger.warning("not serving, since the database takes no commits: %s", reason)
        if works is not serving:
            if works and serving is not None:
                _logger.warning("serving again")
            await server.tell_serving(serving=works)
            serving = works
        await asyncio.sleep(PROBE_SECONDS)


async def _sweep(config: Config, ledger: Ledger, store: Store, tell: Tell) -> None:
    """Do what is due, unless that is left to other servers."""
    if not config.sweep_seconds:
        tell("WARNING: this server does not sweep: holds lapse and leases end if another one does")
        return
    await Sweeper(ledger, store).run(config.sweep_seconds)


def _sealer(config: Config, store: Store, tell: Tell) -> Sealer | None:
    """What seals what is recorded, unless that is left to other servers."""
    if not config.seal_seconds:
        tell("WARNING: this server does not seal: checkpoints are made if another one does")
        return None
    key = _signing_key(config)
    if key is None:
        tell(
            "without a signing_key_file this server does not seal: checkpoints are made if another one"
            " does"
        )
        return None
    tell(f"checkpoints are signed with the key {key.key_id.hex()}")
    return Sealer(store, key, config.seal_seconds)


def _signing_key(config: Config) -> SigningKey | None:
    """What checkpoints are signed with: the configured key, or one of the server's own."""
    if config.signing_key_file is not None:
        return SigningKey.load(config.signing_key_file)
    if config.database_url is not None:
        return None
    own = config.data_dir / OWN_KEY
    with contextlib.suppress(SigningKeyInvalid):
        return SigningKey.make(own)
    # It is there, maybe since a moment ago: several servers may use one directory.
    return SigningKey.load(own)


def _announce(config: Config, address: str) -> None:
    """Tell other programs that calls are served: the file is there as a whole, or not at all."""
    if config.ready_file is None:
        return
    ready = {"listening": address, "pid": os.getpid(), "database": config.told_database}
    unfinished = config.ready_file.with_name(f"{config.ready_file.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(ready) + "\n", encoding="utf-8")
    unfinished.replace(config.ready_file)


async def _drain(server: Server, ledger: Ledger, seconds: float, stop: asyncio.Event) -> None:
    """Take no new calls, and finish what was accepted; told to stop once more, do not wait for it."""
    finishing = asyncio.create_task(_finish(server, ledger, seconds))
    impatient = asyncio.create_task(stop.wait())
    await asyncio.wait((finishing, impatient), return_when=asyncio.FIRST_COMPLETED)
    impatient.cancel()
    if finishing.done():
        await finishing
        return
    finishing.cancel()
    await server.stop(0)


async def _finish(server: Server, ledger: Ledger, seconds: float) -> None:
    await server.stop(seconds)
    # Calls have their answers by now, or are cancelled.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(COMMIT_SECONDS_MAX):
            await ledger.drain()
