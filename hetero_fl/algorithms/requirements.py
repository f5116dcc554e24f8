"""Titles, summaries and requirements of methods as text, for tables and generated pages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from hetero_fl.algorithms.base import Algorithm, Needs
from hetero_fl.algorithms.round_parts import shared_part_of

# A requirement: one description, or several alternatives of which one suffices.
Need = tuple[str, ...]

# Sections of a docstring that follow its paragraphs.
SECTIONS = ("Args", "Attributes", "References", "Example")

PROXY = "proxy set"
SHARED_ARCHITECTURES = "shared architectures"
SINGLE_UPLOADS = "single uploads"
SHARES = {
    "parameters": "parameters",
    "predictions": "predictions",
    "statistics": "class statistics",
    "features": "features and labels of rows",
}
TASKS = {"multiclass": "multi-class", "multilabel": "multi-label", "regression": "regression"}


def method_title(method_class: type[Algorithm]) -> str:
    """Return the title that a class itself defines, or an empty string if it defines none."""
    return str(vars(method_class).get("title", ""))


def needs_of(method_class: type[Algorithm]) -> Needs:
    """Return the requirements of a method with default settings."""
    return method_class.model_construct().needs


def is_reference(method_class: type[Algorithm]) -> bool:
    """Return whether the method is a reference that collects all rows or models in one place."""
    return needs_of(method_class).all_clients


def is_baseline(method_class: type[Algorithm]) -> bool:
    """Return whether the method trains every client alone, without communication."""
    needs = needs_of(method_class)
    return not needs.counts_traffic and not needs.all_clients


def describe_needs(method: Algorithm) -> list[Need]:
    """Return the requirements of a method, in descending order of importance.

    Each requirement is a tuple of alternatives, of which one suffices.
    """
    needs = method.needs
    found: list[Need] = [("all in one place",)] if needs.all_clients else []
    if needs.has_required_proxy:
        found.append(("labeled proxy set" if needs.proxy_set == "labeled" else PROXY,))
    elif needs.one_architecture:
        alternatives = (PROXY,) if needs.proxy_set == "optional" else ()
        found.append((*alternatives, SHARED_ARCHITECTURES))
    found += [(need,) for need in needs.also]
    if any(spec.use == "each" for spec in method.uploads.values()):
        found.append((SINGLE_UPLOADS,))
    return found


def shared_kinds(method: Algorithm) -> list[str]:
    """Return the kinds of information that leave a client, such as `backbone parameters`.

    The list is empty if clients upload nothing.
    """
    shares = dict.fromkeys(spec.needed_share for spec in method.uploads.values())
    words = [SHARES[share] for share in SHARES if share in shares]
    part = shared_part_of(method).part
    if part and "parameters" in shares:
        words[0] = f"{', '.join(prefix.rstrip('.') for prefix in part)} parameters"
    return words or (["all rows"] if method.needs.all_clients else [])


def supported_tasks(method: Algorithm) -> list[str]:
    """Return the supported kinds of task, or an empty list if all kinds are supported."""
    tasks = method.needs.tasks
    return [] if tasks == Needs().tasks else [TASKS[task] for task in tasks]


def format_needs(needs: list[Need]) -> str:
    """Join requirements into a text such as `proxy set, single uploads`.

    The text is empty if there are no requirements.
    """
    return ", ".join(" or ".join(need) for need in needs)


def method_paragraphs(method_class: type[Algorithm]) -> list[str]:
    """Return the paragraphs before the first section of a method's docstring, each as one line."""
    docstring = inspect.cleandoc(method_class.__doc__ or "")
    text = re.split(rf"\n\n(?:{'|'.join(SECTIONS)}):\n", docstring, maxsplit=1)[0]
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def method_references(method_class: type[Algorithm]) -> list[str]:
    """Return the papers in the section "References" of a method's docstring, each as one line."""
    docstring = inspect.cleandoc(method_class.__doc__ or "")
    section = docstring.partition("\n\nReferences:\n")[2].partition("\n\n")[0]
    # Continued lines are indented further.
    entries = re.split(r"\n(?! {8})", section) if section else []
    return [" ".join(entry.split()) for entry in entries]


def method_summary(method_class: type[Algorithm]) -> str:
    """Return the first sentence of a method's docstring, or an empty string without a docstring."""
    # The period of an abbreviation, as in `et al. 2017`, does not end the sentence.
    return re.split(r"(?<=\.) (?=[A-Z])", method_paragraphs(method_class)[0], maxsplit=1)[0]


def declared_properties(kind: type[Algorithm]) -> Iterator[str]:
    """Yield properties of a method, such as `sends parameters` and `needs a proxy set`.

    The properties apply to the method with default settings.
    """
    method = kind.model_construct()
    yield f"sends {', '.join(shared_kinds(method)) or 'nothing'}"
    if needed := describe_needs(method):
        yield f"needs {format_needs(needed)}"
    if kinds := supported_tasks(method):
        yield f"supports only {' and '.join(kinds)} tasks"
