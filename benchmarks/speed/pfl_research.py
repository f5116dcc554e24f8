"""Compare hetero_fl with pfl-research and a bare loop on the CIFAR-10 benchmark of pfl-research.

    python -m benchmarks pfl_research [--rival CHECKOUT] [--data cifar10.npz] [--pairs 5]

Of 1,000 clients with 50 images each, 50 clients train a CNN with two dropout layers in each round,
for 5 steps of SGD with batches of 10, without evaluation. Each contender consists of one or two
processes that train a round on request. Contenders take turns, in reverse order every other turn,
and the first round is a warm-up. Only one contender computes at a time. Contenders on one core have
one thread, and contenders on two cores have two processes with one thread each.

`--rival` is a checkout of pfl-research, whose folder `benchmarks` contains the training script. The
package must be installed separately (`pip install pfl`). Without this option, hetero_fl is compared
with the bare loops only.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.against_commit import (
    CHILD,
    RoundsProcess,
    alternate,
    environment,
    write_images,
)
from benchmarks.speed.bare_loop import BATCH, LR, ROWS
from tests.support.commits import ROOT

TEST_ROWS = 200
RIVAL = Path(__file__).with_name("pfl_rounds.py")
# Contender, its reference, and the target ratio.
TARGETS = [
    ("hetero_fl, one core", "pfl-research, one core", 0.97),
    ("hetero_fl, one core", "bare loop", 1.03),
    ("hetero_fl, two cores", "pfl-research, two cores", 0.95),
    ("hetero_fl, two cores", "two bare loops", 1.05),
]


class Contender:
    """One or more processes that train parts of a round in parallel.

    Args:
        processes: The processes.
    """

    def __init__(self, processes: Sequence[RoundsProcess]) -> None:
        self.processes = processes

    def turn(self) -> float:
        """Train a round and return the seconds of the slowest process."""
        for process in self.processes:
            process.request()
        return max(float(process.reply()["seconds"]) for process in self.processes)


@dataclass(frozen=True)
class Size:
    """Size of the benchmark.

    Attributes:
        clients: Number of clients.
        per_round: Number of clients per round.
    """

    clients: int = 1_000
    per_round: int = 50

    @property
    def rows(self) -> int:
        """Number of training rows of all clients."""
        return self.clients * ROWS


def configuration(images: Path, size: Size, **runtime: Any) -> dict[str, Any]:
    """Return the configuration of the benchmark for hetero_fl.

    Args:
        images: The `.npz` file of the images.
        size: Size of the benchmark.
        **runtime: Section `runtime` of the configuration.
    """
    return {
        "name": "pfl_research",
        "rounds": 1_500,
        "data": {
            "name": "npz",
            "path": str(images),
            "train_limit": size.rows,
            "test_limit": TEST_ROWS,
            "partition": {"kind": "iid"},
            "split": {"validation": 0.0, "test": 0.0},
            "proxy": {"size": 0},
        },
        "clients": {
            "count": size.clients,
            "per_round": size.per_round,
            "defaults": {
                "model": "python:benchmarks.speed.bare_loop:SimpleCNN",
                "optimizer": {"name": "sgd", "lr": LR},
                "batch_size": BATCH,
                "epochs": 1,
            },
        },
        "algorithm": {"name": "fedavg"},
        "evaluation": {"every": 10_000},
        "runtime": runtime,
        "output": {"plots": False, "report": False},
    }


def write_pickles(images: Path, size: Size, folder: Path) -> None:
    """Write the images in the format of the benchmark of pfl-research.

    Args:
        images: The `.npz` file of the images.
        size: Size of the benchmark.
        folder: The folder to write to.
    """
    with np.load(images) as arrays:
        for part, count in {"train": size.rows, "test": TEST_ROWS}.items():
            rows = arrays[f"{part}_images"][:count], arrays[f"{part}_labels"][:count].reshape(-1, 1)
            (folder / f"cifar10_{part}.p").write_bytes(pickle.dumps(rows))


def contenders(
    folder: Path, images: Path, rival: Path | None, size: Size, pairs: int
) -> dict[str, list[list[str]]]:
    """Write the input files of all contenders and return the command lines.

    Args:
        folder: Folder for the input files.
        images: The `.npz` file of the images.
        rival: Checkout of pfl-research. If None, pfl-research is omitted.
        size: Size of the benchmark.
        pairs: Number of timed rounds.

    Returns:
        The command lines of the processes of each contender, keyed by contender.
    """
    python = [sys.executable, "-m"]
    bare = [*python, "benchmarks.speed.bare_loop", str(images), str(size.rows)]
    found = {
        "bare loop": [[*bare, str(size.per_round)]],
        "two bare loops": [[*bare, str(size.per_round // 2)]] * 2,
    }
    for name, runtime in {
        "hetero_fl, one core": {"executor": "serial", "threads": 1},
        "hetero_fl, two cores": {"executor": "auto"},
    }.items():
        tasks = folder / f"{name}.json"
        config = configuration(images, size, **runtime)
        tasks.write_text(json.dumps([{"config": config, "turns": pairs + 1, "rounds": 1}]))
        found[name] = [[sys.executable, str(CHILD), str(tasks)]]
    if rival is not None:
        write_pickles(images, size, folder)
        run = [str(RIVAL), str(rival / "benchmarks"), str(folder), "1500"]
        run += ["--cohort_size", str(size.per_round)]
        torchrun = [*python, "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        found["pfl-research, one core"] = [[sys.executable, *run]]
        found["pfl-research, two cores"] = [[*torchrun, *run]]
    return found


def measure(
    commands: dict[str, list[list[str]]], folder: Path, pairs: int
) -> dict[str, list[float]]:
    """Measure contenders in turns.

    Args:
        commands: The command lines of the processes of each contender, keyed by contender.
        folder: Working directory of the processes.
        pairs: Number of timed rounds after the warm-up.

    Returns:
        The seconds of each timed round, keyed by contender.
    """
    environ = {**environment(ROOT), "OMP_NUM_THREADS": "1"}
    if "PYTHONPATH" in os.environ:
        environ["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    with ExitStack() as stack:
        sides = []
        for name, lines in commands.items():
            processes = [RoundsProcess(name, line, folder, environ) for line in lines]
            for process in processes:
                stack.callback(process.close)
            sides.append(Contender(processes))
            # The contender starts and trains its first round while no other contender computes.
            sides[-1].turn()
        return dict(zip(commands, alternate(sides, pairs), strict=True))


def main() -> None:
    """Print the seconds of each contender and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rival", type=Path, metavar="CHECKOUT", help="pfl-research's repository")
    parser.add_argument(
        "--data", type=Path, metavar="FILE.npz", help="CIFAR-10; without it generated images"
    )
    parser.add_argument("--pairs", type=int, default=5, help="rounds that are counted (5)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some contenders, by their names")
    parser.add_argument(
        "--quick", action="store_true", help="one pair against the bare loop, for tests"
    )
    options = parser.parse_args()
    size = Size()
    if options.quick:
        size, options.pairs, options.only = Size(40, 4), 1, ["bare loop", "hetero_fl, one core"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = options.data and options.data.resolve()
        if images is None:
            images = write_images(folder / "images.npz", size.rows, side=32, channels=3)
        rival = options.rival and options.rival.resolve()
        commands = contenders(folder, images, rival, size, options.pairs)
        if options.only:
            commands = {name: lines for name, lines in commands.items() if name in options.only}
        seconds = measure(commands, folder, options.pairs)
    for name, spent in seconds.items():
        print(f"{name:24} {statistics.median(spent):.3f} s ({min(spent):.3f} to {max(spent):.3f})")
    for name, other, target in TARGETS:
        if name in seconds and other in seconds:
            ratios = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
            middle = statistics.median(ratios)
            spread = f"{middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            verdict = "met" if middle <= target else "missed"
            print(f"{name} / {other}: {spread}; target {target}: {verdict}")


if __name__ == "__main__":
    main()
