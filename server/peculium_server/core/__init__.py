"""The ledger's rules: frozen values in, `Accepted` or `Refused` out; no clock, no I/O, no framework.

The server decides with this package, the property tests use it as their subject, and the auditor
re-runs recorded decisions with it. It imports nothing but the standard library.
"""
