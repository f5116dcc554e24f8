"""Run configurations a round at a time, whenever `against_commit` asks for one.

    python timed_rounds.py TASKS.json

The script is executed with `PYTHONPATH` set to the tree that is measured, so it imports nothing but
the public interface of `hetero_fl`. `TASKS.json` is a list of tasks: a `config`, the number of
`turns`, and `rounds` per turn, or 0 if a turn is a run of its own. For each line on standard input
one line of JSON is printed: the `seconds` of a turn, or that the task is `done`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class TurnTimer:
    """A callback that reports the seconds of each turn, and then waits for the next request.

    Args:
        replies: Where to report to.
        turns: Turns that are reported; afterwards the run goes on without waiting.
        rounds: Rounds per turn. The first round, with all that precedes it, is a turn of its own.
    """

    def __init__(self, replies: TextIO, turns: int, rounds: int) -> None:
        self.replies = replies
        self.turns = turns
        self.rounds = rounds
        self.completed = 0
        self.started = time.perf_counter()

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Report the turn that ends with this round, if one does."""
        ends_turn = self.completed % self.rounds == 0
        if ends_turn and self.completed <= self.turns * self.rounds:
            reply(self.replies, {"seconds": time.perf_counter() - self.started})
            sys.stdin.readline()
            self.started = time.perf_counter()
        self.completed += 1


def run_rounds(task: Mapping[str, Any], replies: TextIO) -> None:
    """Run a task's configuration once, stopping after each turn."""
    import hetero_fl

    timer = TurnTimer(replies, task["turns"], task["rounds"])
    with tempfile.TemporaryDirectory() as folder:
        hetero_fl.run(task["config"], out=Path(folder) / "run", callbacks=[timer])


def run_repeatedly(task: Mapping[str, Any], replies: TextIO) -> None:
    """Run the configuration of a task completely, once for each turn and once for warm-up."""
    import hetero_fl

    for _ in range(task["turns"] + 1):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            hetero_fl.run(task["config"], out=Path(folder) / "run")
        reply(replies, {"seconds": time.perf_counter() - started})
        sys.stdin.readline()


def reply(replies: TextIO, message: Mapping[str, Any]) -> None:
    """Write one line of JSON."""
    print(json.dumps(message), file=replies, flush=True)


def serve(path: str) -> None:
    """Run all tasks of a file in order."""
    # Output of the package must not be mixed with replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for task in json.loads(Path(path).read_text(encoding="utf-8")):
        sys.stdin.readline()
        if task["rounds"]:
            run_rounds(task, replies)
        else:
            run_repeatedly(task, replies)
        reply(replies, {"done": True})


if __name__ == "__main__":
    serve(sys.argv[1])
