"""Sending signed messages to addresses that others have given: what may be reached, and how."""
