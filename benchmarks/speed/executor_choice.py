"""Check whether the executor `auto` selects the fastest executor for a whole run.

    python -m benchmarks executor_choice [--repeats 3] [--only PATTERN]

The benchmark consists of ten short and long runs of small and large models. Each run is executed in
new processes with `auto` and with each fixed executor in turn. The seconds are those of the whole
run after imports, including the start of worker processes. The choice of `auto` is right if the
chosen executor takes at most 1.05 times as long as the fastest. Target: nine of ten.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.speed.against_commit import environment, write_images
from tests.support.commits import ROOT

EXECUTORS = ("serial", "batched", "processes")
TOLERANCE = 1.05
TARGET = 9

# Script that runs a configuration from standard input and prints the seconds and the executor.
CHILD = """
import json, sys, tempfile, time
import hetero_fl
if __name__ == "__main__":
    config = json.load(sys.stdin)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = hetero_fl.run(config, out=folder + "/run")
        seconds = time.perf_counter() - started
        choice = json.loads((run.path / "environment.json").read_text())["choice"]
    print(json.dumps([seconds, choice["executor"]]))
"""

# Number of rounds; number of clients, rows per client, image side and channels; client settings.
Case = tuple[int, tuple[int, int, int, int], dict[str, Any]]
MLP = (100, 60, 28, 1), {"model": "mlp", "batch_size": 10}
SMALL_CNN = (20, 60, 28, 1), {"model": "cnn_bn_small", "batch_size": 10}
CNN = (20, 50, 32, 3), {"model": "fedavg_cnn", "batch_size": 10}
RESNET = (6, 96, 32, 3), {"model": "torchvision:resnet18", "batch_size": 32}
MIXED = (20, 60, 28, 1), {"model": ["mlp", "cnn_bn_small"], "batch_size": 10}
CASES: dict[str, Case] = {
    "mlp, short": (2, *MLP),
    "mlp, long": (40, *MLP),
    "small cnn, short": (4, *SMALL_CNN),
    "small cnn, long": (80, *SMALL_CNN),
    "cnn, short": (2, *CNN),
    "cnn, long": (20, *CNN),
    "resnet, short": (1, *RESNET),
    "resnet, long": (5, *RESNET),
    "two models, short": (5, *MIXED),
    "two models, long": (80, *MIXED),
}


def configuration(images: Path, case: Case) -> dict[str, Any]:
    """Return the configuration of a case.

    Args:
        images: The `.npz` file of the images.
        case: The case.
    """
    rounds, (clients, rows, _, _), defaults = case
    return {
        "name": "executor_choice",
        "rounds": rounds,
        "data": {
            "name": "npz",
            "path": str(images),
            "train_limit": clients * rows,
            "test_limit": 200,
            "partition": {"kind": "iid"},
            "split": {"validation": 0.0, "test": 0.0},
            "proxy": {"size": 0},
        },
        "clients": {
            "count": clients,
            "defaults": {"optimizer": {"name": "sgd", "lr": 0.01}, **defaults},
        },
        "algorithm": {"name": "fedavg"},
        "evaluation": {"every": rounds},
        "output": {"plots": False, "report": False},
    }


def run_once(config: Mapping[str, Any], executor: str) -> tuple[float, str]:
    """Execute a run in a new process, and return the seconds and the executor that was used."""
    asked = {**config, "runtime": {"executor": executor}}
    environ = {**environment(ROOT), "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "child.py"
        script.write_text(CHILD, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(script)],
            input=json.dumps(asked),
            env=environ,
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    seconds, chosen = json.loads(done.stdout.splitlines()[-1])
    return seconds, chosen


def measure(config: Mapping[str, Any], repeats: int) -> tuple[dict[str, float], str]:
    """Measure all executors with a configuration.

    Args:
        config: The configuration.
        repeats: Number of runs of each executor.

    Returns:
        The median seconds, keyed by executor, and the most frequent choice of `auto`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in EXECUTORS}
    choices = []
    for turn in range(repeats):
        choices.append(run_once(config, "auto")[1])
        for name in EXECUTORS if turn % 2 else reversed(EXECUTORS):
            seconds[name].append(run_once(config, name)[0])
    return {n: statistics.median(s) for n, s in seconds.items()}, statistics.mode(choices)


def main() -> None:
    """Print one line for each case, and the number of right choices."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each executor (3)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="measure matching cases")
    parser.add_argument("--quick", action="store_true", help="one case once, for tests")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.only = 1, "small cnn, short"
    selected = {name: case for name, case in CASES.items() if fnmatch(name, options.only)}
    num_right = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, case in selected.items():
            _, (clients, rows, side, channels), _ = case
            images = write_images(Path(folder) / "images.npz", clients * rows, side, channels)
            seconds, chosen = measure(configuration(images, case), options.repeats)
            ratio = seconds[chosen] / min(seconds.values())
            num_right += ratio <= TOLERANCE
            text = ", ".join(f"{executor} {spent:.1f} s" for executor, spent in seconds.items())
            print(f"{name:20} {text}; auto: {chosen}, {ratio:.2f} of the fastest", flush=True)
    print(f"right in {num_right} of {len(selected)}; target {TARGET} of {len(CASES)}")


if __name__ == "__main__":
    main()
