#!/usr/bin/env python3
"""Repeat rows of the benchmark with the other choice of statistics for the global test.

    python -m benchmarks recalibration [--federation xrays_three] [--rows feddf/all,hybrid/all]

Validation decides for each row of the benchmark (docs/benchmark) whether BatchNorm statistics are
recalibrated for the global test. The choice changes evaluation only. The table contains the
balanced accuracy on the global test with both choices, in percent, and the difference between them
with a 95% interval from paired runs. Interrupted commands continue. Run the command on the machine
of the archive.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.science.repeated_rows import difference_cell, repeat, repetition_parser
from benchmarks.science.thresholds import METRIC, ROOT
from hetero_fl.experiment.benchmark.results import BenchmarkResults
from hetero_fl.reporting.benchmark.scores import row_title
from hetero_fl.reporting.benchmark.tables import score_cell
from hetero_fl.reporting.comparison.significance import paired_difference
from hetero_fl.reporting.rendering import markdown_table

KEY = "algorithm.recalibrate"
TEST = "global_test"


def recalibrated(overrides: Sequence[str]) -> list[str]:
    """Return the predictions for which statistics are recalibrated.

    Example:
        >>> recalibrated(["rounds=3", "algorithm.recalibrate=[global_test,local_test]"])
        ['global_test', 'local_test']
    """
    values = dict(override.split("=", 1) for override in overrides)
    return values[KEY].strip("[]").split(",")


def main() -> None:
    """Print a table with a line for each row."""
    parser = repetition_parser(__doc__, "runs/recalibration")
    parser.add_argument(
        "--federation", default="xrays_three", help="name in configs/benchmark (%(default)s)"
    )
    parser.add_argument(
        "--rows", default="feddf/all,hybrid/all", help="rows, separated by commas (%(default)s)"
    )
    options = parser.parse_args()
    name = options.federation
    rows = options.rows.split(",")
    if options.quick:
        name = "fashion_dirichlet"
        rows = rows[:1]
    results = BenchmarkResults(ROOT / "configs" / "benchmark", ROOT / "docs" / "benchmark")
    lines = []
    for row in rows:
        method, components = row.split("/")
        seed = results.benchmark.protocol.seeds[0]
        tests = recalibrated(results.run_overrides(name, (method, components), seed))
        chosen = TEST in tests
        other = [test for test in tests if test != TEST] if chosen else [TEST, *tests]
        archived, repeated = repeat(name, row, options, [f"{KEY}=[{','.join(other)}]"])
        with_test, without_test = (archived, repeated) if chosen else (repeated, archived)
        lines.append(
            [
                row_title((method, components), results.names),
                "recalibrated" if chosen else "of the clients",
                score_cell(with_test, METRIC),
                score_cell(without_test, METRIC),
                difference_cell(paired_difference(with_test, without_test)),
            ]
        )
    header = ["Method", "Chosen by validation", "Recalibrated", "Of the clients", "Difference"]
    print(markdown_table(header, lines, ("left", "left", *["right"] * 3)))


if __name__ == "__main__":
    main()
