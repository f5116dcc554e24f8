#!/usr/bin/env python3
"""Compare a round of 10 CNNs and 10 ResNet-18 with HtFLlib.

    python -m benchmarks htfllib --rival CHECKOUT [--device cuda] [--pairs 5]

The method is federated distillation (FD) of mean predictions per class, with an evaluation after
each round. Each of the 20 clients has 192 training and 64 test images of CIFAR-10 shape, and trains
one epoch with batches of 32. Each contender is a separate process that trains a round on request,
and the contenders take turns. HtFLlib requires h5py and calmsize. The CNN of HtFLlib has no padding
and therefore needs fewer operations, and HtFLlib does not shuffle the rows.

`--rival` is a checkout of HtFLlib. Without this option, only hetero_fl is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.against_commit import CHILD, write_images
from benchmarks.speed.pfl_research import measure

RIVAL = Path(__file__).with_name("htfllib_rounds.py")
TARGETS = [("hetero_fl, vectorized", "HtFLlib", 0.2), ("hetero_fl, serial", "HtFLlib", None)]
BATCH = 32
# Small, because HtFLlib fails if a loss is not finite, as on generated images with a larger rate.
LR = 0.001


@dataclass(frozen=True)
class Size:
    """Size of the benchmark.

    Attributes:
        clients: Number of clients, of which half have each model.
        train: Number of training images per client.
        test: Number of test images per client.
    """

    clients: int = 20
    train: int = 192
    test: int = 64


def configuration(images: Path, size: Size, **runtime: Any) -> dict[str, Any]:
    """Return the configuration of the benchmark for hetero_fl.

    Args:
        images: The `.npz` file of the images.
        size: Size of the benchmark.
        **runtime: Section `runtime` of the configuration.
    """
    each = size.train + size.test
    return {
        "name": "htfllib",
        "rounds": 1_500,
        "data": {
            "name": "npz",
            "path": str(images),
            "train_limit": size.clients * each,
            "test_limit": BATCH,
            "partition": {"kind": "iid"},
            "split": {"validation": 0.0, "test": size.test / each},
            "proxy": {"size": 0},
        },
        "clients": {
            "count": size.clients,
            "defaults": {
                "model": ["fedavg_cnn", "torchvision:resnet18"],
                "optimizer": {"name": "sgd", "lr": LR},
                "batch_size": BATCH,
                "epochs": 1,
            },
        },
        "algorithm": {"name": "fd"},
        "runtime": runtime,
        "output": {"plots": False, "report": False},
    }


def write_clients(images: Path, size: Size, folder: Path) -> None:
    """Write the images in the format of HtFLlib, with a file for each client and split.

    Args:
        images: The `.npz` file of the images.
        size: Size of the benchmark.
        folder: The folder to write to.
    """
    with np.load(images) as arrays:
        x = arrays["train_images"].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        y = arrays["train_labels"].reshape(-1).astype(np.int64)
    each = size.train + size.test
    parts = {"train": slice(0, size.train), "test": slice(size.train, each)}
    for part, rows in parts.items():
        (folder / part).mkdir(parents=True)
        for client in range(size.clients):
            own = slice(client * each, (client + 1) * each)
            data = np.array({"x": x[own][rows], "y": y[own][rows]}, dtype=object)
            np.savez(folder / part / f"{client}.npz", data=data)


def contenders(
    folder: Path, images: Path, rival: Path | None, size: Size, *, pairs: int, device: str
) -> dict[str, list[list[str]]]:
    """Write the input files of all contenders and return the command lines.

    Args:
        folder: Folder for the input files.
        images: The `.npz` file of the images.
        rival: Checkout of HtFLlib. If None, HtFLlib is omitted.
        size: Size of the benchmark.
        pairs: Number of timed rounds.
        device: Device of all contenders.

    Returns:
        The command lines of the processes of each contender, keyed by contender.
    """
    found = {}
    for name, executor in {"serial": "serial", "vectorized": "batched"}.items():
        tasks = folder / f"{name}.json"
        config = configuration(images, size, executor=executor, device=device, threads=1)
        tasks.write_text(json.dumps([{"config": config, "turns": pairs + 1, "rounds": 1}]))
        found[f"hetero_fl, {name}"] = [[sys.executable, str(CHILD), str(tasks)]]
    if rival is not None:
        write_clients(images, size, folder / "dataset" / "generated")
        run = [sys.executable, str(RIVAL), str(rival.resolve() / "system"), device, "1500"]
        run += ["-data", "generated", "-m", "HtFE-img-2", "-algo", "FD", "-nc", str(size.clients)]
        found["HtFLlib"] = [[*run, "-lbs", str(BATCH), "-lr", str(LR)]]
    return found


def compare(
    folder: Path, rival: Path | None, size: Size, pairs: int, device: str
) -> dict[str, list[float]]:
    """Measure all contenders.

    Args:
        folder: Folder for the input files.
        rival: Checkout of HtFLlib. If None, HtFLlib is omitted.
        size: Size of the benchmark.
        pairs: Number of timed rounds.
        device: Device of all contenders.

    Returns:
        The seconds of each timed round, keyed by contender.
    """
    rows = size.clients * (size.train + size.test)
    images = write_images(folder / "images.npz", rows, side=32, channels=3)
    # HtFLlib reads the data from ../dataset.
    work = folder / "work"
    work.mkdir()
    return measure(contenders(folder, images, rival, size, pairs=pairs, device=device), work, pairs)


def main() -> None:
    """Print the seconds of each contender and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rival", type=Path, metavar="CHECKOUT", help="HtFLlib's repository")
    parser.add_argument("--device", default="cpu", help="device of all contenders (cpu)")
    parser.add_argument("--pairs", type=int, default=5, help="rounds that are counted (5)")
    parser.add_argument("--quick", action="store_true", help="one pair of four clients, for tests")
    options = parser.parse_args()
    size = Size(4, 32, 32) if options.quick else Size()
    pairs = 1 if options.quick else options.pairs
    with tempfile.TemporaryDirectory() as folder:
        seconds = compare(Path(folder), options.rival, size, pairs, options.device)
    for name, spent in seconds.items():
        print(f"{name:24} {statistics.median(spent):.3f} s ({min(spent):.3f} to {max(spent):.3f})")
    for name, other, target in TARGETS:
        if other in seconds:
            ratios = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
            spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            print(f"{name} / {other}: {spread}; target on a GPU: {target or 'none'}")


if __name__ == "__main__":
    main()
