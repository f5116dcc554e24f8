"""Options and formats that the benchmarks share."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Collection


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


def mean_text(values: Collection[float], decimals: int = 2, sign: str = "") -> str:
    """Format the mean of values and, if there are several, their standard deviation.

    Args:
        values: The values, at least one.
        decimals: Number of decimals.
        sign: `+` for a sign of positive means.
    """
    text = f"{statistics.mean(values):{sign}.{decimals}f}"
    return f"{text} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else text
