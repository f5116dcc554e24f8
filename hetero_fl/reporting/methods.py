"""Describe methods, based on the docstrings and requirements of their classes.

A label consists of the name of a method and optional settings, such as `hybrid:teacher=mean`.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from hetero_fl.algorithms import Algorithm, register_algorithm, requirements
from hetero_fl.reporting.formatting import algorithm_base, algorithm_name
from hetero_fl.utils.text import split_top_level


def method_class(label: str) -> type[Algorithm] | None:
    """Return the class of a method, or None if the class is user-defined and not imported."""
    return register_algorithm.get_loaded(algorithm_base(label))


def is_reference(label: str) -> bool:
    """Return whether a method is a reference, which is not ranked with other methods."""
    kind = method_class(label)
    return kind is not None and requirements.is_reference(kind)


def is_baseline(label: str) -> bool:
    """Return whether a method is a baseline, which trains each client alone."""
    kind = method_class(label)
    return kind is not None and requirements.is_baseline(kind)


def method_needs(label: str) -> list[requirements.Need]:
    """Return the requirements of a method, which may depend on the settings in the label.

    The list is empty if the class of the method is not imported.
    """
    kind = method_class(label)
    if kind is None:
        return []
    own = split_top_level(label[len(algorithm_base(label)) + 1 :], ":")
    settings = dict(pair for s in own if len(pair := s.split("=", 1)) == 2 and "." not in pair[0])
    try:
        return requirements.describe_needs(kind.model_validate(settings))
    except ValidationError:
        # A setting of the label is not a plain value, or a required setting has no value.
        return requirements.describe_needs(kind.model_construct())


def format_needs(label: str) -> str:
    """Return the requirements of a method as text for a table, which is empty without any."""
    return requirements.format_needs(method_needs(label))


def docstring_paragraph(label: str, number: int = 0) -> str:
    """Return a paragraph of a method's docstring as one line.

    Args:
        label: Label of the method.
        number: Index of the paragraph. Default: 0.

    Returns:
        The paragraph, or an empty string if there is none.
    """
    kind = method_class(label)
    paragraphs = requirements.method_paragraphs(kind) if kind else []
    return paragraphs[number] if number < len(paragraphs) else ""


def describe_methods(labels: Iterable[str]) -> list[tuple[str, str, str, str]]:
    """Return the name, summary, details and time of evaluation of each method.

    Labels of the same method with different settings share a single entry.
    """
    described = []
    for base in dict.fromkeys(map(algorithm_base, labels)):
        kind = method_class(base)
        summary = docstring_paragraph(base) or "No docstring."
        evaluated = f"Evaluated: {kind.evaluated_when}." if kind else ""
        described.append((algorithm_name(base), summary, docstring_paragraph(base, 1), evaluated))
    return described
