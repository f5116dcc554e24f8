"""Find functions by name in a source tree and replace text inside them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("hetero_fl", "model_zoo", "benchmarks")


class MutantError(ValueError):
    """A mutant that cannot be applied: its function or its text is not there exactly once."""


@dataclass(frozen=True)
class Function:
    """A function or method, and where its source lies."""

    name: str
    """Dotted name from the package on, as `hetero_fl.aggregation.means.mean`."""

    path: Path
    first_line: int
    last_line: int


def find_functions(root: Path) -> list[Function]:
    """Return all functions and methods of the packages under `root`."""
    found: list[Function] = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found.extend(_functions_in(tree, module.removesuffix(".__init__"), path))
    return found


def _functions_in(parent: ast.AST, prefix: str, path: Path) -> list[Function]:
    found: list[Function] = []
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{node.name}"
            if not isinstance(node, ast.ClassDef):
                assert node.end_lineno is not None
                found.append(Function(name, path, node.lineno, node.end_lineno))
            found.extend(_functions_in(node, name, path))
        else:
            found.extend(_functions_in(node, prefix, path))
    return found


def mutate(functions: list[Function], name: str, old: str, new: str) -> tuple[Path, str]:
    """Replace text inside one function.

    Args:
        functions: All functions of the tree.
        name: The function's dotted name, or an ending of it that only this function has.
        old: The text to replace; it occurs exactly once in the function.
        new: The text to put in its place.

    Returns:
        The file and its full text with the replacement made.

    Raises:
        MutantError: If the function or the text is not found exactly once.
    """
    matching = [f for f in functions if f.name.endswith(f".{name}")]
    if len(matching) != 1:
        places = ", ".join(f.name for f in matching) or "none"
        raise MutantError(f"{name}: expected one function of this name, found {places}")
    function = matching[0]
    lines = function.path.read_text(encoding="utf-8").splitlines(keepends=True)
    before = "".join(lines[: function.first_line - 1])
    body = "".join(lines[function.first_line - 1 : function.last_line])
    after = "".join(lines[function.last_line :])
    if body.count(old) != 1:
        raise MutantError(f"{name}: expected {old!r} once, found it {body.count(old)} times")
    return function.path, before + body.replace(old, new) + after
