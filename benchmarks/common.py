"""Options, data, runs in memory and paired timing that the benchmarks share.

Contenders, which are the programs to compare, are timed in turns within one process, in reverse
order every other turn. The first turn is a warm-up. The output is the median and range of the
time ratios over the turns. A bare loop is plain PyTorch code with the same arithmetic as a run.
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
_SETTINGS = argparse.Namespace(cpu_time=False)


def arguments(doc: str | None, pairs: int = 5, data: bool = False) -> argparse.ArgumentParser:
    """Create a parser with the options that the benchmarks share.

    Args:
        doc: Description of the benchmark, for `--help`.
        pairs: Default number of timed turns.
        data: Whether to add the option `--data`.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=pairs, help=f"timed turns after one warm-up turn ({pairs})"
    )
    parser.add_argument(
        "--threads", type=int, default=cores(), help="threads of this process (all cores)"
    )
    add_quick(parser)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure processor time of this process, for busy machines; excludes workers",
    )
    if data:
        parser.add_argument(
            "--data",
            type=Path,
            help="CIFAR-10 as .npz (train_images, …); without it generated images",
        )
    return parser


def add_quick(parser: argparse.ArgumentParser) -> None:
    """Add the option `--quick`, which runs a small case for tests, without meaningful results."""
    parser.add_argument("--quick", action="store_true", help="one turn of a small case, for tests")


def seed_list(text: str) -> list[int]:
    """Parse seeds that are separated by commas.

    Raises:
        argparse.ArgumentTypeError: If the text contains something else.
    """
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers separated by commas, got {text!r}"
        ) from None


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options and set the number of threads.

    If `GOMP_SPINCOUNT` is not set, the process is restarted with this variable.
    """
    options = parser.parse_args()
    # `hetero-fl` sets this variable before torch is loaded. Torch is loaded here already.
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GOMP_SPINCOUNT": "1000"})
    _SETTINGS.cpu_time = options.cpu_time
    options.pairs = 1 if options.quick else options.pairs
    torch.set_num_threads(options.threads)
    return options


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def images(path: Path | None, rows: int) -> Dataset:
    """Load CIFAR-10 from a file, or generate `rows` training images of that shape without one."""
    if path is not None:
        return load_source(SourceConfig(name="npz", path=str(path)), Path())
    return make_images(rows, max(200, rows // 5), classes=CLASSES, channels=3, side=32)


def rounds_of(prepared: PreparedRun, **runtime: Any) -> SynchronousTrainer:
    """Create a trainer with changed settings of the section `runtime`.

    This also sets the number of threads of the process.
    """
    config = prepared.config.model_copy(
        update={"runtime": prepared.config.runtime.model_copy(update=runtime)}
    )
    return replace(prepared, config=config).make_trainer()


def now() -> float:
    """Return the current time in seconds: processor time with `--cpu-time`, else wall time."""
    return time.process_time() if _SETTINGS.cpu_time else time.perf_counter()


def in_turns(contenders: Mapping[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    """Time contenders in turns.

    Args:
        contenders: Functions to time, keyed by name.
        pairs: Number of timed turns after the warm-up turn.

    Returns:
        The seconds of each timed turn, keyed by contender.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(pairs + 1):
        for name in names if turn % 2 else reversed(names):
            started = now()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(now() - started)
    return seconds


def print_ratios(
    title: str,
    seconds: Mapping[str, Sequence[float]],
    against: str,
    targets: Mapping[str, float | None],
) -> None:
    """Print the time ratios of contenders to a reference.

    Args:
        title: Title of the output.
        seconds: Seconds of each turn, keyed by contender.
        against: Name of the reference.
        targets: Largest acceptable ratios, keyed by contender. A value of None means that there is
            no target.
    """
    base = seconds[against]
    print(
        f"\n{title}\n  {against}: {statistics.median(base):.3f} s "
        f"({min(base):.3f} to {max(base):.3f})"
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


class TrainerRun:
    """A run that records the losses of its clients and has its own number of threads.

    Args:
        prepared: The prepared run.
        evaluate: Whether each round ends with an evaluation.
        **runtime: Changed settings of the section `runtime`.
    """

    def __init__(self, prepared: PreparedRun, evaluate: bool = False, **runtime: Any) -> None:
        others = torch.get_num_threads()
        self.rounds = rounds_of(prepared, **runtime)
        self.evaluate = evaluate
        self.losses: list[list[float]] = []
        # The number of threads that the executor has set.
        self.threads = torch.get_num_threads()
        torch.set_num_threads(others)

    def round(self) -> None:
        """Run one round and record the training losses of its clients."""
        others = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self.losses.append(list(self.rounds.run_round()["train_loss"].values()))
        if self.evaluate:
            self.rounds.evaluate()
        torch.set_num_threads(others)


def agree(
    what: str,
    ours: Sequence[Sequence[float]],
    expected: Sequence[Sequence[float]],
    tolerance: float = 0.005,
    reference: str = "the bare loop",
) -> None:
    """Exit if the losses of the first two rounds differ from the losses of a reference.

    The losses of the second round depend on everything that was exchanged in the first round. In
    the first round, the largest difference over the clients is checked. In the second round, the
    median difference is checked, because round-off errors grow fast if BatchNorm is applied to
    single pixels of small batches, as in the last blocks of a ResNet-18 on 32x32 images.

    Args:
        what: Name of the comparison.
        ours: Losses of the clients for each round.
        expected: Losses of the reference for each round.
        tolerance: Largest acceptable relative difference.
        reference: Title of the reference.

    Raises:
        SystemExit: If the losses differ or are not finite.
    """
    first, second = (
        sorted(abs(a - b) / max(1.0, abs(b)) for a, b in zip(*pair, strict=True))
        for pair in zip(ours[:2], expected[:2], strict=True)
    )
    worst = (
        max(first[-1], second[len(second) // 2])
        if all(map(math.isfinite, [*first, *second]))
        else math.nan
    )
    if not worst <= tolerance:
        raise SystemExit(
            f"{what}: losses differ by {worst:.2g} from those of {reference}; "
            "the ratios are meaningless"
        )
    print(f"  {what}: same losses as {reference} to {worst:.1g}")
