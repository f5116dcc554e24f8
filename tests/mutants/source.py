"""Find functions in a source tree, and replace text inside them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("hetero_fl", "model_zoo", "benchmarks")


class MutantError(ValueError):
    """A mutant that cannot be applied: its function or its text is not there exactly once."""


@dataclass(frozen=True)
class Mutant:
    """One small bug.

    Attributes:
        function: The function's dotted name, or an ending of it that only this function has.
        replace: Text that occurs exactly once in the function.
        by: The text that the bug puts in its place.
    """

    function: str
    replace: str
    by: str


@dataclass(frozen=True)
class Function:
    """A function or method, and where its source lies.

    Attributes:
        name: Dotted name from the package on, as `hetero_fl.aggregation.uploads.owners_of`.
        path: The file.
        node: The definition.
        text: The source of the definition.
    """

    name: str
    path: Path
    node: ast.FunctionDef | ast.AsyncFunctionDef
    text: str


@dataclass(frozen=True)
class Change:
    """A mutant that was applied to the text of a file.

    Attributes:
        path: The file.
        text: The text of the file with the bug.
        lines: Numbers of the changed lines in the original file.
    """

    path: Path
    text: str
    lines: range


def find_functions(root: Path) -> list[Function]:
    """Return all functions and methods of the packages under `root`."""
    return [
        function
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        for function in _functions_of(root, path)
    ]


def _functions_of(root: Path, path: Path) -> Iterator[Function]:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)

    def search(parent: ast.AST, prefix: str) -> Iterator[Function]:
        for node in ast.iter_child_nodes(parent):
            name = prefix
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}.{node.name}"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                source = "".join(lines[node.lineno - 1 : node.end_lineno])
                yield Function(name, path, node, source)
            yield from search(node, name)

    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    yield from search(ast.parse(text), module)


def mutate(functions: list[Function], mutant: Mutant) -> Change:
    """Replace text inside one function.

    Args:
        functions: All functions of the tree.
        mutant: The mutant.

    Raises:
        MutantError: If the function or the text is not found exactly once.
    """
    matching = [f for f in functions if f".{f.name}".endswith(f".{mutant.function}")]
    if len(matching) != 1:
        places = ", ".join(f.name for f in matching) or "none"
        raise MutantError(f"{mutant.function}: expected one function of this name, found {places}")
    (function,) = matching
    count = function.text.count(mutant.replace)
    if count != 1:
        raise MutantError(
            f"{mutant.function}: expected {mutant.replace!r} once, found it {count} times"
        )
    lines = function.path.read_text(encoding="utf-8").splitlines(keepends=True)
    first, last = function.node.lineno, function.node.end_lineno
    changed = function.text.replace(mutant.replace, mutant.by)
    start = first + function.text.partition(mutant.replace)[0].count("\n")
    return Change(
        function.path,
        "".join([*lines[: first - 1], changed, *lines[last:]]),
        range(start, start + mutant.replace.count("\n") + 1),
    )
