"""Imported last by the process that servers are forked from: it makes what each of them would make anew.

A search for garbage writes into whatever it looks at, so that each server would have to copy all of that.
What is there by then is no garbage.
"""

from __future__ import annotations

import gc

from peculium_server.cli.verbs import command

with command().make_context("peculium", ["serve"], resilient_parsing=True):
    # The first arguments that are parsed have much imported.
    pass
gc.collect()
gc.freeze()
