#!/usr/bin/env python3
"""Measure the growth of memory and open files in a federation whose nodes are killed at random.

    python -m benchmarks soak [--rounds 300] [--restarts 0.05] [--out FILE.csv]

As with `hetero-fl federate`, four clients in processes of their own train tiny models with private
heads and compressed uploads. After each round, a process is killed with probability `--restarts`,
and the server restarts it. Every `--every` rounds, the memory and open files of all processes are
recorded. The table contains the slopes over the rounds with standard errors. The first `--warm`
rounds of each process are omitted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.common import add_quick
from hetero_fl.deployment.local import run_local_federation

LIBC = ctypes.CDLL("libc.so.6")


class Sample(NamedTuple):
    """Resource usage of one process after a round."""

    round_idx: int
    name: str
    pid: int
    mebibytes: float
    files: int


def source(rounds: int) -> dict[str, Any]:
    """Return a configuration with fast rounds, private heads and residuals of compression."""
    return {
        "name": "soak",
        "rounds": rounds,
        "data": {"name": "digits", "train_limit": 200, "test_limit": 40, "proxy": {"size": 20}},
        "clients": {
            "defaults": {
                "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
                "batch_size": 32,
            },
            "groups": [
                {
                    "name": "site",
                    "count": 4,
                    "model": [{"name": "mlp", "hidden": [16]}, "cnn_bn_small"],
                }
            ],
        },
        "algorithm": {"name": "hybrid", "heads": "keep"},
        "channel": {"compress": [{"topk": 0.1}]},
        "evaluation": {"every": 25},
        "runtime": {"threads": 1},
        "output": {"plots": False, "report": False},
    }


def memory(pid: int) -> float:
    """Return the anonymous memory of a process in MiB, including pages shared since a fork."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def open_files(pid: int) -> int:
    """Return the number of open files and sockets of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def measure(round_idx: int) -> list[Sample]:
    """Measure the server and its nodes."""
    gc.collect()
    LIBC.malloc_trim(0)
    names = {os.getpid(): "server"}
    names |= {node.pid: "nodes" for node in multiprocessing.active_children() if node.pid}
    samples = []
    for pid, name in names.items():
        # A process may end at any time.
        with suppress(OSError):
            samples.append(Sample(round_idx, name, pid, memory(pid), open_files(pid)))
    return samples


def slope(rows: pd.DataFrame, column: str) -> tuple[float, float]:
    """Fit a common slope with a separate intercept for each process by least squares.

    Args:
        rows: Samples of several processes.
        column: Column whose slope over the rounds is fitted.

    Returns:
        The slope and its standard error, which are NaN if there are too few values.
    """
    by_process = rows.groupby("pid")[["round_idx", column]]
    x, y = (rows[["round_idx", column]] - by_process.transform("mean")).to_numpy().T
    square = x @ x
    # Processes with one sample have no effect on the slope.
    degrees_of_freedom = len(rows) - by_process.ngroups - 1
    if degrees_of_freedom < 1 or not square:
        return math.nan, math.nan
    rate = x @ y / square
    residual = ((y - rate * x) ** 2).sum()
    return rate, math.sqrt(residual / degrees_of_freedom / square)


def print_slopes(samples: Sequence[Sample], warm: int) -> None:
    """Print a table with the slopes of memory and open files for each kind of process.

    Args:
        samples: Measurements of all processes.
        warm: Number of rounds at the start of each process to omit.
    """
    print("| | MiB, median | KiB per round | files, maximum | files per round | samples |")
    print("|---|---|---|---|---|---|")
    frame = pd.DataFrame(samples, columns=Sample._fields)
    age = frame["round_idx"] - frame.groupby(["name", "pid"])["round_idx"].transform("first")
    for name, rows in sorted(frame[age >= warm].groupby("name"), reverse=True):
        rate, error = slope(rows, "mebibytes")
        opened, uncertainty = slope(rows, "files")
        sizes = rows["mebibytes"].sort_values()
        print(
            f"| {name} | {sizes.iloc[len(sizes) // 2]:.0f} | {1024 * rate:.2f} ± "
            f"{1024 * error:.2f} | {rows['files'].max()} | "
            f"{opened:.4f} ± {uncertainty:.4f} | {len(rows)} |"
        )


def main() -> None:
    """Train with killed nodes, record samples and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument(
        "--restarts", type=float, default=0.05, help="probability that a node is killed in a round"
    )
    parser.add_argument("--every", type=int, default=5, help="rounds between two samples")
    parser.add_argument("--warm", type=int, default=50, help="first rounds of a process to omit")
    parser.add_argument("--out", type=Path, help="CSV file for all samples")
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 4
        options.every = 1
        options.warm = 1
    rng = random.Random(0)
    began = time.perf_counter()
    samples: list[Sample] = []
    restarts = 0

    def after_round(record: dict[str, Any]) -> None:
        nonlocal restarts
        if record["round"] % options.every == 0:
            samples.extend(measure(record["round"]))
        if rng.random() < options.restarts:
            rng.choice(multiprocessing.active_children()).kill()
            restarts += 1

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run_local_federation(source(options.rounds), out=out, callbacks=[after_round])
    if options.out is not None:
        pd.DataFrame(samples, columns=Sample._fields).to_csv(
            options.out, index=False, lineterminator="\r\n"
        )
    print_slopes(samples, options.warm)
    time.sleep(2.0)
    print(
        f"{options.rounds} rounds in {time.perf_counter() - began:.0f} s, {restarts} restarts, "
        f"{len(multiprocessing.active_children())} nodes left"
    )


if __name__ == "__main__":
    main()
