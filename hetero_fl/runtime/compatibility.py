"""Combinations that cannot work, refused before anything is computed, in one line that names both keys."""

from __future__ import annotations

from collections import Counter

from hetero_fl.algorithms import Algorithm
from hetero_fl.errors import UserError
from hetero_fl.runtime.federation import Federation


def check(name: str, algorithm: Algorithm, federation: Federation) -> list[str]:
    """Raises UserError for what is impossible; returns lines on what is possible but perhaps not meant."""
    task, proxy = federation.task, federation.data.n_proxy
    settings = [c.settings for c in federation.cards.values()]
    if task.kind not in algorithm.tasks:
        raise UserError(
            f"algorithm.name: {name} is for {', '.join(algorithm.tasks)}, but data.name has a {task.kind} task"
        )
    if algorithm.needs_proxy and not proxy:
        raise UserError(f"algorithm.name: {name} compares predictions on a proxy set, but data.proxy.size is 0")
    shares = {spec.share for spec in algorithm.uploads.values()}
    given = {share for s in settings for share in s.shares} | {"parameters" for s in settings if "backbone" in s.shares}
    if shares and not shares & given:
        raise UserError(
            f"algorithm.name: {name} needs clients that share {' or '.join(sorted(shares))}, but no client's `shares` has it"
        )
    for id, card in federation.cards.items():
        weights = card.settings.class_weights
        if isinstance(weights, list) and len(weights) != task.outputs:
            raise UserError(f"clients: {id}: class_weights: found {len(weights)} numbers for {task.outputs} classes")
    notes = []
    sizes = Counter(c.arch.id for c in federation.cards.values())
    averages = set(algorithm.uploads) == {"model"}
    if averages and len(sizes) > 1 and max(sizes.values()) == 1 and not federation.common:
        raise UserError(
            f"algorithm.name: {name} averages parameters, but no two clients have a tensor in common "
            "(every `model` differs, clients.common is empty)"
        )
    if averages and (alone := [g for g, n in sizes.items() if n == 1]) and len(federation.cards) > 1 and len(sizes) > 1:
        notes.append(f"{name} averages within an architecture: {', '.join(alone)} stands alone")
    if federation.student is not None and not algorithm.distils and algorithm.counted and algorithm.uploads:
        notes.append(f"server.model is not used: {name} has no consensus on a proxy set from which to distil a student")
    return notes
