"""List the benchmarks, or run one of them by name.

    python -m benchmarks                    list all, grouped by question
    python -m benchmarks NAME [options]     run one; `NAME --help` shows its options

Run it from the root of the repository.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
# The empty name stands for the modules directly in the folder.
GROUPS = ("", "league", "speed", "scale", "science")


def find_benchmarks() -> dict[str, Path]:
    """Return the files of all modules with a function `main`, keyed by module name."""
    found = {}
    for group in GROUPS:
        for path in sorted((FOLDER / group).glob("[!_]*.py")):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body):
                found[path.stem] = path
    return found


def module_name(path: Path) -> str:
    """Return the dotted module name of a benchmark."""
    return ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts)


def summary(path: Path) -> str:
    """Return the first docstring line of a module file."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def main() -> None:
    """Run the benchmark that is named on the command line, or list all benchmarks."""
    benchmarks = find_benchmarks()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print((__doc__ or "").strip())
        for group in GROUPS:
            title = summary(FOLDER / group / "__init__.py")
            print(f"\n{group}: {title}" if group else f"\n{title}")
            for name, path in benchmarks.items():
                if path.parent == FOLDER / group:
                    print(f"  {name:20} {summary(path)}")
        return
    name = sys.argv[1]
    if name not in benchmarks:
        sys.exit(f"no benchmark {name!r}; choose from {', '.join(sorted(benchmarks))}")
    sys.argv = [f"python -m benchmarks {name}", *sys.argv[2:]]
    importlib.import_module(module_name(benchmarks[name])).main()


if __name__ == "__main__":
    main()
