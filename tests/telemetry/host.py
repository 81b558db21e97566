"""One host of a run: accepts what it is handed, does some work, and hands a part of it on.

    python host.py SERVER [COLLECTOR] < {"capability": …, "carrier": …}

With a collector its spans go there; without one it has set up nothing.
"""

from __future__ import annotations

import json
import sys

from opentelemetry import trace

import peculium
from peculium import Child


def main(server: str, collector: str) -> None:
    if collector:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor

        provider = TracerProvider()
        exporter = OTLPSpanExporter(endpoint=f"http://{collector}", insecure=True)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
    job = json.load(sys.stdin)
    with peculium.connect(server) as client:
        budget = client.accept(job["capability"], carrier=job["carrier"])
        with budget.reserve(2) as hold:
            hold.settle(1)
        [made] = budget.delegate([Child("next", budget.balances().available // 2)])
        handed = {"capability": made.capability.reveal(), "carrier": dict(made.carrier)}
    sys.stdout.write(json.dumps(handed))


if __name__ == "__main__":
    main(*sys.argv[1:])
