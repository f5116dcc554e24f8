"""What a method is, in words: a plain sentence for the built-in ones, and the first lines of its docstring for all."""

from __future__ import annotations

from collections.abc import Iterable

from hetero_fl.algorithms import Algorithm, algorithm
from hetero_fl.errors import UserError
from hetero_fl.reporting.method_names import ALGORITHMS
from hetero_fl.reporting.wording import algorithm_base, algorithm_name


def docstring(label: str) -> str:
    """The first paragraph of a method's docstring as one line; empty where it has none, or cannot be imported here."""
    try:
        kind = algorithm[algorithm_base(label)]
    except UserError:
        return ""
    text = kind.__doc__ if isinstance(kind, type) and issubclass(kind, Algorithm) else None
    return " ".join((text or "").strip().partition("\n\n")[0].split())


def explained(label: str) -> str:
    """What the method does: in plain words if it is built in, else in those of its docstring."""
    base = algorithm_base(label)
    return ALGORITHMS[base][1] if base in ALGORITHMS else docstring(label)


def described(labels: Iterable[str]) -> list[tuple[str, str, str]]:
    """(name, plain words, docstring) of each method, once, whatever the settings; one's own have a docstring only."""
    found = []
    for base in dict.fromkeys(map(algorithm_base, labels)):
        own = docstring(base) or ("" if base in ALGORITHMS else "It has no docstring.")
        found.append((algorithm_name(base), ALGORITHMS[base][1] if base in ALGORITHMS else "", own))
    return found
