"""Options, runs and table cells of benchmarks that repeat archived rows of the benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import add_quick, seed_list
from benchmarks.science.thresholds import METRIC
from hetero_fl.experiment.benchmark.repetition import repeat_row
from hetero_fl.reporting.benchmark.tables import format_points
from hetero_fl.reporting.comparison.significance import PairedDifference


class Scores(NamedTuple):
    """Balanced accuracy on the global test of the runs of a row, keyed by seed.

    Attributes:
        archived: Scores of the archived runs.
        repeated: Scores of the repeated runs.
    """

    archived: dict[int, float]
    repeated: dict[int, float]


def repetition_parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser with the options of benchmarks that repeat archived runs.

    Args:
        description: Docstring of the benchmark.
        out: Default folder of the runs.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=seed_list, help="seeds of the archived runs, separated by commas (all)"
    )
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the runs")
    add_quick(parser)
    return parser


def repeat(
    federation: str, row: str, options: argparse.Namespace, overrides: Sequence[str]
) -> Scores:
    """Repeat the runs of a row with changes. Finished runs are read from their folder.

    Args:
        federation: Name of a file in `configs/benchmark`.
        row: Name of the row, such as `hybrid/all`.
        options: Options of `repetition_parser`. With `--quick`, one seed has one round.
        overrides: Changes to the configuration, as `key.path=value`.
    """
    seeds, extra = ([630], ["rounds=1"]) if options.quick else (options.seeds, [])
    scores = repeat_row(
        federation, row, out=options.out, seeds=seeds, overrides=[*overrides, *extra], quiet=True
    )[METRIC]
    return Scores(
        {seed: old for seed, (old, _) in scores.items()},
        {seed: new for seed, (_, new) in scores.items()},
    )


def difference_cell(difference: PairedDifference | None) -> str:
    """Format a difference in points with its interval."""
    if difference is None:
        return "–"
    low, high = format_points(difference.low), format_points(difference.high)
    return f"{format_points(difference.mean)} [{low}, {high}]"
