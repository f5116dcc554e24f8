#!/usr/bin/env python3
"""A mixed federation: 20 clients, 4,789 CIFAR-10 images, Dirichlet 0.1, 10 two-convolution CNNs and 10 ResNet-18.

    python -m benchmarks heterogeneous [--methods fd,fedproto,fml,fedkd] [--data cifar10.npz]

A round with its evaluation (batch 32, one epoch) against bare loops: the same batches, the fused optimizer, the same rows
predicted in evaluation, of which the loop takes accuracy and loss alone; models stay where they are, nothing is encoded. The
loops use all threads. Targets: FD and FedProto 1.05 serial and 0.82 with two workers; FML and FedKD, which train two models,
1.1 serial.
"""

from __future__ import annotations

import argparse

from benchmarks.common import Ours, agree, arguments, images, in_turns, parsed, print_ratios
from hetero_fl.experiment import prepare
from tests.references.loops.small_models import LOOPS, LR

TARGETS: dict[str, dict[str, float | None]] = {
    "fd": {"serial": 1.05, "two workers": 0.82},
    "fedproto": {"serial": 1.05, "two workers": 0.82},
    "fml": {"serial": 1.1, "two workers": None},
    "fedkd": {"serial": 1.1, "two workers": None},
}


def configuration(method: str, clients: int, rows: int) -> dict[str, object]:
    """Half the clients of each model."""
    return {
        "rounds": 100,
        "data": {
            "train_limit": rows + 1,
            "test_limit": 100,
            "partition": {"kind": "dirichlet", "alpha": 0.1, "min_size": 20},
            "split": {"validation": 0.0, "test": 0.25},
            "validation": 1e-9,  # one row
        },
        "clients": {
            "count": clients,
            "defaults": {
                "model": ["fedavg_cnn", "torchvision:resnet18"],
                "optimizer": {"name": "sgd", "lr": LR},
                "batch_size": 32,
            },
        },
        "algorithm": {"name": method},
    }


def measure(method: str, clients: int, rows: int, options: argparse.Namespace) -> None:
    """Print a method's ratios."""
    prepared = prepare(configuration(method, clients, rows), dataset=images(options.data, rows * 2))
    bare = LOOPS[method](prepared)
    ours = {
        "serial": Ours(prepared, True, executor="serial", threads=options.threads),
        "two workers": Ours(prepared, True, executor="processes", workers=2, threads=1),
    }
    try:
        seconds = in_turns(
            {"bare loop": bare.round, **{n: run.round for n, run in ours.items()}}, options.pairs
        )
    finally:
        for run in ours.values():
            run.rounds.executor.close()
    title = f"{method}, {clients} clients, {rows} images, a round with evaluation"
    print_ratios(title, seconds, "bare loop", TARGETS[method])
    for name, run in ours.items():
        agree(
            name, run.losses, bare.losses, tolerance=0.05
        )  # another memory layout: ResNet-18's 1x1 maps amplify round-off


def main() -> None:
    """All methods in turn."""
    parser = arguments(__doc__, data=True)
    parser.add_argument(
        "--methods",
        default=",".join(TARGETS),
        metavar="A,B,…",
        help=f"of {', '.join(TARGETS)} (all)",
    )
    options = parsed(parser)
    for method in options.methods.split(","):
        if method not in LOOPS:
            raise SystemExit(
                f"--methods: found '{method}'; there are bare loops for {', '.join(LOOPS)}"
            )
        measure(method, 4 if options.quick else 20, 400 if options.quick else 4789, options)


if __name__ == "__main__":
    main()
