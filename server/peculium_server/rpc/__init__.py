"""The wire: the only part of the server that speaks gRPC.

Interceptors, then a pure codec, then the ledger, and the same way back. `status` is the one place
where a refusal or a failure becomes a gRPC status.
"""
