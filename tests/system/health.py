"""What a server says of its own health."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS_MAX = 60
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.UNKNOWN
"""No answer: the process is gone, or listens no more."""


async def health(address: str) -> Any:
    """The health of the whole server, as a probe of an orchestrator asks for it."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
        except grpc.aio.AioRpcError:
            return UNKNOWN
        return answer.status


async def becomes(address: str, wanted: int) -> None:
    """Wait until the server says so; that it answers at all may never cease meanwhile."""
    async with asyncio.timeout(SECONDS_MAX):
        while (found := await health(address)) != wanted:
            assert found != UNKNOWN, "the server does not answer at all"
            await asyncio.sleep(0.05)
