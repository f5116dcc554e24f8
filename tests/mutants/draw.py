"""Draw mutants at random: small bugs in functions of the packages."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path

from tests.mutants.source import Function, Mutant, find_functions

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "//",
    ast.Pow: "*",
}
KINDS = ("comparison", "constant", "arithmetic", "dropped statement", "swapped arguments")


def draw_mutants(root: Path, count: int, seed: int) -> list[Mutant]:
    """Draw mutants from all functions, equally many of each kind where there are enough.

    Args:
        root: Root of the repository.
        count: Number of mutants.
        seed: Seed of the draw.
    """
    by_kind: dict[str, list[Mutant]] = {kind: [] for kind in KINDS}
    for function in find_functions(root):
        if not function.name.startswith("benchmarks."):
            for kind, mutant in mutants_of(function):
                by_kind[kind].append(mutant)
    generator = random.Random(seed)
    drawn: list[Mutant] = []
    for number, kind in enumerate(KINDS):
        share = (count - len(drawn)) // (len(KINDS) - number)
        drawn += generator.sample(by_kind[kind], min(share, len(by_kind[kind])))
    return drawn


def mutants_of(function: Function) -> Iterator[tuple[str, Mutant]]:
    """Yield all mutants of a function with their kinds, without those of its functions.

    The text that is replaced is the line or lines of the changed expression, which must occur once.
    """
    lines = function.text.splitlines()
    for node in _own_nodes(function.node):
        changed = _change(node)
        if changed is None:
            continue
        kind, new = changed
        first, last = node.lineno - function.node.lineno, node.end_lineno - function.node.lineno
        # Columns of syntax trees count bytes.
        before = lines[first].encode()[: node.col_offset].decode()
        after = lines[last].encode()[node.end_col_offset :].decode()
        old = "\n".join(lines[first : last + 1])
        if function.text.count(old) == 1:
            yield kind, Mutant(function.name, old, f"{before}{new}{after}")


def _own_nodes(parent: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Yield the statements and expressions of a function body, without annotations and f-strings.

    Decorators and defaults are evaluated at import, and functions inside a function are functions
    of their own.
    """
    skipped = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.JoinedStr)
    if isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef):
        children: list[ast.AST] = list(parent.body)
    elif isinstance(parent, ast.AnnAssign):
        children = [parent.value] if parent.value else []
    else:
        children = list(ast.iter_child_nodes(parent))
    for node in children:
        if isinstance(node, skipped):
            continue
        if isinstance(node, ast.expr | ast.stmt):
            yield node
        yield from _own_nodes(node)


def _change(node: ast.AST) -> tuple[str, str] | None:
    """Return the kind of the mutant of a node and its new source, or None."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in COMPARISONS:
            left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
            return "comparison", f"({left}) {COMPARISONS[type(operator)]} ({right})"
        case ast.BinOp(op=operator) if type(operator) in OPERATORS:
            left, right = ast.unparse(node.left), ast.unparse(node.right)
            return "arithmetic", f"({left}) {OPERATORS[type(operator)]} ({right})"
        case ast.Constant(value=int(value) | float(value)):
            return "constant", str(not value if isinstance(value, bool) else value + 1)
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            return "dropped statement", "pass"
        case ast.Call(args=[first, second, *rest]) if not isinstance(first, ast.Starred):
            swapped = ast.Call(node.func, [second, first, *rest], node.keywords)
            return "swapped arguments", ast.unparse(swapped)
    return None
