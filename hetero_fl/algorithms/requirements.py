"""What a method sends and what it needs, in a few words each, from what its class declares."""

from __future__ import annotations

from hetero_fl.algorithms.base import Algorithm

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


def is_bound(kind: type[Algorithm]) -> bool:
    """Whether others are measured against it and do not compete: all rows or all models are in one place."""
    return kind.needs_all_clients


def is_baseline(kind: type[Algorithm]) -> bool:
    """Whether it is no federation at all: the line to beat."""
    return not kind.counts_traffic and not kind.needs_all_clients


def describe_needs(method: Algorithm) -> list[Need]:
    """What has to be there besides clients with rows, the weightiest first; what the method brings itself is not in it."""
    kind = type(method)
    uploads = method.uploads
    alike = _averages_parameters(method) and kind.aggregation_group is Algorithm.aggregation_group
    found: list[Need] = [(EVERYTHING,)] if kind.needs_all_clients else []
    if kind.needs_proxy:
        found.append((LABELED_PROXY if method.reads_proxy_labels else PROXY,))
    elif alike:
        found.append(
            (PROXY, ALIKE) if any(spec.kind == "rows" for spec in uploads.values()) else (ALIKE,)
        )
    found += [(word,) for each in reversed(kind.__mro__) for word in vars(each).get("requires", ())]
    if any(spec.use == "each" for spec in uploads.values()):
        found.append((ONE_BY_ONE,))
    return list(dict.fromkeys(found))


def shared_kinds(method: Algorithm) -> list[str]:
    """What may leave a client, by kind; of the model only a part where the method shares no more."""
    shares = dict.fromkeys(spec.share for spec in method.uploads.values())
    words = [SHARES[share] for share in SHARES if share in shares]
    if method.shared and "parameters" in shares:
        words[0] = f"{', '.join(part.rstrip('.') for part in method.shared)} parameters"
    return words or (["all rows"] if method.needs_all_clients else [])


def supported_tasks(method: Algorithm) -> list[str]:
    """The kinds of target that it is for; empty where any will do."""
    return [] if method.tasks == Algorithm.tasks else [TASKS[task] for task in method.tasks]


def format_needs(needs: list[Need]) -> str:
    """`proxy set, single uploads`; empty if nothing is needed."""
    return ", ".join(" or ".join(need) for need in needs)


def method_summary(kind: type[Algorithm]) -> str:
    """The first sentence of its docstring; empty where it has none."""
    text = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
    head, stop, rest = text.partition(". ")
    while stop and not rest[:1].isupper():  # `et al. 2017`
        more, stop, rest = rest.partition(". ")
        head = f"{head}. {more}"
    return head + ("." if stop else "")


def _averages_parameters(method: Algorithm) -> bool:
    """Whether a sum of the clients' parameters is what the server works with."""
    model = method.uploads.get("model")
    return model is not None and model.use == "sum" and model.kind in ("params", "update")
