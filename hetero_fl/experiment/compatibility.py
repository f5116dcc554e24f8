"""Refuse combinations of features that cannot work together, each in one line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import AsyncPolicy, shareable_tensors, shared_part, shared_part_of
from hetero_fl.communication.secure_aggregation.crypto import num_neighbours
from hetero_fl.communication.secure_aggregation.protocol import TensorKey, VectorLayout
from hetero_fl.config import Config
from hetero_fl.config.base import StalenessConfig
from hetero_fl.config.communication import SecureAggregationConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import ClientProfile, floating_tensors
from hetero_fl.experiment.protection_checks import single_upload_reason
from hetero_fl.federation.channel import DerivedSetup, idle_stages
from hetero_fl.federation.dry_run import check_user_method
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.simulation.devices import Devices
from hetero_fl.federation.user_methods import is_user_method
from hetero_fl.utils.errors import UserError, suggest_or_list
from model_zoo import ModelError, is_batch_norm

# What cannot be summed in secret, refused before anything is computed; and what a sum would tell
# all the same, said.

ROUNDING = ("quantize", "half")  # stages that change numbers only
FEWEST = 3  # clients: of a sum of two, each knows the other's part
KEY = "channel.secure_sum"


def check_secure_aggregation(
    name: str, algorithm: Algorithm, federation: FederationSpec
) -> list[str]:
    """Raises UserError for what is impossible; returns lines on what is possible but perhaps not meant."""
    config = federation.channel.secure_sum
    cohort = federation.cohort
    if config is None or not algorithm.uploads:
        return []
    if single := [item for item, spec in algorithm.uploads.items() if spec.use == "each"]:
        raise UserError(
            f"algorithm.name: {name} needs single uploads ({', '.join(single)}), but {KEY} tells only their sum; take a method "
            "that needs no more, such as hybrid, fedmd, fedavg or fedproto, or leave the key out"
        )
    if cut := [stage.kind for stage in federation.channel.compress if stage.kind not in ROUNDING]:
        raise UserError(
            f"channel.compress: found {cut[0]}, but {KEY} adds whole vectors, in which nothing is left out; take "
            f"{' or '.join(ROUNDING)}, or leave one of the keys out"
        )
    if cohort < FEWEST:
        many = f"{cohort} client{'s' if cohort != 1 else ''}"
        raise UserError(
            f"{KEY}: found {many} in a round; a sum hides a part of it among {FEWEST} or more"
        )
    _check_threshold(config, cohort)
    _check_range(config, cohort)
    needed = num_neighbours(cohort, config.min_survivors(cohort))
    notes = []
    if config.neighbours is not None and config.neighbours < needed:
        notes.append(
            f"{KEY}.neighbours: {config.neighbours} are fewer than the {needed} that keep an upload hidden though a fifth "
            "of all clients tell the server what they know"
        )
    if federation.channel.compress:
        notes.append(
            f"channel.compress rounds what clients add up; under {KEY} it makes no message shorter"
        )
    return [*notes, *_alone_in_sum(algorithm, federation)]


def _check_threshold(config: SecureAggregationConfig, cohort: int) -> None:
    least = config.min_survivors(cohort)
    if least > cohort:
        raise UserError(
            f"{KEY}.threshold: found {least}, but a round has {cohort} clients (clients.per_round)"
        )
    if 2 * least <= cohort:
        raise UserError(
            f"{KEY}.threshold: found {least}, which is not more than half of the {cohort} clients of a round; choose "
            f"{cohort // 2 + 1} or more"
        )


def _check_range(config: SecureAggregationConfig, cohort: int) -> None:
    most = config.max_fraction_bits(cohort)
    if most < 1:
        raise UserError(
            f"{KEY}.range: found {config.range:g}; sums over {cohort} clients leave 64-bit integers"
        )
    if config.num_fraction_bits(cohort) > most:
        raise UserError(
            f"{KEY}.fraction_bits: found {config.num_fraction_bits(cohort)}; with {KEY}.range {config.range:g} sums over {cohort} clients "
            f"leave 64-bit integers, choose {most} or fewer"
        )


def _alone_in_sum(algorithm: Algorithm, federation: FederationSpec) -> list[str]:
    """The clients of which a sum holds something that no other client sends: it tells that as it is."""
    derived = DerivedSetup(algorithm, federation)
    owners = Counter[TensorKey]()
    layout = VectorLayout(derived.expectations.protection.specs, federation.common)
    sent = []
    for kind in federation.client_infos.profiles:
        # a round in which it shares
        form = derived.upload_form(kind.first, kind.settings.share_every - 1)
        sent.append((kind, layout.tensor_keys(kind.arch.spec_id, form)))
        owners.update(dict.fromkeys(sent[-1][1], kind.count))
    alone = [kind for kind, places in sent if any(owners[place] == 1 for place in places)]
    who = f"for {federation.client_infos.format_clients(alone)}: nobody else sends such tensors, and their sum is what the client has"
    return [f"{KEY} hides nothing of some items {who}"] if alone else []


# Combinations that cannot work, refused before anything is computed, in one line that names both
# keys.

GATHERED = 10_000  # clients of whom a method may need everybody's rows or models in one place


def check_compatibility(name: str, algorithm: Algorithm, federation: FederationSpec) -> list[str]:
    """Raises UserError for what is impossible; returns lines on what is possible but perhaps not meant."""
    task = federation.task
    proxy = federation.data.n_proxy
    settings = [kind.settings for kind in federation.client_infos.profiles]
    if task.kind not in algorithm.needs.tasks:
        raise UserError(
            f"algorithm.name: {name} is for {', '.join(algorithm.needs.tasks)}, but data.name has a {task.kind} task"
        )
    if algorithm.needs.has_required_proxy and not proxy:
        raise UserError(
            f"algorithm.name: {name} compares predictions on a proxy set, but data.proxy.size is 0; set it above 0, so that "
            "so many training rows are public, or name another set in data.proxy.source"
        )
    if algorithm.needs.proxy_set == "labeled" and not federation.data.has_proxy_labels:
        raise UserError(
            f"algorithm.initial_phase: found true, with which {name} trains on labels of the proxy set, but "
            "data.proxy.labels is false; set it to true, or algorithm.initial_public_epochs to 0"
        )
    # these go with something else
    said = {n: spec for n, spec in algorithm.uploads.items() if spec.kind != "counts"}
    shares = {spec.share for spec in said.values()}
    given = {share for s in settings for share in s.shares} | {
        "parameters" for s in settings if s.shared_prefixes
    }
    if shares and not shares & given:
        needed = " or ".join(sorted(shares))
        raise UserError(
            f"algorithm.name: {name} needs clients that share {needed}, but no client's `shares` has it; add it in "
            "clients.defaults.shares, or to those who may send it"
        )
    if algorithm.needs.all_clients and len(federation.client_infos) > GATHERED:
        raise UserError(
            f"algorithm.name: {name} brings all clients' rows or models together, at most {GATHERED:,} of them; found "
            f"{len(federation.client_infos):,} clients"
        )
    _check_prefixes(name, algorithm, federation)
    _check_class_weights(federation)
    _check_extras(federation)
    _check_batches(algorithm, federation)
    if is_user_method(algorithm):
        check_user_method(algorithm, federation)
    notes = [
        *idle_stages(name, algorithm, federation),
        *check_secure_aggregation(name, algorithm, federation),
    ]
    if algorithm.needs.proxy_set == "labeled":
        notes.append(
            f"{name} trains on the labels of the proxy set before a client's first round (algorithm.initial_phase)"
        )
    travel = {s.kind for s in said.values() if s.share in given and (s.kind != "rows" or proxy)}
    averages = "model" in said and travel <= {"params", "update"}
    if averages and algorithm.uploads["model"].use == "sum" and len(federation.client_infos) > 1:
        alone = _clients_without_partner(algorithm, federation)
        if sum(kind.count for kind in alone) == len(federation.client_infos):
            raise UserError(
                f"algorithm.name: {name} averages parameters here, but no two clients send a tensor in common; give "
                "clients the same `model`, let their `shares` overlap, or name common prefixes in clients.common"
            )
        if alone:
            groups = dict.fromkeys(kind.arch.spec_id for kind in alone)
            verb = "stands" if len(groups) == 1 else "stand"
            notes.append(
                f"{name} averages within an architecture: {', '.join(groups)} {verb} alone"
            )
    return notes


def _clients_without_partner(
    algorithm: Algorithm, federation: FederationSpec
) -> list[ClientProfile]:
    """The clients that send no tensor which another sends, too: averaging gives them nothing."""
    sent = []
    owners = Counter[Any]()
    for kind in federation.client_infos.profiles:
        part = shared_part(algorithm, kind.settings)
        initial = federation.initial_tensors(kind.arch)
        tensors = shareable_tensors(algorithm, kind.arch, initial, part)
        common = [n for n in tensors if federation.common and n.startswith(federation.common)]
        family = kind.arch.group_id
        mine: set[tuple[str, tuple[int, ...], str]] = {
            (n, (), family) for n in tensors if n not in common
        }
        # the owners of hetero_fl.aggregation.means
        mine |= {(n, tuple(tensors[n].shape), "") for n in common}
        owners.update(dict.fromkeys(mine, kind.count))
        sent.append((kind, mine))
    return [kind for kind, mine in sent if all(owners[owner] == 1 for owner in mine)]


def _check_prefixes(name: str, algorithm: Algorithm, federation: FederationSpec) -> None:
    """Parts of models that are named by the first words of their tensors' names have to be there."""
    kinds = federation.client_infos.profiles
    wanted = dict.fromkeys(federation.common, "clients.common")
    named = {
        p: f"clients: {k.first}: shares"
        for k in kinds
        for p in k.settings.shares
        if p.endswith(".")
    }
    if not wanted and not named:
        return
    names = {
        n
        for arch in {kind.arch for kind in kinds}
        for n in floating_tensors(federation.initial_tensors(arch))
    }
    for prefix, where in (wanted | named).items():
        if not any(n.startswith(prefix) for n in names):
            deep = prefix.count(".")
            parts = {
                ".".join(n.split(".")[:i]) + "." for n in names for i in range(1, max(1, deep) + 1)
            }
            raise UserError(
                f"{where}: no tensor's name begins with '{prefix}'{suggest_or_list(prefix, parts)}"
            )
    if (
        named
        and shared_part_of(algorithm).slot != "model"
        and not any(_shares_anything(algorithm, kind) for kind in kinds)
    ):
        raise UserError(
            f"algorithm.name: {name} averages a small model beside each client's own, of which no "
            f"client's `shares` names a part; found '{next(iter(named))}'"
        )


def _shares_anything(algorithm: Algorithm, kind: ClientProfile) -> bool:
    """Whether a client of this kind sends anything of its model in the method's slot."""
    arch = kind.models[shared_part_of(algorithm).slot]
    part = shared_part(algorithm, kind.settings)
    return any(part is None or n.startswith(part) for n in arch.shapes)


def _check_class_weights(federation: FederationSpec) -> None:
    task = federation.task
    for kind in federation.client_infos.profiles:
        weights = kind.settings.class_weights
        where = f"clients: {kind.first}: class_weights"
        if weights is not None and task.kind != "multiclass":
            raise UserError(
                f"{where}: is for classes that exclude one another, but data.name has a {task.kind} task"
            )
        if not isinstance(weights, list):
            continue
        if len(weights) != task.outputs:
            raise UserError(f"{where}: found {len(weights)} numbers for {task.outputs} classes")
        if min(weights) < 0:
            raise UserError(f"{where}: found {min(weights):g}; weights are 0 or more")
        if min(weights) > 0:
            continue
        for id in federation.num_evaluated:
            if federation.client_infos[id].settings is not kind.settings:
                continue
            if not any(
                w * n for w, n in zip(weights, federation.label_counts(id).tolist(), strict=True)
            ):
                where = f"clients: {id}: class_weights"
                raise UserError(
                    f"{where}: found {weights}, which is 0 for every training row of {id}; raise one"
                )


def _check_extras(federation: FederationSpec) -> None:
    """Build every model that the method adds once."""
    checked = {kind.arch for kind in federation.client_infos.profiles}
    for kind in federation.client_infos.profiles:
        for slot, arch in kind.models.items():
            if arch in checked:
                continue
            try:
                arch.check()
            except ModelError as error:
                raise UserError(f"algorithm.{slot}: {error}") from None
            checked.add(arch)


def _check_batches(algorithm: Algorithm, federation: FederationSpec) -> None:
    """BatchNorm cannot train on one example: it has no variance."""
    normalises: dict[ModelSpec, bool] = {}
    for where, arch in _single_batches(algorithm, federation):
        if arch not in normalises:
            with torch.random.fork_rng(devices=[]):
                normalises[arch] = any(map(is_batch_norm, arch.build().modules()))
        if normalises[arch]:
            raise UserError(
                f"{where}, but {arch.name} has BatchNorm, which cannot train on batches of one; take 2 or more, "
                "or a model without it"
            )


def _single_batches(
    algorithm: Algorithm, federation: FederationSpec
) -> Iterator[tuple[str, ModelSpec]]:
    """Where models are trained on batches of one: the key at fault, and the model."""
    for kind in federation.client_infos.profiles:
        if kind.settings.batch_size == 1:
            for arch in kind.models.values():
                yield f"clients: {kind.first}: batch_size: found 1", arch
    for id in federation.data.clients_with_one_row():
        for arch in federation.client_infos[id].models.values():
            yield f"clients: {id}: data: found 1 training row", arch
    size = getattr(algorithm, "proxy_batch_size", None)
    proxy = federation.data.n_proxy
    if size is not None and proxy and min(size, proxy) == 1:
        where = "algorithm.proxy_batch_size: found 1" if size == 1 else "data.proxy: found 1 row"
        for kind in federation.client_infos.profiles:
            yield where, kind.arch
        if federation.student is not None:
            yield where, federation.student


# Whether a run waits for its cohorts or is asynchronous, and what cannot be: refused in one line
# that names both keys.


def set_run_mode(
    config: Config, method: Algorithm, federation: FederationSpec
) -> tuple[Config, FederationSpec, list[str]]:
    """The configuration and the federation with the mode that the method has, and lines that say what was decided.

    An asynchronous run has as many versions as its uploads make: learning rates move along them. Raises UserError for what
    cannot run asynchronously, and for its settings in a run that does not.
    """
    runtime = config.runtime
    name = config.algorithm["name"]
    notes = []
    policy = method.needs.asynchronous
    if policy is not None and runtime.mode == "sync":
        runtime = runtime.model_copy(update={"mode": "async"})
        config = config.model_copy(update={"runtime": runtime})
        notes.append(f"runtime.mode is async: {name} aggregates uploads as they come")
    if runtime.mode == "sync":
        if runtime.buffer is not None:
            raise UserError(
                f"runtime.buffer: found {runtime.buffer}, but a synchronous round takes its whole cohort"
            )
        if runtime.staleness != StalenessConfig():
            raise UserError(
                "runtime.staleness: nothing is stale in synchronous rounds; write runtime.mode=async, or leave this out"
            )
        return config, federation, notes
    _check_mode(config, method, federation)
    places = config.clients.per_round or len(federation.client_infos)
    policy = policy or AsyncPolicy()
    goal = policy.buffer_size or runtime.buffer or places
    uploads = config.rounds * places
    if goal > uploads:
        key = "algorithm.buffer" if policy.buffer_size else "runtime.buffer"
        raise UserError(
            f"{key}: found {goal}, but {config.rounds} rounds of {places} clients take {uploads} uploads: there would be no new "
            f"version; choose {uploads} or fewer"
        )
    if policy.staleness is not None and runtime.staleness != StalenessConfig():
        raise UserError(f"runtime.staleness: is not used: {name} has its own, algorithm.staleness")
    section, key = (
        (policy.staleness, "algorithm")
        if policy.staleness is not None
        else (runtime.staleness, "runtime.staleness")
    )
    notes += [
        f"{key}.{setting} is not used: staleness is {section.kind}"
        for setting in section.unused_keys
    ]
    if goal == 1 and policy.staleness is None and section.kind != "constant":
        notes.append(
            "runtime.staleness has no effect: a version is one upload here (runtime.buffer), and the mean of one is that one "
            "whatever its weight; fedasync moves the server less the staler an upload is"
        )
    if config.devices is None and not federation.data.is_distributed:
        notes.append(
            "without `devices` no task takes any time: all that are given out together end together"
        )
    return (
        config,
        replace(federation, num_rounds=max(1, math.ceil(config.rounds * places / goal))),
        notes,
    )


def _check_mode(config: Config, method: Algorithm, federation: FederationSpec) -> None:
    name = config.algorithm["name"]
    kinds = federation.client_infos.profiles
    if method.needs.all_clients or any(spec.use == "each" for spec in method.uploads.values()):
        raise UserError(
            f"runtime.mode: async cannot be combined with algorithm.name: {name}, which needs the uploads of one cohort "
            "side by side; others are weighted by staleness and summed"
        )
    if config.channel.secure_sum is not None:
        raise UserError(
            "runtime.mode: async cannot be combined with channel.secure_sum, which sums one cohort's uploads"
        )
    if (key := single_upload_reason(config)) is not None:
        raise UserError(
            f"runtime.mode: async cannot be combined with {key}: both look at the uploads of one cohort"
        )
    rows = getattr(method, "proxy_rows", None)
    if rows is not None and rows < federation.data.n_proxy:
        raise UserError(
            f"algorithm.proxy_rows: found {rows}, drawn anew each round; with runtime.mode=async predictions of different "
            f"versions meet, so they have to be of the same rows: leave it out, or lower data.proxy.size"
        )
    rare = [kind.first for kind in kinds if kind.settings.share_every > 1]
    if rare:
        raise UserError(
            f"runtime.mode: async cannot be combined with share_every ({rare[0]}): there are no rounds"
        )
    policy = method.needs.asynchronous or AsyncPolicy()
    if policy.buffer_size is not None and config.runtime.buffer is not None:
        own = (
            f"its own is algorithm.buffer: {policy.buffer_size}"
            if policy.buffer_size > 1
            else "which aggregates after each upload"
        )
        raise UserError(
            f"runtime.buffer: found {config.runtime.buffer}, but algorithm.name is {name}: {own}"
        )
    _check_time(config, federation)
    plain = type(config.cohort)()
    waits = [
        name
        for name in type(plain).model_fields
        if getattr(config.cohort, name) != getattr(plain, name)
    ]
    if waits:
        raise UserError(
            f"cohort.{min(waits)}: is for rounds that wait for a cohort; runtime.mode is async"
        )


def _check_time(config: Config, federation: FederationSpec) -> None:
    """Whoever takes no time among others who do has every turn, and time stands still; on machines of their own it does not."""
    if federation.data.is_distributed:
        return
    paces = list(Devices.from_config(federation, config.devices).timing_of_profiles())
    instant = next((id for id, takes, _ in paces if not takes), None)
    if instant is None:
        return
    late = config.faults is not None and config.faults.late > 0
    if late or any(takes or not always for _, takes, always in paces):
        where = "faults.late" if late else "devices"
        raise UserError(
            f"{where}: tasks of {instant} take no time, so with runtime.mode=async it would have every turn before anybody "
            "who does take some; give everybody a speed, up or down (`devices`, `machine`)"
        )
