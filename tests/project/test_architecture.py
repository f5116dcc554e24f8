"""The layout in docs/explanation/architecture.md: package order, imports and module sizes."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

from tests.support.cases import each_case

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hetero_fl"
PAGE = ROOT / "docs" / "explanation" / "architecture.md"
# Bottom to top: each package may import those before it.
PACKAGES = (
    "utils",
    "config",
    "core",
    "data",
    "engine",
    "robustness",
    "aggregation",
    "communication",
    "algorithms",
    "privacy",
    "federation",
    "reporting",
    "experiment",
    "deployment",
    "cli",
)
MAX_FOLDER_FILES, MAX_MODULE_LINES, MAX_MODULES = 15, 750, 360
# One module per method or group of similar methods.
WIDE_FOLDERS = {"algorithms"}
TEST_FOLDERS = {
    *PACKAGES,
    "contracts",
    "frozen_bits",
    "model_zoo",
    "mutants",
    "project",
    "references",
    "support",
}
BENCHMARK_FOLDERS = {"league", "robustness", "scale", "science", "speed"}


class Import(NamedTuple):
    """A module named by an import statement, a lazy import or a string of another module."""

    importer: str
    imported: str
    line: int
    type_only: bool


def modules() -> dict[str, Path]:
    """Return the file of each module of hetero_fl by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports_of(importer: str, path: Path) -> list[Import]:
    """Return the imports of hetero_fl anywhere in a module."""
    return list(
        _visit(
            ast.parse(path.read_text(encoding="utf-8")), importer, path.name == "__init__.py", False
        )
    )


def _visit(node: ast.AST, importer: str, is_package: bool, type_only: bool) -> Iterator[Import]:
    for name in _names(node, importer, is_package):
        if name.split(".")[0] == "hetero_fl":
            yield Import(importer, name, getattr(node, "lineno", 0), type_only)
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.body:
            yield from _visit(child, importer, is_package, True)
        for child in node.orelse:
            yield from _visit(child, importer, is_package, type_only)
        return
    for child in ast.iter_child_nodes(node):
        yield from _visit(child, importer, is_package, type_only)


def _names(node: ast.AST, importer: str, is_package: bool) -> list[str]:
    """Return the dotted names of modules that a node refers to."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = importer.split(".")
            parts = parts[: len(parts) - node.level + is_package]
            base = ".".join([*parts, base] if base else parts)
        return [
            name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names
        ]
    if isinstance(node, ast.Constant) and node.value in MODULES.keys() - {"hetero_fl"}:
        return [str(node.value)]
    return []


@cache
def all_imports() -> list[Import]:
    """Return the imports of all modules."""
    return [found for name, path in MODULES.items() for found in imports_of(name, path)]


def package(module: str) -> str:
    """Return the package of hetero_fl that a module lies in, or "" for the root."""
    return [*module.split("."), ""][1]


def goes_up(found: Import) -> bool:
    """Return whether an import reaches a package above the importing one."""
    importer, imported = package(found.importer), package(found.imported)
    if importer not in PACKAGES or imported not in PACKAGES:
        return False
    return PACKAGES.index(imported) > PACKAGES.index(importer)


def test_packages_match_the_design() -> None:
    folders = {path.parent for path in PACKAGE.glob("*/**/*.py")}
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}

    assert {folder.relative_to(PACKAGE).parts[0] for folder in folders} == set(PACKAGES)
    assert files == {"__init__.py", "__init__.pyi", "__main__.py", "py.typed"}
    assert all(any((ROOT / "tests" / name).rglob("test_*.py")) for name in PACKAGES)


def test_packages_import_only_lower_packages() -> None:
    assert not [found for found in all_imports() if goes_up(found)]
    importers = {found.importer for found in all_imports() if found.imported == "hetero_fl"}
    assert importers <= {"hetero_fl"}


def test_model_zoo_imports_nothing_of_hetero_fl() -> None:
    for path in (ROOT / "model_zoo").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert not imports_of(name, path), path


def test_upward_imports_are_found_in_any_form() -> None:
    source = """
if TYPE_CHECKING:
    from hetero_fl.cli.commands import parser
def late():
    import hetero_fl.federation.trainer
    importlib.import_module("hetero_fl.cli.commands")
"""
    found = list(_visit(ast.parse(source), "hetero_fl.utils.errors", False, False))

    assert [(i.imported, i.type_only) for i in found if goes_up(i)] == [
        ("hetero_fl.cli.commands", True),
        ("hetero_fl.federation.trainer", False),
        ("hetero_fl.cli.commands", False),
    ]
    relative = ast.parse("from ..cli import commands\nfrom .registry import Registry").body
    assert [
        name for node in relative for name in _names(node, "hetero_fl.utils.errors", False)
    ] == [
        "hetero_fl.cli.commands",
        "hetero_fl.utils.registry",
    ]


def test_folders_and_modules_are_of_readable_size() -> None:
    folders = Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    crowded = {
        path.name: n
        for path, n in folders.items()
        if n > MAX_FOLDER_FILES and path.name not in WIDE_FOLDERS
    }
    lines = {
        name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()
    }
    long = {name: n for name, n in lines.items() if n > MAX_MODULE_LINES}

    assert not crowded
    assert not long
    assert len(MODULES) <= MAX_MODULES


@each_case(("top", "folders"), [("tests", TEST_FOLDERS), ("benchmarks", BENCHMARK_FOLDERS)])
def test_tests_and_benchmarks_are_in_matching_folders(top: str, folders: set[str]) -> None:
    files = [path.relative_to(ROOT / top) for path in (ROOT / top).rglob("*.py")]
    loose = {path.name for path in files if len(path.parts) == 1}

    assert {path.parts[0] for path in files if len(path.parts) > 1} <= folders
    assert loose <= {
        "__init__.py",
        "__main__.py",
        "common.py",
        "conftest.py",
        "record.py",
    }


# The page


def test_page_lists_packages_in_order() -> None:
    listed = re.findall(
        r"^\| `hetero_fl/(\w+)/` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )

    assert tuple(reversed(listed)) == PACKAGES


def test_functions_named_on_the_page_exist() -> None:
    named = re.findall(r"`([\w.]+)\(\)` in `([\w/]+\.py)`", PAGE.read_text(encoding="utf-8"))

    assert len(named) > 10
    for function, file in named:
        module = "hetero_fl." + file.removesuffix(".py").replace("/", ".")
        assert callable(resolve_name(f"{module}:{function}")), (function, file)
