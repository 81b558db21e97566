"""The import contract that import-linter lacks: nothing outside the standard library."""

from __future__ import annotations

import sys
from typing import cast

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output
from importlinter.domain.imports import Module


class StandardLibraryOnly(Contract):
    """Modules that import themselves and the standard library, but for what is `forbidden` of it."""

    type_name = "standard_library_only"

    modules = fields.ListField(subfield=fields.ModuleField())
    forbidden = fields.SetField(subfield=fields.StringField(), default=frozenset())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:  # noqa: ARG002 - the base class's signature
        """Find the imports of anything else."""
        # import-linter puts a field's parsed value where the field was declared.
        modules, forbidden = cast("list[Module]", self.modules), cast("set[str]", self.forbidden)
        inside = {name for top in modules for name in {top.name, *graph.find_descendants(top.name)}}
        allowed = sys.stdlib_module_names - forbidden
        broken = sorted(
            f"{importer} imports {imported}"
            for importer in inside
            for imported in graph.find_modules_directly_imported_by(importer)
            if imported not in inside and imported.partition(".")[0] not in allowed
        )
        return ContractCheck(kept=not broken, metadata={"broken": broken})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print what `check` found."""
        for line in check.metadata["broken"]:
            output.print_error(line)
