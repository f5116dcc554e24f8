#!/usr/bin/env python3
"""Profile rounds of a configuration with the serial executor in this process.

    python -m benchmarks profile_round                                (as in fedavg_cifar)
    python -m benchmarks profile_round --config FILE [key=value ...]  (with evaluation)

The first table lists the cumulative time of the stages of a round. The second table lists the
functions with the most time excluding called functions. The profiler adds time to every Python
call, so small functions appear slower than they are.
"""

from __future__ import annotations

import cProfile
import inspect
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, images, parsed, rounds_of
from benchmarks.speed.fedavg_cifar import BATCH, STEPS, configuration
from hetero_fl.aggregation.means import interpolate_model
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.core.metrics import score
from hetero_fl.core.objectives import Supervised
from hetero_fl.core.payload import Payload
from hetero_fl.engine import training
from hetero_fl.engine.batches import Batches
from hetero_fl.engine.templates import Template
from hetero_fl.engine.training import run_fit
from hetero_fl.experiment import prepare
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.federation.dry_run import ExpectedUploads
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.state_store import StateStore
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.federation.trainer import FederatedTrainer

STAGES: dict[Callable[..., Any], str] = {
    SynchronousTrainer.run_round: "a round",
    FederatedTrainer.broadcast: "server: broadcast made",
    FederationLinks.encode_broadcast: "server: broadcast encoded",
    FederatedTrainer.decode_upload: "server: uploads decoded and checked",
    ExpectedUploads.expected_items: "    expected form of an upload",
    Uploads.add: "server: uploads added to the mean",
    interpolate_model: "server: step to the mean",
    ClientRuntime.run: "clients: all of it",
    FederationSpec.client: "    participant created",
    run_fit: "    fits",
    training._prepare: "        tensors loaded into the module",
    training.make_optimizer: "        optimizer created",
    Batches.__init__: "        rows drawn",
    Batches._complete: "        batches completed",
    Supervised.total_loss: "        forward and loss",
    torch.Tensor.backward: "        backward",
    torch.optim.SGD.step: "        optimizer steps",
    Template.release_tensors: "        tensors released",
    Payload.encode: "all payloads encoded",
    Payload.decode: "all payloads decoded",
    StateStore.stage: "private state staged",
    FederatedTrainer.evaluate: "evaluation",
    score: "    metrics",
}


def main() -> None:
    """Profile rounds and print both tables."""
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
    print("\nfunctions with the most time of their own (ms per round):")
    print_top(stats, options.pairs, options.top)


def print_stages(stats: Any, rounds: int, clients: int) -> None:
    """Print the cumulative milliseconds of each stage, per round and per client.

    Args:
        stats: Result of the profiler, a `pstats.Stats` object.
        rounds: Number of profiled rounds.
        clients: Number of clients per round.
    """
    print(f"{'stage':48} {'ms/round':>11} {'ms/client':>12} {'calls/round':>14}")
    for function, what in STAGES.items():
        code = inspect.unwrap(function).__code__
        rows = [
            (calls, total)
            for (path, line, _), (_, calls, _, total, _) in stats.stats.items()
            if (path, line) == (code.co_filename, code.co_firstlineno)
        ]
        calls, total = sum(r[0] for r in rows), sum(r[1] for r in rows)
        if calls:
            ms = 1e3 * total / rounds
            print(f"{what:48} {ms:11.1f} {ms / clients:12.3f} {calls / rounds:14.1f}")


def print_top(stats: Any, rounds: int, top: int) -> None:
    """Print the functions with the most time excluding called functions.

    Args:
        stats: Result of the profiler, a `pstats.Stats` object.
        rounds: Number of profiled rounds.
        top: Number of functions to print.
    """
    rows = sorted(stats.stats.items(), key=lambda entry: -entry[1][2])[:top]
    for (path, line, name), (_, calls, own, _, _) in rows:
        where = name if path == "~" else f"{Path(path).name}:{line} {name}"
        print(f"{1e3 * own / rounds:11.1f}  {calls / rounds:9.1f} calls  {where}")


if __name__ == "__main__":
    main()
