#!/usr/bin/env python3
"""Where a round goes: the profile of whole rounds of a configuration, serial, in this process.

    python -m benchmarks profile_round                                      the benchmark of fedavg_cifar.py
    python -m benchmarks profile_round --config FILE [key.path=value ...]   a run of one's own, evaluation included

Two tables: the stages of a round with all that they call, and the functions in which most time is spent themselves. The
profiler charges every Python call, so that small functions look dearer than they are.
"""

from __future__ import annotations

import cProfile
import pstats
from pathlib import Path
from typing import Any

from benchmarks.common import arguments, images, parsed, rounds_of
from benchmarks.speed.fedavg_cifar import BATCH, STEPS, configuration
from hetero_fl.experiment import prepare

STAGES = {  # (file, function): what it is
    ("rounds.py", "round"): "a round",
    ("rounds.py", "make"): "server: broadcast, made and encoded",
    ("rounds.py", "receive"): "server: uploads decoded and checked",
    ("dry.py", "of"): "    what they were to look like",
    ("uploads.py", "add"): "server: uploads folded into the mean",
    ("averaging.py", "step"): "server: the step to the mean",
    ("site.py", "_train"): "clients: all of it",
    ("federation.py", "client"): "    participant made",
    ("training.py", "fit_on_live_modules"): "    fits",
    ("training.py", "_prepare"): "        tensors loaded into the module",
    ("fitting.py", "make_optimizer"): "        optimiser made",
    ("batches.py", "__init__"): "        rows drawn",
    ("batches.py", "_batch"): "        batches gathered",
    ("objectives.py", "total"): "        forward and loss",
    ("_tensor.py", "backward"): "        backward",
    ("optimizer.py", "wrapper"): "        optimiser steps",
    ("templates.py", "copy_out"): "        tensors copied out",
    ("payload.py", "encode"): "all payloads encoded",
    ("payload.py", "decode"): "all payloads decoded",
    ("store.py", "stage"): "private state staged",
    ("rounds.py", "evaluate"): "evaluation",
    ("metrics.py", "score"): "    metrics",
}


def main() -> None:
    """Print both tables."""
    parser = arguments(__doc__, pairs=2, data=True)
    parser.add_argument(
        "--config", type=Path, help="a configuration; without it FedAvg on CIFAR-10"
    )
    parser.add_argument("--top", type=int, default=25, help="functions in the second table (25)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parsed(parser)
    if options.config is not None:
        prepared = prepare(options.config, options.overrides)
    else:
        clients = 4 if options.quick else 20
        prepared = prepare(
            configuration(clients), dataset=images(options.data, clients * BATCH * STEPS * 2)
        )
    rounds = rounds_of(prepared, executor="serial", threads=options.threads)
    rounds.run_round()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(options.pairs):
        rounds.run_round()
        if options.config is not None:
            rounds.evaluate()
    profiler.disable()
    stats = pstats.Stats(profiler)
    print_stages(stats, options.pairs, len(rounds.sample_cohort(0)))
    print("\nwhere it is itself (ms a round):")
    print_top(stats, options.pairs, options.top)


def print_stages(stats: Any, rounds: int, clients: int) -> None:
    """Milliseconds of each stage: a round, a client."""
    print(f"{'stage':48} {'ms a round':>11} {'ms a client':>12} {'calls a round':>14}")
    for (file, function), what in STAGES.items():
        rows = [
            (calls, total)
            for (path, _, name), (_, calls, _, total, _) in stats.stats.items()
            if Path(path).name == file and name == function and calls
        ]
        calls, total = sum(r[0] for r in rows), sum(r[1] for r in rows)
        if calls:
            ms = 1e3 * total / rounds
            print(f"{what:48} {ms:11.1f} {ms / clients:12.3f} {calls / rounds:14.1f}")


def print_top(stats: Any, rounds: int, top: int) -> None:
    """The functions with most time of their own."""
    rows = sorted(stats.stats.items(), key=lambda entry: -entry[1][2])[:top]
    for (path, line, name), (_, calls, own, _, _) in rows:
        where = name if path == "~" else f"{Path(path).name}:{line} {name}"
        print(f"{1e3 * own / rounds:11.1f}  {calls / rounds:9.1f} calls  {where}")


if __name__ == "__main__":
    main()
