"""Describe methods by their docstrings and declarations."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from hetero_fl.algorithms import Algorithm, register_algorithm, requirements
from hetero_fl.reporting.formatting import algorithm_base, algorithm_name
from hetero_fl.utils.text import split_top_level


def method_class(label: str) -> type[Algorithm] | None:
    """Return the class of a method; None if the module of a user's method is not imported."""
    return register_algorithm.get_loaded(algorithm_base(label))


def is_bound(label: str) -> bool:
    """Return whether a method is a bound, which competes with no other method."""
    kind = method_class(label)
    return kind is not None and requirements.is_bound(kind)


def is_baseline(label: str) -> bool:
    """Return whether a method is the baseline without federation."""
    kind = method_class(label)
    return kind is not None and requirements.is_baseline(kind)


def method_needs(label: str) -> list[requirements.Need]:
    """Return the requirements of a method with the settings of its label."""
    kind = method_class(label)
    if kind is None:
        return []
    own = split_top_level(label[len(algorithm_base(label)) + 1 :], ":")
    settings = dict(pair for s in own if len(pair := s.split("=", 1)) == 2 and "." not in pair[0])
    try:
        return requirements.describe_needs(kind.model_validate(settings))
    except ValidationError:
        # Settings that are no plain values, or a required setting without a value.
        return requirements.describe_needs(kind.model_construct())


def format_needs(label: str) -> str:
    """Return the requirements of a method as text for a table."""
    return requirements.format_needs(method_needs(label))


def docstring_paragraph(label: str, number: int = 0) -> str:
    """Return a paragraph of the docstring of a method as one line; empty if there is none."""
    kind = method_class(label)
    paragraphs = requirements.method_paragraphs(kind) if kind else []
    return paragraphs[number] if number < len(paragraphs) else ""


def describe_methods(labels: Iterable[str]) -> list[tuple[str, str, str, str]]:
    """Return (name, summary, details, time of evaluation) of each method, once for all settings."""
    described = []
    for base in dict.fromkeys(map(algorithm_base, labels)):
        kind = method_class(base)
        summary = docstring_paragraph(base) or "No docstring."
        evaluated = f"Evaluated: {kind.evaluated_when}." if kind else ""
        described.append((algorithm_name(base), summary, docstring_paragraph(base, 1), evaluated))
    return described
