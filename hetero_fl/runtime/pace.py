"""Whether a run waits for its cohorts or is asynchronous, and what cannot be: refused in one line that names both keys."""

from __future__ import annotations

import math
from dataclasses import replace

from hetero_fl.algorithms import Algorithm
from hetero_fl.config import Config
from hetero_fl.config.staleness import StalenessConfig
from hetero_fl.errors import UserError
from hetero_fl.runtime.devices import Devices
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.robust import single_uploads


def set_pace(config: Config, method: Algorithm, federation: Federation) -> tuple[Config, Federation, list[str]]:
    """The configuration and the federation with the mode that the method has, and lines that say what was decided.

    An asynchronous run has as many versions as its uploads make: learning rates move along them. Raises UserError for what
    cannot run asynchronously, and for its settings in a run that does not.
    """
    runtime, name, notes = config.runtime, config.algorithm["name"], []
    if method.asynchronous and runtime.mode == "sync":
        runtime = runtime.model_copy(update={"mode": "async"})
        config = config.model_copy(update={"runtime": runtime})
        notes.append(f"runtime.mode is async: {name} aggregates uploads as they come")
    if runtime.mode == "sync":
        if runtime.buffer is not None:
            raise UserError(f"runtime.buffer: found {runtime.buffer}, but a synchronous round takes its whole cohort")
        if runtime.staleness != StalenessConfig():
            raise UserError(
                "runtime.staleness: nothing is stale in synchronous rounds; write runtime.mode=async, or leave this out"
            )
        return config, federation, notes
    _check(config, method, federation)
    places = config.clients.per_round or len(federation.cards)
    goal, uploads = method.goal or runtime.buffer or places, config.rounds * places
    if goal > uploads:
        key = "algorithm.buffer" if method.goal else "runtime.buffer"
        raise UserError(
            f"{key}: found {goal}, but {config.rounds} rounds of {places} clients take {uploads} uploads: there would be no new "
            f"version; choose {uploads} or fewer"
        )
    if method.discount is not None and runtime.staleness != StalenessConfig():
        raise UserError(f"runtime.staleness: is not used: {name} has its own, algorithm.staleness")
    section, key = (
        (method.discount, "algorithm") if method.discount is not None else (runtime.staleness, "runtime.staleness")
    )
    notes += [f"{key}.{setting} is not used: staleness is {section.kind}" for setting in section.unused]
    if goal == 1 and method.discount is None and section.kind != "constant":
        notes.append(
            "runtime.staleness has no effect: a version is one upload here (runtime.buffer), and the mean of one is that one "
            "whatever its weight; fedasync moves the server less the staler an upload is"
        )
    if config.devices is None and not federation.data.apart:
        notes.append("without `devices` no task takes any time: all that are given out together end together")
    return config, replace(federation, rounds=max(1, math.ceil(config.rounds * places / goal))), notes


def _check(config: Config, method: Algorithm, federation: Federation) -> None:
    name, kinds = config.algorithm["name"], federation.cards.kinds
    if method.everybody or any(spec.use == "each" for spec in method.uploads.values()):
        raise UserError(
            f"runtime.mode: async cannot be combined with algorithm.name: {name}, which needs the uploads of one cohort "
            "side by side; others are weighted by staleness and summed"
        )
    if config.channel.secure_sum is not None:
        raise UserError(
            "runtime.mode: async cannot be combined with channel.secure_sum, which sums one cohort's uploads"
        )
    if (key := single_uploads(config)) is not None:
        raise UserError(f"runtime.mode: async cannot be combined with {key}: both look at the uploads of one cohort")
    rows = getattr(method, "proxy_rows", None)
    if rows is not None and rows < federation.data.n_proxy:
        raise UserError(
            f"algorithm.proxy_rows: found {rows}, drawn anew each round; with runtime.mode=async predictions of different "
            f"versions meet, so they have to be of the same rows: leave it out, or lower data.proxy.size"
        )
    rare = [kind.first for kind in kinds if kind.settings.share_every > 1]
    if rare:
        raise UserError(f"runtime.mode: async cannot be combined with share_every ({rare[0]}): there are no rounds")
    if method.goal is not None and config.runtime.buffer is not None:
        own = f"its own is algorithm.buffer: {method.goal}" if method.goal > 1 else "which aggregates after each upload"
        raise UserError(f"runtime.buffer: found {config.runtime.buffer}, but algorithm.name is {name}: {own}")
    _check_time(config, federation)
    plain = type(config.cohort)()
    waits = [name for name in type(plain).model_fields if getattr(config.cohort, name) != getattr(plain, name)]
    if waits:
        raise UserError(f"cohort.{min(waits)}: is for rounds that wait for a cohort; runtime.mode is async")


def _check_time(config: Config, federation: Federation) -> None:
    """Whoever takes no time among others who do has every turn, and time stands still; on machines of their own it does not."""
    if federation.data.apart:
        return
    paces = list(Devices.of(federation, config.devices).paces())
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
