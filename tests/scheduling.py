"""Which worker runs which tests: those of a module that share what it makes run in one of them.

A server, a cluster or an environment that is made for a module would otherwise be made again in each
worker. All other tests go wherever there is room. A worker knows what its tests use, whoever distributes
them knows their ids: which modules are to be kept together it reads in a file that each worker writes.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

_folder = pytest.StashKey["tempfile.TemporaryDirectory[str]"]()

_INPUT = "peculium_together"
_FILE = "together.json"


class ModulesTogether(LoadScopeScheduling):
    """Gives each worker one test after the other, and all tests of a module that is kept together at once."""

    def __init__(self, config: pytest.Config, log: Producer, told: Path) -> None:
        super().__init__(config, log)
        self._told = told
        self._together: frozenset[str] | None = None

    def _split_scope(self, nodeid: str) -> str:
        if self._together is None:
            # Nothing is asked before every worker has collected its tests, and told.
            self._together = frozenset(json.loads(self._told.read_text()))
        module = _module(nodeid)
        return module if module in self._together else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Name a worker the folder for the file."""
    config: pytest.Config = node.config  # type: ignore[attr-defined]
    if _folder not in config.stash:
        config.stash[_folder] = tempfile.TemporaryDirectory(prefix="peculium-together-")
    node.workerinput[_INPUT] = config.stash[_folder].name  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ModulesTogether | None:
    """Distribute in groups, if that is asked for: by modules, and no test has to say so."""
    if config.getvalue("dist") != "loadgroup":
        return None
    return ModulesTogether(config, log, Path(config.stash[_folder].name) / _FILE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Write the file, as all other workers do."""
    given = getattr(config, "workerinput", None)
    if given is None:
        return
    together = {_module(item.nodeid) for item in items if _shares(item)}
    told = Path(given[_INPUT]) / _FILE
    unfinished = told.with_suffix(f".{secrets.token_hex(4)}")
    unfinished.write_text(json.dumps(sorted(together)))
    unfinished.rename(told)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove it."""
    if _folder in config.stash:
        config.stash[_folder].cleanup()


def _module(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _shares(item: pytest.Item) -> bool:
    """Say whether a test uses anything that is made once for its module."""
    if not isinstance(item, pytest.Function):
        return False
    used = item._fixtureinfo.name2fixturedefs.values()
    return any(each.scope == "module" for definitions in used for each in definitions)
