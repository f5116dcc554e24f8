#!/usr/bin/env python3
"""Compare a federation from Python objects with the same federation from a file.

    python -m benchmarks python_objects

Both sides train the same models on the same rows, in turns, in one process. The output is the
median and range of the ratios of the seconds per round. Target: 1.02.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np

import hetero_fl as hfl
from benchmarks.common import add_quick
from hetero_fl.reporting.run import Run

METHODS = {"fedavg": hfl.FedAvg(), "fedmd": hfl.FedMD()}
OVERRIDES = {
    "runtime.executor": "serial",
    "runtime.threads": 1,
    "evaluation.every": 1000,
    "output.plots": False,
    "output.report": False,
}


def images(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Generate images of 28 x 28 pixels with ten classes.

    Args:
        rows: Number of images.
        seed: Seed of the pixels.
    """
    y = np.arange(rows) % 10
    pixels = np.random.default_rng(seed).integers(0, 200, (rows, 28, 28)) + 5 * y[:, None, None]
    return pixels.astype(np.uint8), y


def seconds_per_round(run: Run) -> float:
    """Return the mean duration of the rounds after the first one."""
    return statistics.mean(sum(record["seconds"].values()) for record in run.metrics[1:])


def main() -> None:
    """Measure both methods and print one line for each of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs after one warm-up pair")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    add_quick(parser)
    options = parser.parse_args()
    rows = 200 * options.clients
    if options.quick:
        options.pairs, options.rounds = 1, 2
    train, test = images(rows, 0), images(200, 1)
    names = [f"client_{i}" for i in range(options.clients)]
    objects = hfl.Federation(
        [hfl.Client(name, "cnn_bn_small") for name in names], data=train, test=test, proxy=200
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npz"
        arrays = {"train_images": train[0], "train_labels": train[1][:, None]}
        np.savez(path, **arrays, test_images=test[0], test_labels=test[1][:, None])
        config = {
            "name": "federation",
            "data": {"name": "npz", "path": str(path), "proxy": {"size": 200}},
            "clients": {"groups": [{"name": name, "model": "cnn_bn_small"} for name in names]},
        }
        file = hfl.Federation.from_config(config)
        for name, method in METHODS.items():
            ratios = []
            for pair in range(options.pairs + 1):
                seconds = []
                for side, federation in (("objects", objects), ("file", file)):
                    run = federation.train(
                        method,
                        rounds=options.rounds,
                        out=Path(folder) / f"{name}_{pair}_{side}",
                        overrides=OVERRIDES,
                    )
                    seconds.append(seconds_per_round(run))
                if pair:
                    ratios.append(seconds[0] / seconds[1])
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(f"{name:8} {statistics.median(ratios):.3f} ({spread}; target 1.02)")


if __name__ == "__main__":
    main()
