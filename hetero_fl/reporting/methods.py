"""What a method is, in words: a plain sentence for the built-in ones, the first lines of its docstring, what it declares."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from hetero_fl.algorithms import Algorithm, register_algorithm, requirements
from hetero_fl.reporting.formatting import algorithm_base, algorithm_name
from hetero_fl.reporting.method_names import ALGORITHMS
from hetero_fl.utils.text import split_top_level


def method_class(label: str) -> type[Algorithm] | None:
    """Return the class of a label's method; None for a user's own method whose module this process has not imported."""
    return register_algorithm.get_loaded(algorithm_base(label))


def is_bound(label: str) -> bool:
    """Does a label name a bound, which others are measured against?"""
    kind = method_class(label)
    return kind is not None and requirements.is_bound(kind)


def is_baseline(label: str) -> bool:
    """Does it name the line to beat, no federation at all?"""
    kind = method_class(label)
    return kind is not None and requirements.is_baseline(kind)


def method_needs(label: str) -> list[requirements.Need]:
    """What the method needs, with the settings of the label where they are plain."""
    kind = method_class(label)
    if kind is None:
        return []
    own = split_top_level(label[len(algorithm_base(label)) + 1 :], ":")
    settings = dict(pair for s in own if len(pair := s.split("=", 1)) == 2 and "." not in pair[0])
    try:
        return requirements.describe_needs(kind.model_validate(settings))
    except ValidationError:  # a list, say, or a setting without a default
        return requirements.describe_needs(kind.model_construct())


def format_needs(label: str) -> str:
    """The same in words, for a table."""
    return requirements.format_needs(method_needs(label))


def docstring_summary(label: str) -> str:
    """The first paragraph of a method's docstring as one line; empty where it has none, or is not known here."""
    kind = method_class(label)
    return " ".join(((kind.__doc__ if kind else None) or "").strip().partition("\n\n")[0].split())


def explain_method(label: str) -> str:
    """What the method does: in plain words if it is built in, else in those of its docstring."""
    base = algorithm_base(label)
    return ALGORITHMS[base][1] if base in ALGORITHMS else docstring_summary(label)


def describe_methods(labels: Iterable[str]) -> list[tuple[str, str, str, str]]:
    """(name, plain words, docstring, when it is read) of each method, once, whatever the settings; one's own have no plain
    words."""
    found = []
    for base in dict.fromkeys(map(algorithm_base, labels)):
        own = docstring_summary(base) or ("" if base in ALGORITHMS else "It has no docstring.")
        kind = method_class(base)
        read = f"Read: {kind.evaluated_when}." if kind else ""
        found.append(
            (algorithm_name(base), ALGORITHMS[base][1] if base in ALGORITHMS else "", own, read)
        )
    return found
