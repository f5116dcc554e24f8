"""Seconds per round of the working tree over those of a given commit.

    python -m benchmarks against_commit COMMIT [--pairs 9] [--only PATTERN] [--out FILE.json]

Each case is a list of configurations that both sides run through the public interface alone. A
side is a process of its own that stays up for the whole case and trains one round when asked; the
sides take turns, in reverse order every other time. The first round is not counted. Printed are the
median and the range of the ratios of the pairs, and the geometric mean of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tests.frozen_bits.cases import METHODS, merged
from tests.helpers.commits import ROOT, checked_out, resolve_commit

CHILD = Path(__file__).with_name("timed_rounds.py")

Config = dict[str, Any]


@dataclass
class Case:
    """Configurations whose times are added: turn i of a case is turn i of each of them.

    Args:
        name: Shown in the table and matched by `--only`.
        configs: Configurations without `rounds`, by label.
        rounds: Rounds per turn.
        one_shot: Labels of configurations of which a turn is a whole run, as one round has all
            their work.
    """

    name: str
    configs: Mapping[str, Config]
    rounds: int = 1
    one_shot: Sequence[str] = ()

    def tasks(self, pairs: int) -> list[dict[str, Any]]:
        """Return what each process of the case has to do, as `timed_rounds.py` reads it."""
        tasks = []
        for label, config in self.configs.items():
            rounds = 0 if label in self.one_shot else self.rounds
            # One round before the first turn, and one after the last, which is evaluated in full.
            planned = 1 if label in self.one_shot else pairs * rounds + 2
            tasks.append(
                {"config": {**config, "rounds": planned}, "turns": pairs, "rounds": rounds}
            )
        return tasks


@dataclass
class Result:
    """Seconds of each pair of a case, in total and by configuration."""

    working_tree: list[float]
    commit: list[float]
    medians: dict[str, float] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """Return the working tree's seconds over the commit's, pair by pair."""
        return [ours / theirs for ours, theirs in zip(self.working_tree, self.commit, strict=True)]


class Side(Protocol):
    """One of the two trees that are compared."""

    def turn(self) -> float:
        """Carry out the next turn and return its seconds."""


class RoundsProcess:
    """A process that trains one turn of rounds for each line on its standard input.

    Args:
        name: Shown if it ends too soon.
        command: Its command line.
        folder: Its working folder.
        environ: Its environment variables.
    """

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, environ: Mapping[str, str]
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self) -> float:
        """Carry out the next turn and return its seconds."""
        return float(self._ask()["seconds"])

    def finish_task(self) -> None:
        """Run the current configuration to its end."""
        if "done" not in self._ask():
            raise SystemExit(f"{self.name}: expected the end of a run, got another turn")

    def request(self) -> None:
        """Start the next turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def reply(self) -> dict[str, Any]:
        """Return the report of the turn."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ask(self) -> dict[str, Any]:
        self.request()
        return self.reply()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        with self.process:  # closes the pipes and waits
            pass


class CommandLine:
    """`scripts/train.py` of one tree, in a new process for each turn."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree

    def turn(self) -> float:
        """Run one round of the quickstart and return the seconds of the whole command."""
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "scripts/train.py", "--out", f"{folder}/run"]
            command += ["--config", "configs/digits_quickstart.yaml", "rounds=1"]
            command += ["output.plots=false", "output.report=false"]
            started = time.perf_counter()
            subprocess.run(
                command, cwd=self.tree, env=environment(self.tree), check=True, capture_output=True
            )
            return time.perf_counter() - started


def environment(tree: Path) -> dict[str, str]:
    """Return the environment of a process that imports the package from `tree`."""
    # Both sides start from compiled modules, as an installed package does.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    # PYTHONSAFEPATH: modules next to the script must not hide those of the standard library.
    return {
        **inherited,
        "PYTHONPATH": str(tree),
        "PYTHONSAFEPATH": "1",
        "GOMP_SPINCOUNT": "1000",
    }


def alternate(sides: Sequence[Side], pairs: int) -> list[list[float]]:
    """Return the seconds of each side's turns, after one that is not counted.

    Args:
        sides: They take turns, in reverse order every other time.
        pairs: Turns of each side that are counted.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    for index in range(pairs + 1):
        order = range(len(sides)) if index % 2 else reversed(range(len(sides)))
        for place in order:
            spent = sides[place].turn()
            if index:
                seconds[place].append(spent)
    return seconds


def measure_rounds(case: Case, trees: Sequence[Path], pairs: int) -> Result:
    """Measure a case of configurations in one process per tree."""
    totals = [[0.0] * pairs for _ in trees]
    medians = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tasks = folder / "tasks.json"
        tasks.write_text(json.dumps(case.tasks(pairs)), encoding="utf-8")
        command = [sys.executable, str(CHILD), str(tasks)]
        processes = [RoundsProcess(str(tree), command, tree, environment(tree)) for tree in trees]
        for process in processes:
            stack.callback(process.close)
        for label in case.configs:
            seconds = alternate(processes, pairs)
            for process in processes:
                process.finish_task()
            for total, own in zip(totals, seconds, strict=True):
                for index, spent in enumerate(own):
                    total[index] += spent
            medians[label] = statistics.median(Result(*seconds).ratios)
    return Result(*totals, medians)


def measure_startup(trees: Sequence[Path], pairs: int) -> Result:
    """Measure the whole command of a run of one round."""
    return Result(*alternate([CommandLine(tree) for tree in trees], pairs))


def write_images(path: Path, rows: int, side: int, channels: int) -> Path:
    """Write random images of ten classes as an archive in the layout of MedMNIST."""
    generator = np.random.default_rng(0)
    shape = (side, side) if channels == 1 else (side, side, channels)
    arrays = {}
    for part, count in {"train": rows, "val": 100, "test": 200}.items():
        arrays[f"{part}_images"] = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = generator.integers(0, 10, (count, 1), dtype=np.uint8)
    np.savez(path, **arrays)
    return path


def federation(**sections: Any) -> Config:
    """Return a configuration that trains with SGD on one thread and draws nothing."""
    base: Config = {
        "name": "against_commit",
        "clients": {"defaults": {"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 10}},
        "runtime": {"executor": "serial", "threads": 1},
        "output": {"plots": False, "report": False},
    }
    return merged(base, sections)


def overhead(folder: Path) -> Case:
    """Return a case of many clients that each take one step with a linear model."""
    images = write_images(folder / "small.npz", rows=6_000, side=8, channels=1)
    config = federation(
        data={
            "name": "npz",
            "path": str(images),
            "split": {"validation": 0.0, "test": 0.0},
            "proxy": {"size": 0},
        },
        clients={"count": 300, "defaults": {"model": "linear", "steps": 1}},
        algorithm={"name": "fedavg"},
        evaluation={"every": 1_000},
    )
    return Case("overhead", {"fedavg": config}, rounds=2)


def fedavg_cifar(folder: Path, name: str, runtime: Config) -> Case:
    """Return a case of FedAvg with a CNN on images of CIFAR-10's shape, without evaluation."""
    images = write_images(folder / "color.npz", rows=1_100, side=32, channels=3)
    config = federation(
        data={
            "name": "npz",
            "path": str(images),
            "split": {"validation": 0.0, "test": 0.0},
            "proxy": {"size": 0},
        },
        clients={"count": 20, "defaults": {"model": "fedavg_cnn", "steps": 5}},
        algorithm={"name": "fedavg"},
        evaluation={"every": 1_000},
        runtime=runtime,
    )
    return Case(name, {"fedavg": config})


def heterogeneous(folder: Path) -> Case:
    """Return a case of two CNNs and two ResNet-18, with evaluation."""
    images = write_images(folder / "mixed.npz", rows=200, side=32, channels=3)
    configs = {}
    for method in ("fd", "fedproto", "fml", "fedkd"):
        configs[method] = federation(
            data={
                "name": "npz",
                "path": str(images),
                "split": {"validation": 0.0, "test": 0.25},
                "proxy": {"size": 0},
                "test_limit": 50,
            },
            clients={
                "count": 4,
                "defaults": {"model": ["fedavg_cnn", "torchvision:resnet18"], "batch_size": 25},
            },
            algorithm={"name": method},
            runtime={"threads": os.cpu_count() or 1},
        )
    return Case("heterogeneous", configs)


def every_method() -> Case:
    """Return a case of every method on three small CNNs and three MLPs, with evaluation."""
    configs = {}
    for method in METHODS:
        configs[method] = federation(
            data={
                "name": "digits",
                "train_limit": 700,
                "test_limit": 100,
                "partition": {"kind": "dirichlet", "alpha": 0.5, "min_size": 30},
                "proxy": {"size": 100},
            },
            clients={
                "groups": [
                    {"name": "cnn", "count": 3, "model": "cnn_gn_small"},
                    {"name": "mlp", "count": 3, "model": {"name": "mlp", "hidden": [64]}},
                ],
            },
            algorithm={"name": method},
            server={"model": "linear"},
        )
    quick = {"synthesis_epochs": 2, "generator_steps": 3, "student_steps": 4}
    configs["dense"] = merged(configs["dense"], {"algorithm": quick})
    return Case("every_method", configs, one_shot=["dense"])


def population() -> Case:
    """Return a case of 100,000 clients with 20 participants per round."""
    config = federation(
        data={"name": "digits", "partition": {"kind": "drawn", "alpha": 0.5, "rows": 60}},
        clients={
            "per_round": 20,
            "groups": [{"name": "client", "count": 100_000, "model": "mlp"}],
        },
        algorithm={"name": "fedavg"},
        evaluation={"clients": 20},
    )
    return Case("population", {"fedavg": config}, rounds=3)


Measurement = Callable[[Sequence[Path], int], Result]


def all_measurements(folder: Path) -> dict[str, Measurement]:
    """Return what measures each case by its name; generated data is written to `folder`."""
    workers = {"executor": "processes", "workers": 2}
    cases = [
        overhead(folder),
        fedavg_cifar(folder, "fedavg_cifar_serial", {"threads": os.cpu_count() or 1}),
        fedavg_cifar(folder, "fedavg_cifar_processes", workers),
        heterogeneous(folder),
        every_method(),
        population(),
    ]
    return {
        **{case.name: partial(measure_rounds, case) for case in cases},
        "startup": measure_startup,
    }


def describe(name: str, result: Result) -> str:
    """Return the line of a case."""
    ratios = result.ratios
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    ours = statistics.median(result.working_tree)
    theirs = statistics.median(result.commit)
    return f"{name:24} {spread:24} {ours:.3f} s / {theirs:.3f} s"


def describe_slowest(result: Result, most: int = 5) -> str:
    """Return the line with the configurations of a case that became slowest."""
    slowest = sorted(result.medians.items(), key=lambda pair: -pair[1])[:most]
    return "  " + ", ".join(f"{label} {ratio:.3f}" for label, ratio in slowest)


def main() -> None:
    """Measure the selected cases one after the other and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="the commit to compare the working tree with")
    parser.add_argument("--pairs", type=int, default=9, help="turns that are counted (9)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="measure matching cases")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all seconds to a file")
    parser.add_argument(
        "--quick", action="store_true", help="one pair of the first case, for tests"
    )
    options = parser.parse_args()
    if options.quick:
        options.pairs = 1
        options.only = "overhead"

    commit = resolve_commit(options.commit)
    results = {}
    with tempfile.TemporaryDirectory() as folder, checked_out(commit) as tree:
        measurements = all_measurements(Path(folder))
        selected = [name for name in measurements if fnmatch(name, options.only)]
        if not selected:
            sys.exit(f"--only: no case matches; choose from {', '.join(measurements)}")
        print(f"{'case':24} {'ratio (range)':24} seconds: working tree / {commit[:12]}")
        for name in selected:
            result = measurements[name]((ROOT, tree), options.pairs)
            results[name] = result
            print(describe(name, result), flush=True)
            if len(result.medians) > 1:
                print(describe_slowest(result), flush=True)

    mean = statistics.geometric_mean(statistics.median(r.ratios) for r in results.values())
    if options.out is not None:
        found = {name: {**asdict(r), "ratios": r.ratios} for name, r in results.items()}
        document = {"commit": commit, "cases": found, "geometric_mean": mean}
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"geometric mean of {len(results)} medians: {mean:.3f}")


if __name__ == "__main__":
    main()
