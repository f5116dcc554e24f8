"""Programs that execute the rounds of a case of the benchmark `speed`, one turn on request.

Each contender is a process that trains a turn for each line on its standard input and prints the
seconds, so that contenders can be other executors, loops in plain PyTorch, earlier commits and
other libraries.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.frozen_bits.cases import merged
from tests.support.benchmark_folders import write_client_file
from tests.support.commits import ROOT

Config = dict[str, Any]
Task = dict[str, Any]
FOLDER = Path(__file__).parent
# More rounds than a rival is asked for.
ENDLESS = "1500"


class Process:
    """A process that executes one turn for each line on its standard input.

    Args:
        command: Command line of the process.
        folder: Working directory of the process.
        environ: Environment variables of the process.
    """

    def __init__(self, command: Sequence[str], folder: Path, environ: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        # The context manager closes the pipes and waits.
        with self.process:
            pass

    def turn(self) -> float:
        """Execute the next turn and return the seconds."""
        return float(self.ask()["seconds"])

    def ask(self) -> dict[str, Any]:
        """Request the next turn and return the report.

        Raises:
            SystemExit: If the process ends without a report.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args}: ended with status {self.process.wait()}")
        return json.loads(line)


@dataclass(frozen=True)
class Turns:
    """Turns that this process executes.

    Args:
        turn: Function that executes a turn and returns the seconds.
    """

    turn: Callable[[], float]

    def ask(self) -> dict[str, Any]:
        """Return an empty report, because the only configuration ends with the case."""
        return {}


@contextmanager
def command_line(config: Config, tree: Path, folder: Path) -> Iterator[Turns]:
    """Yield runs of `scripts/train.py`, each in a new process.

    Args:
        config: The configuration.
        tree: Source tree of the script.
        folder: Folder of the configuration file and of the runs.
    """
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    numbers = count()

    def turn() -> float:
        command = [sys.executable, "scripts/train.py", "--config", str(folder / "config.yaml")]
        command += ["--out", str(folder / str(next(numbers)))]
        started = time.perf_counter()
        subprocess.run(
            command, cwd=tree, env=environment(tree, folder), check=True, capture_output=True
        )
        return time.perf_counter() - started

    yield Turns(turn)


class Contender(ABC):
    """A program that is compared with others."""

    @abstractmethod
    def start(self, tasks: Sequence[Task], folder: Path) -> AbstractContextManager[Process | Turns]:
        """Start the program.

        Args:
            tasks: Configurations with numbers of turns and rounds (see `timed_rounds.py`).
            folder: New folder for the files of the program.
        """


@dataclass(frozen=True)
class Framework(Contender):
    """hetero_fl, or a stand-in for it.

    Args:
        changes: Changes to the configurations.
        tree: Source tree from which the package is imported.
        form: What executes a turn: the framework, the loop in plain PyTorch of `tests/references`
            that takes the same steps, or the whole command `scripts/train.py`.
    """

    changes: Config = field(default_factory=dict)
    tree: Path = ROOT
    form: Literal["framework", "loop", "command"] = "framework"

    def start(self, tasks: Sequence[Task], folder: Path) -> AbstractContextManager[Process | Turns]:
        """Start the process, which imports the package from the source tree."""
        changes = {"config": self.changes, "is_loop": self.form == "loop"}
        tasks = [merged(task, changes) for task in tasks]
        if self.form == "command":
            (task,) = tasks
            return command_line(task["config"], self.tree, folder)
        path = folder / "tasks.json"
        path.write_text(json.dumps(tasks), encoding="utf-8")
        command = [sys.executable, str(FOLDER / "timed_rounds.py"), str(path)]
        return Process(command, self.tree, environment(self.tree, folder))


@dataclass(frozen=True)
class Rival(Contender):
    """Another library, which executes a case with one configuration.

    Args:
        checkout: Checkout of the repository of the library.
    """

    checkout: Path = Path()

    def start(self, tasks: Sequence[Task], folder: Path) -> Process:
        """Write the images in the format of the library, and start its script."""
        (task,) = tasks
        environ = {**environment(ROOT, folder), "OMP_NUM_THREADS": "1"}
        known = os.environ.get("PYTHONPATH")
        environ["PYTHONPATH"] += os.pathsep + known if known else ""
        with np.load(task["config"]["data"]["path"]) as arrays:
            command = self.command(task["config"], dict(arrays), folder)
        return Process(command, folder, environ)

    @abstractmethod
    def command(self, config: Config, arrays: Mapping[str, np.ndarray], folder: Path) -> list[str]:
        """Write the input files, and return the command line."""


@dataclass(frozen=True)
class PflResearch(Rival):
    """The CIFAR-10 benchmark of pfl-research, which must be installed (`pip install pfl`).

    Args:
        processes: Number of processes.
    """

    processes: int = 1

    def command(self, config: Config, arrays: Mapping[str, np.ndarray], folder: Path) -> list[str]:
        """Write the pickled images, and return the command line."""
        for part in ("train", "test"):
            rows = arrays[f"{part}_images"], arrays[f"{part}_labels"].reshape(-1, 1)
            (folder / f"cifar10_{part}.p").write_bytes(pickle.dumps(rows))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launcher = [*torchrun, str(self.processes)] if self.processes > 1 else []
        script = [str(FOLDER / "pfl_rounds.py"), str(self.checkout / "benchmarks"), str(folder)]
        cohort = ["--cohort_size", str(config["clients"]["per_round"])]
        return [sys.executable, *launcher, *script, ENDLESS, *cohort]


class HtFLlib(Rival):
    """The script of HtFLlib, which requires the packages h5py and calmsize."""

    def command(self, config: Config, arrays: Mapping[str, np.ndarray], folder: Path) -> list[str]:
        """Write a file for each client and split, and return the command line."""
        x = arrays["train_images"].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        y = arrays["train_labels"].reshape(-1).astype(np.int64)
        clients = config["clients"]["count"]
        share = config["data"]["split"]["test"]
        # HtFLlib reads the data from ../dataset.
        data = folder.parent / "dataset" / "generated"
        for client, rows in enumerate(np.array_split(np.arange(len(y)), clients)):
            tests, train = np.split(rows, [round(share * len(rows))])
            for part, own in {"train": train, "test": tests}.items():
                write_client_file(data / part / f"{client}.npz", x=x[own], y=y[own])
        defaults = config["clients"]["defaults"]
        script = [str(FOLDER / "htfllib_rounds.py"), str(self.checkout / "system")]
        options = ["-data", "generated", "-m", "HtFE-img-2", "-algo", "FD", "-nc", str(clients)]
        options += ["-lbs", str(defaults["batch_size"]), "-lr", str(defaults["optimizer"]["lr"])]
        runtime = config["runtime"]
        process = [runtime.get("device", "cpu"), str(runtime["threads"])]
        return [sys.executable, *script, *process, ENDLESS, *options]


def environment(tree: Path, folder: Path) -> dict[str, str]:
    """Return the environment variables of a process that imports the package from a source tree.

    Args:
        tree: The source tree.
        folder: Folder of temporary files.
    """
    # As with an installed package, all contenders use compiled modules.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    # PYTHONSAFEPATH: modules next to the script must not hide those of the standard library.
    return {
        **inherited,
        "PYTHONPATH": str(tree),
        "PYTHONSAFEPATH": "1",
        "GOMP_SPINCOUNT": "1000",
        "TMPDIR": str(folder),
    }
