"""What the benchmarks share: arguments, data, runs in memory, paired timing, tables.

Figures are ratios of times measured side by side in one process: the contenders take turns, every other time in reverse
order, after one turn that is not counted. Printed are the median and the range of the ratios of the turns.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import Dataset, load_source, make_images
from hetero_fl.experiment import PreparedRun
from hetero_fl.federation.synchronous import SynchronousTrainer

CLASSES = 10
CPU_TIME = False


def arguments(doc: str | None, pairs: int = 5, data: bool = False) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=pairs, help=f"timed turns, after one not counted ({pairs})"
    )
    parser.add_argument(
        "--threads", type=int, default=cores(), help="threads of this process (all cores)"
    )
    add_quick(parser)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count this process's processor time, on a busy machine; worker processes then seem to cost nothing",
    )
    if data:
        parser.add_argument(
            "--data",
            type=Path,
            help="CIFAR-10 as .npz (train_images, …); without it generated images",
        )
    return parser


def add_quick(parser: argparse.ArgumentParser) -> None:
    """Add `--quick`, with which a benchmark takes seconds and its figures mean nothing."""
    parser.add_argument(
        "--quick", action="store_true", help="one turn of a small case: to see that it works"
    )


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; threads are set."""
    global CPU_TIME
    options = parser.parse_args()
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(
        os.environ
    ):  # as `hetero-fl` has it, before torch is loaded: once more
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GOMP_SPINCOUNT": "1000"})
    CPU_TIME = options.cpu_time
    options.pairs = 1 if options.quick else options.pairs
    torch.set_num_threads(options.threads)
    return options


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def images(path: Path | None, rows: int) -> Dataset:
    """CIFAR-10 from a file, or as many generated images of its shape."""
    if path is not None:
        return load_source(SourceConfig(name="npz", path=str(path)), Path())
    return make_images(rows, max(200, rows // 5), classes=CLASSES, channels=3, side=32)


def rounds_of(prepared: PreparedRun, **runtime: Any) -> SynchronousTrainer:
    """A run in memory, with other settings of `runtime` (executor, workers, threads); sets this process's threads to its own."""
    config = prepared.config.model_copy(
        update={"runtime": prepared.config.runtime.model_copy(update=runtime)}
    )
    return replace(prepared, config=config).make_trainer()


def now() -> float:
    """Seconds, on the clock that was asked for."""
    return time.process_time() if CPU_TIME else time.perf_counter()


def in_turns(contenders: Mapping[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    """Seconds of each contender in each counted turn."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(pairs + 1):
        for name in names if turn % 2 else reversed(names):
            begun = now()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(now() - begun)
    return seconds


def print_ratios(
    title: str,
    seconds: Mapping[str, Sequence[float]],
    against: str,
    targets: Mapping[str, float | None],
) -> None:
    """A line for each contender with a target (None: for information): its times over those of the one it is held against."""
    base = seconds[against]
    print(
        f"\n{title}\n  {against}: {statistics.median(base):.3f} s ({min(base):.3f} to {max(base):.3f})"
    )
    for name, target in targets.items():
        ratios = [a / b for a, b in zip(seconds[name], base, strict=True)]
        middle = statistics.median(ratios)
        aim = (
            ""
            if target is None
            else f"; target {target}: {'met' if middle <= target else 'missed'}"
        )
        print(f"  {name} / {against}: {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f}){aim}")


class Ours:
    """A run whose clients' losses are remembered, round by round; its threads are its own, not the bare loop's.

    `evaluate`: a round ends with its evaluation. `runtime`: settings of `runtime` other than the prepared ones.
    """

    def __init__(self, prepared: PreparedRun, evaluate: bool = False, **runtime: Any) -> None:
        others = torch.get_num_threads()
        self.rounds, self.evaluate, self.losses = (
            rounds_of(prepared, **runtime),
            evaluate,
            list[list[float]](),
        )
        self.threads = torch.get_num_threads()  # as its executor has just set them
        torch.set_num_threads(others)

    def round(self) -> None:
        """A round."""
        others = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self.losses.append(list(self.rounds.run_round()["train_loss"].values()))
        if self.evaluate:
            self.rounds.evaluate()
        torch.set_num_threads(others)


def agree(
    what: str,
    ours: Sequence[Sequence[float]],
    bare: Sequence[Sequence[float]],
    tolerance: float = 0.005,
) -> None:
    """End with a line if the losses of the first two rounds differ: then the two did not compute the same thing.

    The second round hangs on everything that the first one exchanged; there the middle client is compared, as round-off grows
    fast where BatchNorm sees one pixel of a small batch (the last blocks of a ResNet-18 on 32x32 images).
    """
    first, second = (
        sorted(abs(a - b) / max(1.0, abs(b)) for a, b in zip(*pair, strict=True))
        for pair in zip(ours[:2], bare[:2], strict=True)
    )
    worst = (
        max(first[-1], second[len(second) // 2])
        if all(map(math.isfinite, [*first, *second]))
        else math.nan
    )
    if not worst <= tolerance:
        raise SystemExit(
            f"{what}: losses differ by {worst:.2g} from the bare loop's; no ratio means anything"
        )
    print(f"  {what}: same losses as the bare loop to {worst:.1g}")
