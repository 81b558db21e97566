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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Final

from peculium_server.alerter import Alerter
from peculium_server.config import Address, Config, Exporting
from peculium_server.core.throttle import Limits
from peculium_server.deliverer import Deliverer
from peculium_server.embedded import EmbeddedPostgres, EmbeddedPostgresError
from peculium_server.gauges import Gauges
from peculium_server.identity import DEV_PRINCIPAL, Identities
from peculium_server.keyfile import KeyFile
from peculium_server.lanes.ledger import Ledger
from peculium_server.refusals import RefusalCounts
from peculium_server.rpc.server import Server
from peculium_server.rpc.tls import Tls, TlsFiles
from peculium_server.sealer import Sealer
from peculium_server.security import SecurityEvents
from peculium_server.signing import SigningKey, SigningKeyInvalid
from peculium_server.store import migrate
from peculium_server.store.errors import LedgerRestored
from peculium_server.store.store import Store
from peculium_server.sweeper import Sweeper
from peculium_server.telemetry import providers
from peculium_server.telemetry.meters import Meters
from peculium_server.webhooks.addresses import Allowed
from peculium_server.webhooks.keys import WebhookKeys, WebhookKeysInvalid
from peculium_server.webhooks.sending import Sender

PROBE_SECONDS: Final = 2.0
"""How often the server makes sure that the database takes commits, for its health service."""
PROBE_SECONDS_MAX: Final = 5.0
"""A database that takes longer to say where it stands is not one to send callers to."""

COMMIT_SECONDS_MAX: Final = 2.0
"""How long what is being committed may go on after the last call has ended."""

EXPORT_SECONDS_MAX: Final = 2.0
"""How long the last of the telemetry may take to its collector, after everything else has ended."""

OWN_KEY: Final = "checkpoint-key.pem"
"""In the data directory: what signs the checkpoints of a server with a PostgreSQL of its own."""
OWN_WEBHOOK_KEY: Final = "webhook-key"
"""Likewise: what webhooks' secrets are made of."""

FILES_MAX: Final = 65_536
"""Open files, so connections, that the server asks to be allowed."""
FILES_KEPT: Final = 256
"""Of these are not for clients, but for the database, the log, webhooks: whoever floods the server with
connections does not cut it off from these."""

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
        TlsInvalid: The files for TLS cannot be used.
        WebhookKeysInvalid: The file of the key for webhooks cannot be used.
        EmbeddedPostgresError: The server's own PostgreSQL cannot be started.
        StoreError: The database cannot be reached, or not be relied upon, or was restored meanwhile.
        CannotListen: An address is taken.
    """
    _allow_files()
    _leave_no_core()
    exporting = Exporting.load()
    for problem in exporting.problems:
        tell(f"WARNING: {problem}; it is not exported")
    page = config.metrics_listen
    if page is not None and exporting.disabled:
        tell(
            "WARNING: OTEL_SDK_DISABLED is true: nothing is counted, and there is no page of metrics"
        )
        page = None
    telemetry = providers.start(exporting, page)
    try:
        with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
            runner.run(_serve(config, exporting, telemetry, tell))
    finally:
        telemetry.shutdown(EXPORT_SECONDS_MAX)


def _allow_files() -> None:
    """Let as many connect as the machine allows: each is an open file, and shells allow few."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if most == resource.RLIM_INFINITY else min(most, FILES_MAX)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _leave_no_core() -> None:
    """Leave no image of the memory behind if the process crashes: keys and secrets would be in it."""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))


def _connections(config: Config) -> int:
    """How many clients may connect to each address that is listened on."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return config.connections_max
    for_clients = allowed - min(FILES_KEPT, allowed // 2)
    addresses = 1 if config.tls_client_listen is None else 2
    return min(config.connections_max, for_clients // addresses)


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Uvloop's, where it is installed; it is not made for every platform."""
    found = importlib.util.find_spec("uvloop")
    return None if found is None else importlib.import_module("uvloop").new_event_loop


async def _serve(
    config: Config, exporting: Exporting, telemetry: providers.Providers, tell: Tell
) -> None:
    stop, meters = _stop_signal(), Meters() if telemetry.metered else None
    file = None if config.keys_file is None else KeyFile.load(config.keys_file)
    tls = _tls(config)
    async with _database(config, tell, stop) as dsn, _store(config, dsn, meters, tell) as store:
        identities = Identities(file, store.keys, development=_for_development(config))
        await identities.refresh()
        sealer = _sealer(config, store, tell)
        ledger = Ledger(store, queue_rows_max=config.queue_max, meters=meters)
        refusals = await _refusals(config, store, meters)
        security = SecurityEvents(ledger, store.security, config.freeze_on_reuse_seconds, meters)
        sender = _sender(config, tell)
        server = Server(
            ledger,
            store,
            identities,
            message_bytes_max=config.message_bytes_max,
            call_seconds_max=config.call_seconds_max,
            connection_seconds_max=config.connection_seconds_max,
            meters=meters,
            refusals=refusals,
            security=security,
            sender=sender,
            trace_one_in=providers.trace_one_in(exporting),
            limits=Limits(
                rate=config.principal_rate_max,
                burst=config.principal_burst_max,
                at_once=config.principal_operations_max,
                streams=config.principal_streams_max,
            ),
            connections_max=_connections(config),
        )
        address, with_certificate = await _listen(config, server, tls)
        _warn(config, identities, address, telemetry.page, tell)
        _collect_seldom()
        probe = asyncio.create_task(_tell_health(server, store, identities, tell, stop))
        recording = asyncio.create_task(security.run())
        working = [
            asyncio.create_task(each)
            for each in (
                identities.run(),
                _sweep(config, ledger, store, tell),
                *_alerting(config, store, sender, tell),
                *([] if sealer is None else [sealer.run()]),
                *_telling(config, store, meters, refusals),
            )
        ]
        _announce(config, address, with_certificate, telemetry.page)
        tell(f"listening on {address}")
        await stop.wait()
        stop.clear()
        if config.ready_file is not None:
            config.ready_file.unlink(missing_ok=True)
        tell(f"stopping; what was accepted is finished, for at most {config.drain_seconds} s")
        await _cancel(probe, *working)
        await _drain(server, ledger, config.drain_seconds, stop)
        await _end(refusals, security, recording)
        # A database that is silent would keep the rest waiting.
        ledger.abandon()
    tell("stopped")


def _tls(config: Config) -> Tls | None:
    """What connections are encrypted with; None: they are not."""
    if config.tls_cert_file is None or config.tls_key_file is None:
        return None
    return Tls(TlsFiles(config.tls_cert_file, config.tls_key_file, config.tls_client_ca_file))


def _for_development(config: Config) -> bool:
    """Say whether a ledger without keys is for whoever can connect: nobody else can, and none was asked for."""
    return config.listen.loopback and config.tls_client_ca_file is None


async def _listen(
    config: Config, server: Server, tls: Tls | None
) -> tuple[Address, Address | None]:
    """Begin to serve; tell where, and where clients with certificates are served apart from others."""
    if tls is None:
        port = await server.start(str(config.listen))
        return config.listen._replace(port=port), None
    required = config.tls_client_ca_file is not None
    apart = config.tls_client_listen
    if apart is not None:
        own = tls.credentials(client_certificates=True)
        apart = apart._replace(port=server.listen(str(apart), own))
    credentials = tls.credentials(client_certificates=required and apart is None)
    port = await server.start(str(config.listen), credentials)
    return config.listen._replace(port=port), apart


def _warn(
    config: Config, identities: Identities, address: Address, page: Address | None, tell: Tell
) -> None:
    """Tell of settings that are for some only."""
    if identities.dev_mode:
        tell(
            f"WARNING: nobody is asked for a key, since there is none: whoever can connect to {address} may do"
            f" everything, as the principal {DEV_PRINCIPAL!r}. The first key ends that: peculium keys bootstrap"
        )
    elif identities.nobody:
        tell(
            "WARNING: there is no key yet, so nobody may call: make one with peculium keys bootstrap"
        )
    if config.tls_cert_file is None and not address.loopback:
        tell(
            f"WARNING: connections to {address} are NOT ENCRYPTED, as allowed: whoever is on the way can read"
            " keys and secrets, unless something before this server encrypts them"
        )
    if page is not None:
        tell(f"metrics are told at http://{page}/metrics")
        if not page.loopback:
            tell(f"WARNING: whoever can connect to {page} can read the metrics, as allowed")


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
async def _store(
    config: Config, dsn: str, meters: Meters | None, tell: Tell
) -> AsyncIterator[Store]:
    if config.unsafe_settings:
        tell("WARNING: a database that may forget what it has recorded is accepted, as told")
    store = await Store.open(
        dsn,
        readers=config.database_connections,
        unsafe_settings_allowed=config.unsafe_settings,
        meters=meters,
    )
    if store.frozen:
        tell(
            "WARNING: the ledger was restored, or copied: nothing new is spent until an operator runs"
            " peculium restored"
        )
    try:
        yield store
        if store.restored is not None:
            raise LedgerRestored(store.restored)
    finally:
        await store.close()


async def _tell_health(
    server: Server, store: Store, identities: Identities, tell: Tell, stop: asyncio.Event
) -> None:
    """Keep the health service true: the server is of use if the database takes commits, and it knows who may call.

    It stops when the ledger was restored: whatever starts the server starts it for what is there now.
    """
    serving: bool | None = None
    frozen = store.frozen
    while True:
        try:
            async with asyncio.timeout(PROBE_SECONDS_MAX):
                await store.probe()
            identities.now()
            works = True
        except Exception as error:  # noqa: BLE001 - whatever it is, callers would not be served either
            works = False
            if serving is not False:
                reason = str(error) or f"no answer in {PROBE_SECONDS_MAX:g} s"
                _logger.warning("not serving, since operations would fail: %s", reason)
        if works is not serving:
            if works and serving is not None:
                _logger.warning("serving again")
            await server.tell_serving(serving=works)
            serving = works
        if store.restored is not None:
            stop.set()
            return
        if frozen and not store.frozen:
            tell("the ledger goes on, as an operator has said")
        frozen = store.frozen
        await asyncio.sleep(PROBE_SECONDS)


def _alerting(
    config: Config, store: Store, sender: Sender | None, tell: Tell
) -> Iterator[Coroutine[Any, Any, None]]:
    """What looks for alerts and sends them, unless that is left to other servers."""
    if config.alert_seconds:
        yield Alerter(store, config.alert_seconds).run()
    else:
        tell("WARNING: this server does not look for alerts: they are found if another one does")
    if sender is not None:
        yield Deliverer(store, sender).run()


async def _sweep(config: Config, ledger: Ledger, store: Store, tell: Tell) -> None:
    """Do what is due, unless that is left to other servers."""
    if not config.sweep_seconds:
        tell("WARNING: this server does not sweep: holds lapse and leases end if another one does")
        return
    await Sweeper(ledger, store).run(config.sweep_seconds)


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def _end(
    refusals: RefusalCounts | None, security: SecurityEvents, recording: asyncio.Task[None]
) -> None:
    await _cancel(recording)
    await security.end(COMMIT_SECONDS_MAX)
    if refusals is not None:
        await refusals.end(COMMIT_SECONDS_MAX)


def _telling(
    config: Config, store: Store, meters: Meters | None, refusals: RefusalCounts | None
) -> Iterator[Coroutine[Any, Any, None]]:
    """What has to be done in the background for those who want to know how the server is."""
    if meters is not None:
        yield Gauges(store, meters, config.balance_roots or ()).run()
    if refusals is not None:
        yield refusals.run()


async def _refusals(config: Config, store: Store, meters: Meters | None) -> RefusalCounts | None:
    """What counts refusals, unless nobody wants to know."""
    if not config.refusal_days:
        return None
    counts = RefusalCounts(store, config.refusal_days, meters)
    await counts.learn_time()
    return counts


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


def _sender(config: Config, tell: Tell) -> Sender | None:
    """What sends alerts to webhooks, unless that is left to other servers."""
    keys = _webhook_keys(config)
    if keys is None:
        tell(
            "without a webhook_key_file this server has no webhooks: alerts are sent if another one"
            " sends them"
        )
        return None
    if config.webhook_loopback:
        tell("WARNING: webhooks may lead to this machine itself, as told")
    return Sender(keys, Allowed.of(config.webhook_allow or "", loopback=config.webhook_loopback))


def _webhook_keys(config: Config) -> WebhookKeys | None:
    """What webhooks' secrets are made of: the configured keys, or one of the server's own."""
    if config.webhook_key_file is not None:
        return WebhookKeys.load(config.webhook_key_file)
    if config.database_url is not None:
        return None
    own = config.data_dir / OWN_WEBHOOK_KEY
    with contextlib.suppress(WebhookKeysInvalid):
        return WebhookKeys.make(own)
    # It is there, maybe since a moment ago: several servers may use one directory.
    return WebhookKeys.load(own)


def _announce(
    config: Config, address: Address, with_certificate: Address | None, page: Address | None
) -> None:
    """Tell other programs that calls are served: the file is there as a whole, or not at all."""
    if config.ready_file is None:
        return
    ready = {"listening": str(address), "pid": os.getpid(), "database": config.told_database}
    if with_certificate is not None:
        ready["listening_with_certificate"] = str(with_certificate)
    if page is not None:
        ready["metrics_listening"] = str(page)
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
