"""The gRPC server: services, interceptors, health and reflection put together."""

from __future__ import annotations

from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from opentelemetry import trace

from peculium.v1 import (
    admin_service_pb2_grpc,
    audit_service_pb2_grpc,
    ledger_service_pb2_grpc,
)
from peculium_server.config import CannotListen
from peculium_server.core.throttle import Limits
from peculium_server.identity import Identities
from peculium_server.rpc.admin_service import AdminService
from peculium_server.rpc.alerting import Alerts
from peculium_server.rpc.audit_service import AuditService
from peculium_server.rpc.interceptors import (
    DeadlineInterceptor,
    DecodingInterceptor,
    ErrorInterceptor,
    IdentityInterceptor,
    Registry,
    TelemetryInterceptor,
)
from peculium_server.rpc.keys import Keyring
from peculium_server.rpc.ledger_service import LedgerService
from peculium_server.rpc.operating import Executing, Noticing, Operator
from peculium_server.rpc.permissions import SERVICES
from peculium_server.rpc.reading import Reader
from peculium_server.rpc.refusing import Counting
from peculium_server.rpc.throttling import ThrottleInterceptor
from peculium_server.store.store import Store
from peculium_server.telemetry.meters import Meters
from peculium_server.webhooks.sending import Sender

CONNECTIONS_MAX: Final = 16_000
"""At each address; whoever comes beyond is turned away before a handshake."""
STREAMS_MAX: Final = 2_000
"""Calls at once on a connection, those that are just ending included: gRPC counts them, and refuses what comes
beyond without a word of why."""
HANDSHAKE_MS: Final = 10_000
"""Until a new connection has said what it has to: TLS, and the settings of HTTP/2."""
IDLE_MS: Final = 600_000
"""A connection without a call is closed then; clients open another one by themselves."""
_METADATA_BYTES_MAX: Final = 16 * 1024
_KEEPALIVE_MS: Final = 30_000
_KEEPALIVE_TIMEOUT_MS: Final = 10_000
_PING_INTERVAL_MS_MIN: Final = 10_000
"""A client that asks more often than this whether the server is there is sent away."""
_WHOLE_SERVER: Final = ""
"""The name under which the health service speaks of all services at once."""


class Server:
    """The ledger on the network."""

    def __init__(
        self,
        ledger: Executing,
        store: Store,
        identities: Identities,
        *,
        message_bytes_max: int,
        call_seconds_max: float,
        connection_seconds_max: int = 0,
        meters: Meters | None = None,
        refusals: Counting | None = None,
        security: Noticing | None = None,
        sender: Sender | None = None,
        trace_one_in: int = 1,
        limits: Limits | None = None,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        """Put it together; nothing is served yet.

        Args:
            ledger: Decides.
            store: What is read.
            identities: Who may call.
            message_bytes_max: Of a request.
            call_seconds_max: Until a call ends.
            connection_seconds_max: Until a client is told to connect anew; 0: never.
            meters: Counts what happens, if anybody wants to know.
            refusals: Counts what was refused, if anybody wants to know.
            security: Records what refusals are a sign of, likewise.
            sender: Sends tests to webhooks, and makes their secrets; None without a key for that.
            trace_one_in: Of the calls that come without a trace context one in so many is spanned.
            limits: Of each principal; None: none.
            connections_max: At each address.
        """
        self._server = grpc.aio.server(
            options=[
                *_options(message_bytes_max, connections_max),
                *_age(connection_seconds_max),
            ]
        )
        surrounded: Any = Registry(
            self._server,
            # From the outside to the inside: each may rely on what those before it have done.
            [
                # First of all, so that every call has a name and a span, however it ends.
                TelemetryInterceptor(trace.get_tracer_provider(), meters, one_in=trace_one_in),
                # Then the boundary: what any of the following raises becomes a status.
                ErrorInterceptor(),
                # Who is unknown, or may not, costs nothing more.
                IdentityInterceptor(identities),
                # So does who asks too much.
                *([] if limits is None else [ThrottleInterceptor(limits, meters)]),
                # What is late already is not even received.
                DeadlineInterceptor(call_seconds_max),
                DecodingInterceptor(call_seconds_max),
            ],
        )
        operator, reader = Operator(ledger, refusals, security), Reader(store)
        alerts = Alerts(reader, store, sender)
        ledger_service_pb2_grpc.add_LedgerServiceServicer_to_server(
            LedgerService(operator, reader, store), surrounded
        )
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminService(operator, Keyring(store, identities), alerts), surrounded
        )
        self._audit = AuditService(reader, store, alerts)
        audit_service_pb2_grpc.add_AuditServiceServicer_to_server(self._audit, surrounded)
        # These tell nothing of the ledger, and anybody may ask them.
        bare: Any = Registry(self._server, [])
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, bare)
        reflected = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(reflected), bare
        )

    def listen(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Listen on `host:port`, where port 0 is any free one, and return the port.

        Args:
            address: Where.
            credentials: How connections are encrypted; None: not at all.

        Raises:
            CannotListen: It is not possible there.
        """
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise CannotListen(address) from error

    async def start(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Listen as `listen` does, and begin: here, and wherever else was listened before.

        Calls are served from now on; health says so only after `tell_serving`.

        Raises:
            CannotListen: It is not possible there.
        """
        await self.tell_serving(serving=False)
        port = self.listen(address, credentials)
        await self._server.start()
        return port

    async def tell_serving(self, *, serving: bool) -> None:
        """Tell the health service's callers whether operations are being answered."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in (_WHOLE_SERVER, *SERVICES):
            await self._health.set(service, status)

    async def stop(self, grace_seconds: float) -> None:
        """Take no new calls, and end when those in progress have, or when the grace is over."""
        await self._health.enter_graceful_shutdown()
        # These would never end by themselves.
        self._audit.close()
        await self._server.stop(grace_seconds)


def _age(seconds_max: int) -> tuple[tuple[str, int], ...]:
    """What ends connections that are older; calls on them may go on for as long as they take."""
    return (("grpc.max_connection_age_ms", seconds_max * 1_000),) if seconds_max else ()


def _options(message_bytes_max: int, connections_max: int) -> list[tuple[str, int]]:
    """How the transport bounds what connections may cost, also those that nobody has been let in on yet."""
    return [
        ("grpc.max_receive_message_length", message_bytes_max),
        # The same for both: between them some calls would be refused, by chance.
        ("grpc.max_metadata_size", _METADATA_BYTES_MAX),
        ("grpc.absolute_max_metadata_size", _METADATA_BYTES_MAX),
        ("grpc.max_allowed_incoming_connections", connections_max),
        ("grpc.max_concurrent_streams", STREAMS_MAX),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
        # Two servers on one address would each get some of the calls.
        ("grpc.so_reuseport", 0),
        # A peer that is gone without a word is noticed, and clients may ask likewise.
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _PING_INTERVAL_MS_MIN),
    ]
