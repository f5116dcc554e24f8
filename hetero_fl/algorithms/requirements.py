"""What a method is called, sends and needs, in words for tables, from what its class declares."""

from __future__ import annotations

from hetero_fl.algorithms.base import Algorithm, Needs, shared_part_of

Need = tuple[str, ...]  # one thing, or alternatives of which any will do

EVERYTHING = "all in one place"
PROXY = "proxy set"
ALIKE = "one architecture"
ONE_BY_ONE = "single uploads"
LABELED_PROXY = "labeled proxy set"
SHARES = {
    "parameters": "parameters",
    "predictions": "predictions",
    "statistics": "class statistics",
    "features": "features and labels of rows",
}
TASKS = {"multiclass": "multi-class", "multilabel": "multi-label", "regression": "regression"}


def method_title(kind: type[Algorithm]) -> str:
    """Return the class's own title, not that of a base; empty if it has none."""
    return str(vars(kind).get("title", ""))


def needs_of(kind: type[Algorithm]) -> Needs:
    """Return what a class needs with default settings."""
    return kind.model_construct().needs


def is_bound(kind: type[Algorithm]) -> bool:
    """Return whether others are measured against it: all rows or all models are in one place."""
    return needs_of(kind).all_clients


def is_baseline(kind: type[Algorithm]) -> bool:
    """Return whether it is no federation at all: the line to beat."""
    needs = needs_of(kind)
    return not needs.counts_traffic and not needs.all_clients


def describe_needs(method: Algorithm) -> list[Need]:
    """Return what a method needs of a federation in words, the most important first."""
    needs = method.needs
    found: list[Need] = [(EVERYTHING,)] if needs.all_clients else []
    if needs.proxy_set == "optional" and needs.one_architecture:
        found.append((PROXY, ALIKE))
    elif needs.proxy_set == "required":
        found.append((PROXY,))
    elif needs.proxy_set == "labeled":
        found.append((LABELED_PROXY,))
    elif needs.one_architecture:
        found.append((ALIKE,))
    found += [(need,) for need in needs.also]
    if any(spec.use == "each" for spec in method.uploads.values()):
        found.append((ONE_BY_ONE,))
    return found


def shared_kinds(method: Algorithm) -> list[str]:
    """Return what may leave a client, by kind; of the model only a part where the method shares no more."""
    shares = dict.fromkeys(spec.needed_share for spec in method.uploads.values())
    words = [SHARES[share] for share in SHARES if share in shares]
    part = shared_part_of(method).part
    if part and "parameters" in shares:
        words[0] = f"{', '.join(prefix.rstrip('.') for prefix in part)} parameters"
    return words or (["all rows"] if method.needs.all_clients else [])


def supported_tasks(method: Algorithm) -> list[str]:
    """Return the kinds of target that it is for; empty where any will do."""
    tasks = method.needs.tasks
    return [] if tasks == Needs().tasks else [TASKS[task] for task in tasks]


def format_needs(needs: list[Need]) -> str:
    """Return needs as `proxy set, single uploads`; empty if there are none."""
    return ", ".join(" or ".join(need) for need in needs)


def method_summary(kind: type[Algorithm]) -> str:
    """Return the first sentence of its docstring; empty if it has none."""
    text = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
    head, stop, rest = text.partition(". ")
    while stop and not rest[:1].isupper():  # `et al. 2017`
        more, stop, rest = rest.partition(". ")
        head = f"{head}. {more}"
    return head + ("." if stop else "")
