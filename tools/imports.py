"""Check which room may import what: `python -m tools.imports`, run by `make lint`.

The table of rooms is `[tool.importlinter]` in pyproject.toml. import-linter needs a root package with a fixed name, but
ours is named after the folder it was cloned into, and `nodes/` imports the library as `..blip_qformer`, which resolves
only inside that package. The check therefore sees the repository as the package `pack`, through a link in a temporary
folder.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output
from importlinter.cli import lint_imports
from importlinter.domain.helpers import module_expressions_to_modules

ROOT = Path(__file__).resolve().parent.parent


class AllowedPackagesContract(Contract):
    """Modules that may import only the listed packages, the standard library and the repository itself.

    import-linter's own contract types list what is forbidden; a new dependency would be on no such list.
    """

    modules = fields.SetField(subfield=fields.ModuleExpressionField())
    as_packages = fields.BooleanField(required=False, default=True)
    packages = fields.SetField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Collect the imports of packages that are not listed."""
        found = []
        for name in sorted(self._module_names(graph)):
            for imported in sorted(graph.find_modules_directly_imported_by(name)):
                external = imported.partition(".")[0] != "pack"
                if external and imported.partition(".")[0] not in self.packages | sys.stdlib_module_names:
                    found += [
                        (name, imported, each["line_number"])
                        for each in graph.get_import_details(importer=name, imported=imported)
                    ]
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print one line for each forbidden import."""
        for name, imported, line in check.metadata["found"]:
            output.print_error(f"{name} is not allowed to import {imported} (line {line})", bold=False)

    def _module_names(self, graph: ImportGraph) -> set[str]:
        names = {module.name for module in module_expressions_to_modules(graph, self.modules)}
        missing = names - graph.modules
        if missing:
            raise ValueError(f"No such module: {', '.join(sorted(missing))}.")
        if self.as_packages:
            names |= {inner for name in names for inner in graph.find_descendants(name)}
        return names


def main() -> int:
    """Check the contracts and print the broken ones.

    Returns:
        The exit code: 0 if all contracts are kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pack").symlink_to(ROOT, target_is_directory=True)
        sys.path.insert(0, folder)
        return lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)


if __name__ == "__main__":
    sys.exit(main())
