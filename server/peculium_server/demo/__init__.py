"""A demonstration: agents in several processes spend a real request trace from one capped budget."""

from __future__ import annotations
