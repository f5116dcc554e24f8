"""Compare the seconds per round of the working tree with those of a commit.

    python -m benchmarks against_commit COMMIT [--pairs 9] [--only PATTERN] [--out FILE.json]

Each case is a set of configurations that both sides, which are the working tree and the commit, run
through the public interface. A side is a separate process that exists for the whole case and trains
on request. The sides take turns, in reverse order every other turn, and the first turn is a
warm-up. The output is the median and range of the time ratios, and the geometric mean of the
medians.
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
from tests.support.commits import ROOT, checked_out, resolve_commit

CHILD = Path(__file__).with_name("timed_rounds.py")

Config = dict[str, Any]


@dataclass
class Case:
    """Configurations whose times are summed.

    In each turn of a case, all configurations take one turn.

    Args:
        name: Name in the table, which `--only` matches.
        configs: Configurations without `rounds`, keyed by label.
        rounds: Rounds per turn.
        one_shot: Labels of configurations for which a turn is a whole run, because a single round
            does all the work.
    """

    name: str
    configs: Mapping[str, Config]
    rounds: int = 1
    one_shot: Sequence[str] = ()

    def tasks(self, pairs: int) -> list[dict[str, Any]]:
        """Return the tasks for each process of the case, in the format of `timed_rounds.py`.

        Args:
            pairs: Number of timed turns.
        """
        tasks = []
        for label, config in self.configs.items():
            rounds = 0 if label in self.one_shot else self.rounds
            # One round before the first turn, and one after the last turn with a full evaluation.
            planned = 1 if label in self.one_shot else pairs * rounds + 2
            tasks.append(
                {"config": {**config, "rounds": planned}, "turns": pairs, "rounds": rounds}
            )
        return tasks


@dataclass
class Result:
    """Result of a case.

    Attributes:
        working_tree: Seconds of each turn of the working tree.
        commit: Seconds of each turn of the commit.
        medians: Median time ratios, keyed by label of the configuration.
    """

    working_tree: list[float]
    commit: list[float]
    medians: dict[str, float] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """Time ratio of the working tree to the commit for each turn."""
        return [ours / theirs for ours, theirs in zip(self.working_tree, self.commit, strict=True)]


class Side(Protocol):
    """One of the two source trees to compare."""

    def turn(self) -> float:
        """Execute the next turn and return the seconds."""


class RoundsProcess:
    """A process that executes one turn for each line on its standard input.

    Args:
        name: Name for error messages.
        command: Command line of the process.
        folder: Working directory of the process.
        environ: Environment variables of the process.
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
        """Execute the next turn and return the seconds."""
        return float(self._ask()["seconds"])

    def finish_task(self) -> None:
        """Complete the run of the current configuration.

        Raises:
            SystemExit: If the process reports another turn instead.
        """
        if "done" not in self._ask():
            raise SystemExit(f"{self.name}: expected the end of a run, got another turn")

    def request(self) -> None:
        """Request the next turn without waiting for its end."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def reply(self) -> dict[str, Any]:
        """Wait for the end of the requested turn and return the report.

        Raises:
            SystemExit: If the process ends without a report.
        """
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
        # The context manager closes the pipes and waits.
        with self.process:
            pass


class CommandLine:
    """A side that runs `scripts/train.py` in a new process for each turn.

    Args:
        tree: The source tree.
    """

    def __init__(self, tree: Path) -> None:
        self.tree = tree

    def turn(self) -> float:
        """Run one round of digits_quickstart and return the seconds of the whole command."""
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
    """Return the environment variables of a process that imports the package from `tree`."""
    # As with an installed package, both sides use compiled modules.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    # PYTHONSAFEPATH: modules next to the script must not hide those of the standard library.
    return {
        **inherited,
        "PYTHONPATH": str(tree),
        "PYTHONSAFEPATH": "1",
        "GOMP_SPINCOUNT": "1000",
    }


def alternate(sides: Sequence[Side], pairs: int) -> list[list[float]]:
    """Time sides in turns, in reverse order every other turn.

    Args:
        sides: The sides.
        pairs: Number of timed turns after the warm-up turn.

    Returns:
        The seconds of each timed turn, for each side.
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
    """Measure a case with one process per source tree.

    Args:
        case: The case.
        trees: The working tree and the tree of the commit.
        pairs: Number of timed turns.
    """
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
    """Measure the command that trains one round, including startup."""
    return Result(*alternate([CommandLine(tree) for tree in trees], pairs))


def write_images(path: Path, rows: int, side: int, channels: int) -> Path:
    """Write random images of ten classes as an `.npz` file in the MedMNIST layout.

    Args:
        path: The file to write.
        rows: Number of training images.
        side: Side length of the images in pixels.
        channels: Number of channels.

    Returns:
        The path of the file.
    """
    generator = np.random.default_rng(0)
    shape = (side, side) if channels == 1 else (side, side, channels)
    arrays = {}
    for part, count in {"train": rows, "val": 100, "test": 200}.items():
        arrays[f"{part}_images"] = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = generator.integers(0, 10, (count, 1), dtype=np.uint8)
    np.savez(path, **arrays)
    return path


def federation(**sections: Any) -> Config:
    """Return a configuration with SGD, one thread, and no plots or report.

    Args:
        **sections: Sections that are merged into the configuration.
    """
    base: Config = {
        "name": "against_commit",
        "clients": {"defaults": {"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 10}},
        "runtime": {"executor": "serial", "threads": 1},
        "output": {"plots": False, "report": False},
    }
    return merged(base, sections)


def overhead(folder: Path) -> Case:
    """Return a case in which many clients take one step each with a linear model."""
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
    """Return a case of FedAvg with a CNN on images of CIFAR-10 shape, without evaluation.

    Args:
        folder: Folder for the images.
        name: Name of the case.
        runtime: Section `runtime` of the configuration.
    """
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
    """Return a case with two CNN clients and two ResNet-18 clients, with evaluation."""
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
    """Return a case that trains three small CNNs and three MLPs with every method."""
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
    """Return a case with 100,000 clients, of which 20 are sampled per round."""
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
    """Return functions that measure the cases, keyed by name of the case.

    Args:
        folder: Folder to which generated data is written.
    """
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
    """Format the result of a case in one line."""
    ratios = result.ratios
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    ours = statistics.median(result.working_tree)
    theirs = statistics.median(result.commit)
    return f"{name:24} {spread:24} {ours:.3f} s / {theirs:.3f} s"


def describe_slowest(result: Result, most: int = 5) -> str:
    """List the `most` configurations of a case with the highest time ratios in one line."""
    slowest = sorted(result.medians.items(), key=lambda pair: -pair[1])[:most]
    return "  " + ", ".join(f"{label} {ratio:.3f}" for label, ratio in slowest)


def main() -> None:
    """Measure the selected cases and print one line for each case."""
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
