"""One server with all its secrets, everybody who calls it, and every place where something is written down."""

from __future__ import annotations

import base64
import io
import logging
import secrets
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
import psycopg
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

import peculium
from peculium import ApiKey, Capability
from peculium.v1 import admin_service_pb2 as admin, audit_service_pb2 as audit, types_pb2
from peculium_server.embedded import EmbeddedPostgres, _wheel_programs
from peculium_server.store import migrate, roles
from tests.alerts.receiver import receiving as receiving_webhooks
from tests.audit_sql.test_secrecy import shown as shown_by_views
from tests.leaks import using
from tests.leaks.backstage import (
    Backstage,
    Observed,
    core_dumps,
    files_in,
    free_port,
    recorded,
    traced,
)
from tests.leaks.calling import (
    MESSAGE_BYTES,
    Caller,
    bearer,
    changed,
    wrong_credentials,
    wrong_requests,
)
from tests.leaks.marks import Marks
from tests.leaks.observed import shown
from tests.postgres import as_role
from tests.server import RunningServer, starting
from tests.system.wire import Wire, grant_of, new_id
from tests.system.world import ADMIN, AUDIT, LEDGER, World, accepted_requests, make_world
from tests.telemetry import page
from tests.telemetry.receiver import receiving

HEALTH = "/grpc.health.v1.Health/Check"
POSTGRES = {
    # Everything that it is asked, with all values.
    "log_statement": "all",
    "log_parameter_max_length": "-1",
    "log_parameter_max_length_on_error": "-1",
    "log_min_messages": "info",
    "log_connections": "on",
}


@dataclass
class Scene:
    """What was played, and all that was written down meanwhile."""

    marks: Marks = field(default_factory=Marks)
    planted: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    """Told on purpose, everywhere."""
    channels: dict[str, Sequence[bytes]] = field(default_factory=dict, repr=False)
    served: set[str] = field(default_factory=set)
    """The methods that the server says it has."""
    driven: set[str] = field(default_factory=set)
    statuses: set[str] = field(default_factory=set)
    core_bytes: int = -1
    """As much of its memory the server would leave behind if it crashed."""
    live: Marks = field(default_factory=Marks)
    """The ids of tokens that are live, which auditors are not to see."""
    consumed: Marks = field(default_factory=Marks)
    """Of some that are not."""

    @property
    def name(self) -> str:
        """What is planted, as a name."""
        return f"planted-{self.planted.hex()}"

    @property
    def trace_id(self) -> bytes:
        """What is planted, as that of a trace."""
        return self.planted[:16]

    def leaks(self) -> list[str]:
        """Where something secret can be read, and who tells it there."""
        return sorted(
            {
                f"{channel}: {name}, after {self.marks.told_by(piece, name)}"
                for channel, pieces in self.channels.items()
                for piece in pieces
                for name in self.marks.found_in(piece)
            }
        )

    def told(self) -> set[str]:
        """Where what was planted can be read."""
        planted = Marks()
        planted.add("it", self.planted)
        return {
            channel
            for channel, pieces in self.channels.items()
            if any(planted.found_in(piece) for piece in pieces)
        }


def play(folder: Path, data_dir: Path) -> Scene:
    """Do everything that is to be done, and gather what was written down."""
    scene = Scene()
    with ExitStack() as stack:
        stack.enter_context(recorded(scene.marks))
        backstage = Backstage(folder, scene.marks, scene.name)
        postgres = EmbeddedPostgres.start(data_dir, port=free_port(), settings=POSTGRES)
        stack.callback(postgres.stop)
        migrate.upgrade(postgres.dsn)
        password = (data_dir / "password").read_bytes()
        scene.marks.add("password", password)
        collector = stack.enter_context(receiving())
        observed = Observed()
        start = stack.enter_context(starting(folder, observed.launch))
        with core_dumps():
            server = start(
                *backstage.flags,
                PECULIUM_DATABASE_URL=as_role(postgres.tcp_dsn, roles.SERVER),
                PECULIUM_METRICS_LISTEN="127.0.0.1:0",
                PYTHONFAULTHANDLER="1",
                **{**collector.variables, "OTEL_METRIC_EXPORT_INTERVAL": "1000"},
            )
        scene.core_bytes, _ = psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_CORE)
        log = stack.enter_context(using.logged())
        stack.enter_context(traced(collector))
        _play(scene, backstage, postgres, server, observed, log)
        collector.wait(
            lambda: [each for each in collector.spans if each.trace_id == scene.trace_id]
        )
        scene.channels["page of metrics"] = [page.ask(page.page_of(server))[2].encode()]
        server.stop(signal.SIGABRT)
        scene.channels["log"] = ["\n".join(server.said).encode(), observed.rest()]
        scene.channels["telemetry"] = list(collector.raw)
        scene.channels["data directory"] = list(files_in(data_dir / "cluster"))
        scene.channels["log of PostgreSQL"] = [postgres.log_file.read_bytes()]
    return scene


def _play(
    scene: Scene,
    backstage: Backstage,
    postgres: EmbeddedPostgres,
    server: RunningServer,
    observed: Observed,
    log: io.StringIO,
) -> None:
    folder, key = backstage.folder, backstage.key.reveal()
    said = using.Said()
    channel = grpc.secure_channel(server.address, backstage.credentials)
    caller = Caller(channel, key)
    _use_sdk(scene, backstage, server, said)
    with Wire(server.address, key, backstage.credentials) as wire:
        world = make_world(wire)
    capability = Capability(
        root_id=world.acme.root_id, budget_id=world.acme.budget_id, secret=world.acme.secret
    ).reveal()
    requests = accepted_requests(world) | dict(_requests_about_keys())
    scene.served = _served(channel)
    _call_all(caller, scene, requests, world, capability)
    _tell_what_is_planted(caller, scene, backstage.other.reveal())
    # Before anybody has put a secret into a text: a lane keeps its last operations until it has others, and
    # they say their texts.
    scene.channels["objects of the server"] = [
        _meanwhile(caller, requests, postgres, observed, folder)
    ]
    _call_wrongly(caller, requests, world, capability)
    _fail_inside(caller, requests, postgres)
    scene.channels["command line"] = [
        text.encode()
        for text in using.run_commands(
            server.address, key, folder, postgres.tcp_dsn, capability, scene.name
        )
    ]
    _look_into_database(scene, postgres, world)
    postgres.stop()
    for method, request in requests.items():
        caller.call(method, request, timeout=2)
    scene.channels["errors"], scene.channels["answers"] = caller.errors, caller.answers
    scene.channels["errors of the SDK"] = said.errors
    scene.channels["log of the SDK"] = [log.getvalue().encode()]
    scene.driven, scene.statuses = caller.driven, caller.statuses
    channel.close()


def _use_sdk(scene: Scene, backstage: Backstage, server: RunningServer, said: using.Said) -> None:
    folder, key = backstage.folder, backstage.key.reveal()
    using.refused_connections(server.address, key, folder, said)
    tls = peculium.Tls.of_files(
        ca_file=str(folder / "ca.pem"),
        cert_file=str(folder / "client.crt"),
        key_file=str(folder / "client.key"),
    )
    journal = peculium.Journal(folder / "journal", key=peculium.Journal.new_key())
    with (
        receiving_webhooks() as receiver,
        peculium.connect(
            backstage.with_certificate, api_key=key, tls=tls, journal=journal
        ) as client,
    ):
        webhooks = using.use(client, receiver, scene.name, said)
        kept = client.audit.budget(scene.name)
        scene.channels["objects of the SDK"] = ["\n".join(shown(("peculium",))).encode()]
    scene.channels["webhooks"] = [text.encode() for text in webhooks]
    scene.channels["journal"] = [(folder / "journal").read_bytes()]
    logging.getLogger("peculium").debug("on purpose: %s", scene.name)
    said.errors.append(repr((client, kept)).encode())


def _requests_about_keys() -> Iterator[tuple[str, Message]]:
    key = ApiKey.new()
    next_key = ApiKey.new(key.key_id)
    yield (
        ADMIN + "CreateKey",
        admin.CreateKeyRequest(
            operation_id=new_id(),
            key_id=key.key_id,
            principal="somebody",
            roles=[admin.ROLE_AGENT],
            all_roots=True,
            label="for a test",
            digest=key.digest,
        ),
    )
    rotate = admin.RotateKeyRequest(
        operation_id=new_id(), key_id=key.key_id, digest=next_key.digest
    )
    rotate.overlap.seconds = 60
    yield ADMIN + "RotateKey", rotate
    yield (
        ADMIN + "RevokeKey",
        admin.RevokeKeyRequest(operation_id=new_id(), key_id=key.key_id, reason="why"),
    )
    yield ADMIN + "ListKeys", admin.ListKeysRequest(principal="somebody", page_size=10)


def _served(channel: grpc.Channel) -> set[str]:
    """Every method of the ledger's services, as the server itself lists them."""
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(database)
    return {
        f"/{service}/{method.name}"
        for service in database.get_services()
        if service.startswith("peculium.")
        for method in pool.FindServiceByName(service).methods
    }


def _call_all(
    caller: Caller,
    scene: Scene,
    requests: Mapping[str, Message],
    world: World,
    capability: str,
) -> None:
    """Every method: well, with the planted trace; by nobody, with wrong credentials, and too late."""
    traced = (("traceparent", f"00-{scene.trace_id.hex()}-{'1' * 16}-01"),)
    for method, request in requests.items():
        caller.call(method, request, metadata=(*bearer(caller.key), *traced))
        caller.call(method, request, metadata=bearer(changed(caller.key)))
        for timeout in (1e-9, 1e-3):
            caller.call(method, request, timeout=timeout)
    # What finds out who calls is the same for all.
    for method in (LEDGER + "Spend", AUDIT + "Export", ADMIN + "CreateKey"):
        for metadata in wrong_credentials(caller.key, capability):
            caller.call(method, requests[method], metadata=metadata)
    create = caller.channel.unary_unary(
        ADMIN + "CreateWebhook",
        request_serializer=admin.CreateWebhookRequest.SerializeToString,
        response_deserializer=admin.CreateWebhookResponse.FromString,
    )
    secret = create(world.webhook, metadata=bearer(caller.key)).secret
    scene.marks.add("webhook", base64.b64decode(secret.removeprefix("whsec_")))


def _call_wrongly(
    caller: Caller, requests: Mapping[str, Message], world: World, capability: str
) -> None:
    """Every method with requests that have secrets where none belong, and some that are refused for other reasons."""
    for method, request in requests.items():
        for wrong in wrong_requests(request, (capability, caller.key), world.acme_before.secret):
            caller.call(method, wrong)
    caller.call(LEDGER + "Spend", world.spent)
    caller.call(LEDGER + "Spend", _too_large(world.spent))
    caller.call(HEALTH, health_pb2.HealthCheckRequest(service=capability))


def _tell_what_is_planted(caller: Caller, scene: Scene, key: str) -> None:
    """In an answer, in an error, and by a principal who has its name."""
    named = audit.GetBudgetRequest(budget=types_pb2.BudgetRef(path=scene.name))
    caller.call(AUDIT + "GetBudget", named, metadata=bearer(key))
    caller.call(ADMIN + "Grant", grant_of(scene.name, 1, holder="dev"))


def _too_large(request: Message) -> bytes:
    """The request with a field behind it that nobody knows."""
    size = MESSAGE_BYTES
    length = bytes((size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128, size >> 21))
    return request.SerializeToString() + b"\xc2\x3e" + length + bytes(size)


def _meanwhile(
    caller: Caller,
    requests: Mapping[str, Message],
    postgres: EmbeddedPostgres,
    observed: Observed,
    folder: Path,
) -> bytes:
    """What the server's objects say while it is in the middle of calls, of which none has its answer in time."""
    asked = {method: each for method, each in requests.items() if method.startswith(LEDGER)}
    with (
        psycopg.connect(postgres.dsn) as blocker,
        ThreadPoolExecutor(len(asked)) as pool,
    ):
        blocker.execute("LOCK TABLE budgets IN ACCESS EXCLUSIVE MODE")
        waiting = [pool.submit(caller.call, *each, timeout=2) for each in asked.items()]
        _until_somebody_waits(blocker)
        told = observed.ask(folder / "objects.txt")
        for each in waiting:
            each.result()
        blocker.rollback()
    return told


def _until_somebody_waits(blocker: psycopg.Connection) -> None:
    waits = (
        "SELECT EXISTS (SELECT FROM pg_locks"
        " WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid)))"
    )
    while blocker.execute(waits).fetchone() != (True,):
        pass


def _fail_inside(
    caller: Caller, requests: Mapping[str, Message], postgres: EmbeddedPostgres
) -> None:
    """What the server says of a failure that is its own: a table is not there."""
    with psycopg.connect(postgres.dsn, autocommit=True) as owner:
        owner.execute("ALTER TABLE budgets RENAME TO missing")
        for method, request in requests.items():
            caller.call(method, request, timeout=2)
        owner.execute("ALTER TABLE missing RENAME TO budgets")


def _look_into_database(scene: Scene, postgres: EmbeddedPostgres, world: World) -> None:
    """All that can be had from it by SQL, and what a backup has."""
    for name in ("acme", "child", "other", "owned", "leased", "frozen", "deepest", "parent"):
        scene.live.add(name, getattr(world, name).token_id)
    scene.consumed.add("acme before", world.acme_before.token_id)
    dumped = subprocess.run(
        [str(_wheel_programs() / "pg_dump"), "--dbname", postgres.dsn],
        capture_output=True,
        check=True,
    )
    scene.channels["dump"] = [dumped.stdout]
    with psycopg.connect(postgres.dsn, autocommit=True) as auditor:
        views = [shown_by_views(auditor, output).encode() for output in ("hex", "escape")]
        with psycopg.connect(postgres.dsn, autocommit=True) as planting:
            planting.execute(f"SELECT '{scene.name}'".encode())
            activity = auditor.execute("SELECT a::text FROM pg_stat_activity AS a").fetchall()
    scene.channels["views for auditors"] = views
    scene.channels["activity"] = [row.encode() for (row,) in activity]
