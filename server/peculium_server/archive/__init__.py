"""Exports as files: what an auditor takes away, and checks without database and server."""
