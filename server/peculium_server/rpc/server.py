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
from peculium_server.identity import Identities
from peculium_server.rpc.admin_service import AdminService
from peculium_server.rpc.audit_service import AuditService
from peculium_server.rpc.interceptors import (
    DeadlineInterceptor,
    DecodingInterceptor,
    ErrorInterceptor,
    IdentityInterceptor,
    Registry,
    TelemetryInterceptor,
)
from peculium_server.rpc.ledger_service import LedgerService
from peculium_server.rpc.operating import Executing, Operator
from peculium_server.rpc.permissions import SERVICES
from peculium_server.rpc.reading import Reader
from peculium_server.store.store import Store

_METADATA_BYTES_MAX: Final = 16 * 1024
_KEEPALIVE_MS: Final = 30_000
_KEEPALIVE_TIMEOUT_MS: Final = 10_000
_PING_INTERVAL_MS_MIN: Final = 10_000
"""A client that asks more often than this whether the server is there is sent away."""
_WHOLE_SERVER: Final = ""
"""The name under which the health service speaks of all services at once."""


class CannotListen(Exception):
    """The address cannot be listened on: it is in use, or not one of this machine's."""


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
    ) -> None:
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", message_bytes_max),
                ("grpc.max_metadata_size", _METADATA_BYTES_MAX),
                # Two servers on one address would each get some of the calls.
                ("grpc.so_reuseport", 0),
                # A peer that is gone without a word is noticed, and clients may ask likewise.
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
                ("grpc.http2.min_ping_interval_without_data_ms", _PING_INTERVAL_MS_MIN),
            ],
        )
        surrounded: Any = Registry(
            self._server,
            # From the outside to the inside: each may rely on what those before it have done.
            [
                # First of all, so that every call has a name and a span, however it ends.
                TelemetryInterceptor(trace.get_tracer_provider()),
                # Then the boundary: what any of the following raises becomes a status.
                ErrorInterceptor(),
                # Who is unknown, or may not, costs nothing more.
                IdentityInterceptor(identities),
                # What is late already is not even parsed.
                DeadlineInterceptor(call_seconds_max),
                DecodingInterceptor(call_seconds_max),
            ],
        )
        operator, reader = Operator(ledger), Reader(store)
        ledger_service_pb2_grpc.add_LedgerServiceServicer_to_server(
            LedgerService(operator, reader, store), surrounded
        )
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminService(operator), surrounded
        )
        self._audit = AuditService(reader, store)
        audit_service_pb2_grpc.add_AuditServiceServicer_to_server(self._audit, surrounded)
        # These tell nothing of the ledger, and anybody may ask them.
        bare: Any = Registry(self._server, [])
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, bare)
        reflected = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(reflected), bare
        )

    async def start(self, address: str) -> int:
        """Listen on `host:port`, where port 0 is any free one, and return the port.

        Calls are served from now on; health says so only after `tell_serving`.

        Raises:
            CannotListen: It is not possible there.
        """
        await self.tell_serving(serving=False)
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise CannotListen(
                f"cannot listen on {address}: in use, or not this machine's"
            ) from error
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
