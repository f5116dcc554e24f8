#!/usr/bin/env python3
"""Compare the executors on several federations, including the choice of `auto`.

    python -m benchmarks executors [--executors serial,batched,processes]

The benchmark times whole FedAvg rounds without evaluation. Targets of the time ratios: auto/serial
0.5 for 100 MLP clients with 60 examples; batched/serial 0.7 for 20 small CNNs; and 1.1 for `auto`
in relation to the best fixed executor in all cases. The choice of `auto` depends on the number of
rounds, which is 100.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.common import TrainerRun, arguments, in_turns, parsed, print_ratios
from hetero_fl.data import make_images
from hetero_fl.experiment import prepare

# `shape` is the number of clients, rows per client, image side and channels.
CASES: dict[str, dict[str, Any]] = {
    "100 MLP clients of 60 examples, 28x28, batch 10": {
        "shape": (100, 60, 28, 1),
        "defaults": {"model": "mlp", "batch_size": 10},
        "targets": {"auto": 0.5},
    },
    "20 small CNN clients of 60 examples, 28x28, batch 10": {
        "shape": (20, 60, 28, 1),
        "defaults": {"model": "cnn_bn_small", "batch_size": 10},
        "targets": {"batched": 0.7},
    },
    "20 CNN clients with 32 and 64 channels, 50 examples, 32x32 RGB, batch 10": {
        "shape": (20, 50, 32, 3),
        "defaults": {"model": "fedavg_cnn", "batch_size": 10},
        "targets": {},
    },
    "6 ResNet-18 clients of 96 examples, 32x32 RGB, batch 32": {
        "shape": (6, 96, 32, 3),
        "defaults": {"model": "torchvision:resnet18", "batch_size": 32},
        "targets": {},
    },
    "20 clients of two models, 60 examples, 28x28, batch 10": {
        "shape": (20, 60, 28, 1),
        "defaults": {"model": ["mlp", "cnn_bn_small"], "batch_size": 10},
        "targets": {},
    },
}
AUTO_TARGET = 1.1


def configuration(clients: int, rows: int, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration in which all clients have the same settings.

    Args:
        clients: Number of clients.
        rows: Number of training rows per client.
        defaults: Settings of the clients.
    """
    return {
        "rounds": 100,
        "data": {
            "train_limit": clients * rows + 1,
            "test_limit": 100,
            "split": {"validation": 0.0, "test": 0.0},
            "validation": 1e-9,  # one row
        },
        "clients": {
            "count": clients,
            "defaults": {"optimizer": {"name": "sgd", "lr": 0.01}, **defaults},
        },
        "algorithm": {"name": "fedavg"},
    }


def main() -> None:
    """Measure all cases and print the ratios."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--executors",
        default="serial,batched,processes",
        metavar="A,B,…",
        help="names of runtime.executor",
    )
    parser.add_argument("--workers", type=int, default=2, help="worker processes (2)")
    options = parsed(parser)
    fixed = options.executors.split(",")
    for title, case in CASES.items():
        clients, rows, side, channels = case["shape"]
        clients = max(4, clients // 10) if options.quick else clients
        dataset = make_images(clients * rows + 1, 100, classes=10, channels=channels, side=side)
        prepared = prepare(configuration(clients, rows, case["defaults"]), dataset=dataset)
        runs = {}
        for name in [*fixed, "auto"]:
            runtime = (
                {"workers": options.workers}
                if name == "processes"
                else {"threads": options.threads}
            )
            runs[name] = TrainerRun(prepared, executor=name, **({} if name == "auto" else runtime))
        try:
            seconds = in_turns({name: run.round for name, run in runs.items()}, options.pairs)
        finally:
            for run in runs.values():
                run.rounds.executor.close()
        middle = {name: statistics.median(seconds[name]) for name in fixed}
        best = min(middle, key=lambda name: middle[name])
        print_ratios(
            title, seconds, fixed[0], {n: case["targets"].get(n) for n in [*fixed[1:], "auto"]}
        )
        print_ratios(f"{title}: the best is {best}", seconds, best, {"auto": AUTO_TARGET})


if __name__ == "__main__":
    main()
