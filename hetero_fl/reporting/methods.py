"""What a method is, in words, from its docstring and what its class declares."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from hetero_fl.algorithms import Algorithm, register_algorithm, requirements
from hetero_fl.reporting.formatting import algorithm_base, algorithm_name
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


def docstring_paragraph(label: str, number: int = 0) -> str:
    """Return a paragraph of a method's docstring as one line; empty if there is none."""
    kind = method_class(label)
    paragraphs = ((kind.__doc__ if kind else None) or "").strip().split("\n\n")
    return " ".join(paragraphs[number].split()) if number < len(paragraphs) else ""


def describe_methods(labels: Iterable[str]) -> list[tuple[str, str, str, str]]:
    """Return (name, summary, details, when it is evaluated) of each method, once, whatever its settings."""
    found = []
    for base in dict.fromkeys(map(algorithm_base, labels)):
        kind = method_class(base)
        summary = docstring_paragraph(base) or "It has no docstring."
        read = f"Read: {kind.evaluated_when}." if kind else ""
        found.append((algorithm_name(base), summary, docstring_paragraph(base, 1), read))
    return found
