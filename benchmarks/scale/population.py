#!/usr/bin/env python3
"""Compare populations of 1,000 and 1,000,000 clients with the same cohort of 50.

    python -m benchmarks population

The runs use FedAvg with an MLP on scikit-learn's digits, and each client samples its rows. The two
federations run rounds in turns in one process, and the output is the median and range of the time
ratios. Among 1,000 clients, many are sampled repeatedly, and their rows are cached. Among 1,000,000
clients, nearly all sampled clients are new, so the time includes sampling of rows. Start-up time
and peak memory are measured in separate processes. The total peak is mostly due to Python and
PyTorch, so the increase after the imports is also reported. With private state (FedPer), memory
grows with the number of clients seen. Targets: 1.1 for the time of a round, and 1.2 for peak
memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import add_quick
from hetero_fl.experiment import prepare
from hetero_fl.federation.trainer import FederatedTrainer

FEW, MANY = 1_000, 1_000_000


def source(method: str, clients: int, cohort: int) -> dict[str, Any]:
    """Return the configuration of a federation."""
    return {
        "rounds": 1000,
        "data": {"name": "digits", "partition": {"kind": "drawn", "alpha": 0.5, "rows": 60}},
        "clients": {
            "per_round": cohort,
            "defaults": {"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 10},
            "groups": [{"name": "client", "count": clients, "model": "mlp"}],
        },
        "algorithm": {"name": method},
        "evaluation": {"clients": cohort},
        "runtime": {"executor": "serial", "threads": 1},
    }


def make_trainer(method: str, clients: int, cohort: int) -> FederatedTrainer:
    """Create the trainer of a federation."""
    return prepare(source(method, clients, cohort)).make_trainer()


def measure(method: str, clients: int, cohort: int, rounds: int) -> dict[str, float]:
    """Measure one federation in this process.

    Returns:
        The start-up time in seconds under `start`, the peak memory and its increase after the
        imports in MiB under `peak` and `added`, the number of clients seen under `seen`, and the
        private state in MiB under `private`.
    """
    _warm(method, cohort)
    imports, start = _peak(), time.perf_counter()
    run = make_trainer(method, clients, cohort)
    seconds = time.perf_counter() - start
    seen: set[str] = set()
    for _ in range(rounds):
        seen.update(run.run_round()["cohort"])
    run.evaluate()
    kept = sum(len(run.store.encoded(c) or b"") for c in run.store.clients())
    return {
        "start": seconds,
        "peak": _peak(),
        "added": _peak() - imports,
        "seen": len(seen),
        "private": kept / 2**20,
    }


def _warm(method: str, cohort: int) -> None:
    """Run a small case once, so that imports on first use are not measured."""
    run = make_trainer(method, cohort, cohort)
    run.run_round()
    run.evaluate()


def _peak() -> float:
    """Return the peak resident memory of this process in MiB.

    On Linux, /proc is preferred because `ru_maxrss` includes the peak of the parent process.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**20 if sys.platform == "darwin" else 2**10
        )


def _elsewhere(method: str, clients: int, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks", "population", "--alone", method, str(clients)]
    command += ["--cohort", str(options.cohort), "--rounds", str(options.rounds)]
    found: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return found


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main() -> None:
    """Measure time and then memory, and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cohort", type=int, default=50)
    parser.add_argument(
        "--pairs",
        type=int,
        default=15,
        help="timed pairs of rounds after two warm-up pairs",
    )
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each memory measurement")
    parser.add_argument("--processes", type=int, default=3, help="pairs of processes")
    parser.add_argument("--alone", nargs=2, metavar=("METHOD", "CLIENTS"), help=argparse.SUPPRESS)
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.cohort = 5
        options.pairs = 1
        options.rounds = 1
        options.processes = 1
    torch.set_num_threads(1)
    if options.alone:
        print(
            json.dumps(
                measure(options.alone[0], int(options.alone[1]), options.cohort, options.rounds)
            )
        )
        return
    for what, once in (
        ("a round", FederatedTrainer.run_round),
        ("an evaluation of the same number", FederatedTrainer.evaluate),
    ):
        few, many = (make_trainer("fedavg", clients, options.cohort) for clients in (FEW, MANY))
        ratios, seconds, busy = [], [], []
        for i in range(options.pairs + 2):
            times = {}
            for run in (few, many) if i % 2 else (many, few):
                start, cpu = time.perf_counter(), time.process_time()
                once(run)
                times[run] = (time.perf_counter() - start, time.process_time() - cpu)
            if i > 1:
                ratios.append(times[many][0] / times[few][0])
                busy.append(times[many][1] / times[few][1])
                seconds.append(times[few][0])
        print(
            f"{what}, {MANY:,} against {FEW:,}: {_spread(ratios)}; target 1.1; "
            f"{statistics.median(seconds):.3f} s"
        )
        print(f"  in processor time, which depends less on other programs: {_spread(busy)}")
    for method in ("fedavg", "fedper"):
        pairs = [
            [_elsewhere(method, clients, options) for clients in (FEW, MANY)]
            for _ in range(options.processes)
        ]
        for name, unit in (("start", "s"), ("peak", "MiB"), ("added", "MiB above the imports")):
            values = [statistics.median(pair[i][name] for pair in pairs) for i in (0, 1)]
            target = "; target 1.2" if name == "peak" else ""
            ratio = _spread([pair[1][name] / max(pair[0][name], 1e-9) for pair in pairs])
            print(
                f"{method}, {name}: {values[0]:.2f} and {values[1]:.2f} {unit}, "
                f"ratio {ratio}{target}"
            )
        one, other = pairs[0]
        print(
            f"{method}: {one['seen']:.0f} and {other['seen']:.0f} clients seen "
            f"in {options.rounds} rounds, "
            f"{one['private']:.2f} and {other['private']:.2f} MiB of private state"
        )


if __name__ == "__main__":
    main()
