"""Options and trainers in memory that the benchmarks share."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from typing import Any

import torch

from hetero_fl.experiment import PreparedRun
from hetero_fl.federation.trainer import FederatedTrainer


def arguments(doc: str | None, pairs: int = 5) -> argparse.ArgumentParser:
    """Create a parser with the options that the benchmarks share.

    Args:
        doc: Description of the benchmark, for `--help`.
        pairs: Default number of timed turns.
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
    options.pairs = 1 if options.quick else options.pairs
    torch.set_num_threads(options.threads)
    return options


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rounds_of(prepared: PreparedRun, **runtime: Any) -> FederatedTrainer:
    """Create a trainer with changed settings of the section `runtime`.

    This also sets the number of threads of the process.
    """
    config = prepared.config.model_copy(
        update={"runtime": prepared.config.runtime.model_copy(update=runtime)}
    )
    return replace(prepared, config=config).make_trainer()
