"""Combinations that cannot work, refused before anything is computed, in one line that names both keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.architecture import Architecture
from hetero_fl.errors import UserError, nearest
from hetero_fl.runtime.dry import Expectations
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.hooks import broadcast, is_own, told
from hetero_fl.runtime.links import idle
from hetero_fl.runtime.secure_check import check_secure_sum
from hetero_fl.state import Kind, floats
from model_zoo import ModelError, is_batch_norm

GATHERED = 10_000  # clients of whom a method may need everybody's rows or models in one place


def check(name: str, algorithm: Algorithm, federation: Federation) -> list[str]:
    """Raises UserError for what is impossible; returns lines on what is possible but perhaps not meant."""
    task, proxy = federation.task, federation.data.n_proxy
    settings = [kind.settings for kind in federation.cards.kinds]
    if task.kind not in algorithm.tasks:
        raise UserError(
            f"algorithm.name: {name} is for {', '.join(algorithm.tasks)}, but data.name has a {task.kind} task"
        )
    if algorithm.needs_proxy and not proxy:
        raise UserError(
            f"algorithm.name: {name} compares predictions on a proxy set, but data.proxy.size is 0; set it above 0, so that "
            "so many training rows are public, or name another set in data.proxy.source"
        )
    if algorithm.reads_proxy_labels and not federation.data.has_proxy_labels:
        raise UserError(
            f"algorithm.initial_phase: found true, with which {name} trains on labels of the proxy set, but "
            "data.proxy.labels is false; set it to true, or algorithm.initial_public_epochs to 0"
        )
    said = {n: spec for n, spec in algorithm.uploads.items() if spec.kind != "counts"}  # these go with something else
    shares = {spec.share for spec in said.values()}
    given = {share for s in settings for share in s.shares} | {"parameters" for s in settings if s.parts}
    if shares and not shares & given:
        needed = " or ".join(sorted(shares))
        raise UserError(
            f"algorithm.name: {name} needs clients that share {needed}, but no client's `shares` has it; add it in "
            "clients.defaults.shares, or to those who may send it"
        )
    if algorithm.everybody and len(federation.cards) > GATHERED:
        raise UserError(
            f"algorithm.name: {name} brings all clients' rows or models together, at most {GATHERED:,} of them; found "
            f"{len(federation.cards):,} clients"
        )
    _check_prefixes(name, algorithm, federation)
    _check_class_weights(federation)
    _check_extras(algorithm, federation)
    _check_batches(algorithm, federation)
    if is_own(algorithm):
        _rehearse(algorithm, federation)
    notes = [*idle(name, algorithm, federation), *check_secure_sum(name, algorithm, federation)]
    if algorithm.reads_proxy_labels:
        notes.append(
            f"{name} trains on the labels of the proxy set before a client's first round (algorithm.initial_phase)"
        )
    travel = {s.kind for s in said.values() if s.share in given and (s.kind != "rows" or proxy)}
    averages = "model" in said and travel <= {"params", "update"}
    if averages and algorithm.uploads["model"].use == "sum" and len(federation.cards) > 1:
        alone = _alone(algorithm, federation)
        if sum(kind.count for kind in alone) == len(federation.cards):
            raise UserError(
                f"algorithm.name: {name} averages parameters here, but no two clients send a tensor in common; give "
                "clients the same `model`, let their `shares` overlap, or name common prefixes in clients.common"
            )
        if alone:
            groups = dict.fromkeys(kind.arch.id for kind in alone)
            verb = "stands" if len(groups) == 1 else "stand"
            notes.append(f"{name} averages within an architecture: {', '.join(groups)} {verb} alone")
    return notes


@told()
def _rehearse(algorithm: Algorithm, federation: Federation) -> None:
    """The clients' part of the first round, without computing: slips in an own method show before anybody trains.

    Raises UserError, and RunFailed if the method itself does not run.
    """
    server, expectations = federation.server(), Expectations(algorithm, federation)
    algorithm.start(server)
    for kind in federation.cards.kinds:
        card = federation.cards[kind.first]
        expectations.of(card, broadcast(algorithm, server, card), 0)


def _alone(algorithm: Algorithm, federation: Federation) -> list[Kind]:
    """The clients that send no tensor which another sends, too: averaging gives them nothing."""
    sent, owners = [], Counter[Any]()
    for kind in federation.cards.kinds:
        tensors = algorithm.portion(kind.arch, federation.initial(kind.arch), algorithm.part(kind.settings))
        common = [n for n in tensors if federation.common and n.startswith(federation.common)]
        family = algorithm.family(federation.cards[kind.first])
        mine: set[tuple[str, tuple[int, ...], str]] = {(n, (), family) for n in tensors if n not in common}
        mine |= {(n, tuple(tensors[n].shape), "") for n in common}  # the owners of hetero_fl.aggregation.averaging
        owners.update(dict.fromkeys(mine, kind.count))
        sent.append((kind, mine))
    return [kind for kind, mine in sent if all(owners[owner] == 1 for owner in mine)]


def _check_prefixes(name: str, algorithm: Algorithm, federation: Federation) -> None:
    """Parts of models that are named by the first words of their tensors' names have to be there."""
    kinds = federation.cards.kinds
    wanted = dict.fromkeys(federation.common, "clients.common")
    named = {p: f"clients: {k.first}: shares" for k in kinds for p in k.settings.shares if p.endswith(".")}
    if not wanted and not named:
        return
    names = {n for arch in {kind.arch for kind in kinds} for n in floats(federation.initial(arch))}
    for prefix, where in (wanted | named).items():
        if not any(n.startswith(prefix) for n in names):
            deep = prefix.count(".")
            parts = {".".join(n.split(".")[:i]) + "." for n in names for i in range(1, max(1, deep) + 1)}
            raise UserError(f"{where}: no tensor's name begins with '{prefix}'{nearest(prefix, parts)}")
    if named and algorithm.slot != "model" and not any(_travels(algorithm, kind) for kind in kinds):
        raise UserError(
            f"algorithm.name: {name} averages a small model beside each client's own, of which no "
            f"client's `shares` names a part; found '{next(iter(named))}'"
        )


def _travels(algorithm: Algorithm, kind: Kind) -> bool:
    """Whether a client of this kind sends anything of its model in the method's slot."""
    arch, part = algorithm.extras(kind.arch)[algorithm.slot], algorithm.part(kind.settings)
    return any(part is None or n.startswith(part) for n in arch.shapes)


def _check_class_weights(federation: Federation) -> None:
    task = federation.task
    for kind in federation.cards.kinds:
        weights, where = kind.settings.class_weights, f"clients: {kind.first}: class_weights"
        if weights is not None and task.kind != "multiclass":
            raise UserError(f"{where}: is for classes that exclude one another, but data.name has a {task.kind} task")
        if not isinstance(weights, list):
            continue
        if len(weights) != task.outputs:
            raise UserError(f"{where}: found {len(weights)} numbers for {task.outputs} classes")
        if min(weights) < 0:
            raise UserError(f"{where}: found {min(weights):g}; weights are 0 or more")
        if min(weights) > 0:
            continue
        for id in federation.some:
            if federation.cards[id].settings is not kind.settings:
                continue
            if not any(w * n for w, n in zip(weights, federation.counts(id).tolist(), strict=True)):
                where = f"clients: {id}: class_weights"
                raise UserError(f"{where}: found {weights}, which is 0 for every training row of {id}; raise one")


def _check_extras(algorithm: Algorithm, federation: Federation) -> None:
    """Build every model that the method adds once."""
    for arch in dict.fromkeys(kind.arch for kind in federation.cards.kinds):
        try:
            for extra in algorithm.extras(arch).values():
                extra.check()
        except ModelError as error:
            raise UserError(f"algorithm.{algorithm.slot}: {error}") from None


def _check_batches(algorithm: Algorithm, federation: Federation) -> None:
    """BatchNorm cannot train on one example: it has no variance."""
    normalises: dict[Architecture, bool] = {}
    for where, arch in _single_batches(algorithm, federation):
        if arch not in normalises:
            with torch.random.fork_rng(devices=[]):
                normalises[arch] = any(map(is_batch_norm, arch.build().modules()))
        if normalises[arch]:
            raise UserError(
                f"{where}, but {arch.name} has BatchNorm, which cannot train on batches of one; take 2 or more, "
                "or a model without it"
            )


def _single_batches(algorithm: Algorithm, federation: Federation) -> Iterator[tuple[str, Architecture]]:
    """Where models are trained on batches of one: the key at fault, and the model."""
    for kind in federation.cards.kinds:
        if kind.settings.batch_size == 1:
            for arch in (kind.arch, *algorithm.extras(kind.arch).values()):
                yield f"clients: {kind.first}: batch_size: found 1", arch
    for id in federation.data.with_one_row():
        own = federation.cards[id].arch
        for arch in (own, *algorithm.extras(own).values()):
            yield f"clients: {id}: data: found 1 training row", arch
    size, proxy = getattr(algorithm, "proxy_batch_size", None), federation.data.n_proxy
    if size is not None and proxy and min(size, proxy) == 1:
        where = "algorithm.proxy_batch_size: found 1" if size == 1 else "data.proxy: found 1 row"
        for kind in federation.cards.kinds:
            yield where, kind.arch
        if federation.student is not None:
            yield where, federation.student
