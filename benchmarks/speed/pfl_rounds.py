"""Run the training script of pfl-research one round at a time, for the case `pfl_research`.

    python pfl_rounds.py BENCHMARKS DATA ROUNDS [option of its train.py …]

`BENCHMARKS` is the folder `benchmarks` of a checkout of pfl-research, and `DATA` is the folder with
the pickled images. The training script is unchanged, except that a callback replaces the stopwatch.
For each line on standard input, a round is trained and the process with rank 0 prints one line of
JSON with the `seconds` of the round.
"""

from __future__ import annotations

import json
import logging
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import pfl.callback.stopwatch
import torch.distributed as dist
from pfl.callback.base import TrainingProcessCallback
from pfl.metrics import Metrics


class TurnTimer(TrainingProcessCallback):  # type: ignore[misc]  # pfl has no types
    """Callback that reports the seconds of each round and waits for the next request."""

    replies: TextIO

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def after_central_iteration(
        self, aggregate_metrics: Any, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Report the seconds of the round that has ended, and wait for the next request."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            seconds = time.perf_counter() - self.started
            print(json.dumps({"seconds": seconds}), file=self.replies, flush=True)
            sys.stdin.readline()
        if dist.is_initialized():
            # All processes start the next round at the same time.
            dist.barrier()
        self.started = time.perf_counter()
        return False, Metrics()


def serve(benchmarks: Path, data: str, rounds: str, options: list[str]) -> None:
    """Run the training script of pfl-research.

    Args:
        benchmarks: The folder `benchmarks` of a checkout of pfl-research.
        data: Folder with the pickled images.
        rounds: Number of rounds.
        options: Additional options of the training script.
    """
    # Replies use the original stdout, and other output is redirected to stderr.
    TurnTimer.replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if os.environ.get("RANK", "0") == "0":
        sys.stdin.readline()
    logging.disable()
    pfl.callback.stopwatch.StopwatchCallback = TurnTimer
    config = str(benchmarks / "image_classification/configs/baseline.yaml")
    script = str(benchmarks / "image_classification/pytorch/train.py")
    sys.path.insert(0, str(benchmarks))
    sys.argv = [script, "--args_config", config, "--data_path", data, *options]
    sys.argv += ["--central_num_iterations", rounds, "--evaluation_frequency", rounds]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
