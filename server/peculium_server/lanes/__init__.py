"""Lanes: the serial orders in which operations are committed, many at a time.

A lane takes whatever waits when it becomes free, decides it in order, and commits it once.
"""
