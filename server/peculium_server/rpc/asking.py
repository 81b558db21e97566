"""Asking another server how it is: its health service, which anybody may ask."""

from __future__ import annotations

from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from peculium import Tls

SERVING: Final = "SERVING"


def health(target: str, tls: Tls | bool, *, seconds_max: float) -> str:
    """What a server says of itself: SERVING, NOT_SERVING; or why it says nothing.

    Args:
        target: As host:port, or any name that grpc knows.
        tls: How to encrypt the connection; False: not at all.
        seconds_max: How long to wait for it.
    """
    with _channel(target, Tls() if tls is True else tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=seconds_max)
        except grpc.RpcError as error:
            return f"no answer: {error.code().name}"
        said: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return said


def _channel(target: str, tls: Tls | bool) -> grpc.Channel:
    if not isinstance(tls, Tls):
        return grpc.insecure_channel(target)
    credentials = grpc.ssl_channel_credentials(
        tls.root_certificates, tls.private_key, tls.certificate_chain
    )
    name = tls.server_name
    options = () if name is None else (("grpc.ssl_target_name_override", name),)
    return grpc.secure_channel(target, credentials, options)
