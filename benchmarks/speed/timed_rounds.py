"""Run configurations one turn at a time, for the benchmark `speed`.

    python timed_rounds.py TASKS.json

The script is executed with `PYTHONPATH` set to the source tree that is measured, so it imports only
the public interface of `hetero_fl`, except for loops. `TASKS.json` is a list of tasks with the keys
`config`, `turns` (number of turns), `rounds` (rounds per turn, or 0 if a turn is a whole run) and
`is_loop` (whether the loop of `tests/references` replaces the framework). For each line on standard
input, one line of JSON is printed, with the `seconds` of a turn, or with the peak memory of the
process in MiB, `peak_mib`, if the task has ended.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO


class TurnTimer:
    """Callback that reports the seconds of each turn and waits for the next request.

    Args:
        replies: Stream to which the seconds are written.
        turns: Number of turns after the first. After these, the run continues without waiting.
        rounds: Number of rounds per turn. The first turn is the first round, including startup.
    """

    def __init__(self, replies: TextIO, turns: int, rounds: int) -> None:
        self.replies = replies
        self.turns = turns
        self.rounds = rounds
        self.completed = 0
        self.started = time.perf_counter()

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Report the turn and wait, if a turn ends with this round."""
        ends_turn = self.completed % self.rounds == 0
        if ends_turn and self.completed <= self.turns * self.rounds:
            reply(self.replies, {"seconds": time.perf_counter() - self.started})
            sys.stdin.readline()
            self.started = time.perf_counter()
        self.completed += 1


def run_rounds(task: Mapping[str, Any], replies: TextIO) -> None:
    """Run the configuration of a task once, and wait for a request after each turn."""
    timer = TurnTimer(replies, task["turns"], task["rounds"])
    if task["is_loop"]:
        round_of_loop = make_loop(task["config"])
        for _ in range(task["turns"] * task["rounds"] + 1):
            round_of_loop()
            timer({})
        return
    import hetero_fl

    with tempfile.TemporaryDirectory() as folder:
        hetero_fl.run(task["config"], out=Path(folder) / "run", callbacks=[timer])


def run_repeatedly(task: Mapping[str, Any], replies: TextIO) -> None:
    """Run the configuration of a task from start to end, once for warm-up and once per turn."""
    import hetero_fl

    for _ in range(task["turns"] + 1):
        started = time.perf_counter()
        if task["is_loop"]:
            round_of_loop = make_loop(task["config"])
            for _ in range(task["config"]["rounds"]):
                round_of_loop()
        else:
            with tempfile.TemporaryDirectory() as folder:
                hetero_fl.run(task["config"], out=Path(folder) / "run")
        reply(replies, {"seconds": time.perf_counter() - started})
        sys.stdin.readline()


def make_loop(config: Mapping[str, Any]) -> Callable[[], None]:
    """Return a function that executes a round of the reference loop of a configuration."""
    import torch

    from hetero_fl.experiment import prepare
    from tests.references.loops import REFERENCES

    prepared = prepare(config)
    torch.set_num_threads(prepared.config.runtime.threads or torch.get_num_threads())
    loop = REFERENCES[config["algorithm"]["name"]](prepared)
    if prepared.config.evaluation.every > 1:
        # The rounds that are timed have no evaluation.
        loop.read = lambda: None  # type: ignore[method-assign]
    return loop.round


def peak_memory() -> float:
    """Return the peak resident memory of this process in MiB.

    On Linux, /proc is preferred because `ru_maxrss` includes the peak of the parent process.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def reply(replies: TextIO, message: Mapping[str, Any]) -> None:
    """Write a message as one line of JSON."""
    print(json.dumps(message), file=replies, flush=True)


def serve(path: str) -> None:
    """Run the tasks of a JSON file one after the other."""
    # Replies use the original stdout, and other output is redirected to stderr.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for task in json.loads(Path(path).read_text(encoding="utf-8")):
        sys.stdin.readline()
        if task["rounds"]:
            run_rounds(task, replies)
        else:
            run_repeatedly(task, replies)
        reply(replies, {"peak_mib": peak_memory()})


if __name__ == "__main__":
    serve(sys.argv[1])
