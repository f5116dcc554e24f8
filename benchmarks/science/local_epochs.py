#!/usr/bin/env python3
"""Repeat rows of the benchmark with three local epochs, for methods that distill on proxy rows.

    python -m benchmarks local_epochs [--federations digits,sensors] [--methods feddf,ds_fl]

In the benchmark (docs/benchmark), methods that distill on proxy rows tune the epochs on these rows
and have the local epochs of the configuration. This benchmark repeats their rows with components
with the same tuned settings and three local epochs. The table contains the balanced accuracy on the
global test with both numbers of epochs, in percent, and the difference between Hybrid and the
method with three epochs, in points, with a 95% interval from paired runs. Archived runs may be from
another machine, whose rounding differs. Interrupted commands continue.
"""

from __future__ import annotations

from benchmarks.science.repeated_rows import difference_cell, repeat, repetition_parser
from benchmarks.science.thresholds import METRIC, ROOT
from hetero_fl.experiment.benchmark.archive import PUBLISHED
from hetero_fl.experiment.benchmark.protocol import Benchmark
from hetero_fl.reporting.benchmark.tables import score_cell
from hetero_fl.reporting.comparison.significance import paired_difference
from hetero_fl.reporting.formatting import algorithm_name
from hetero_fl.reporting.rendering import markdown_table

EPOCHS = 3
HYBRID = "hybrid"


def main() -> None:
    """Print a table with a line for each federation and method."""
    parser = repetition_parser(__doc__, "runs/local_epochs")
    parser.add_argument(
        "--federations",
        default="fashion_dirichlet,digits,sensors,fashion_classes",
        help="names in configs/benchmark (%(default)s)",
    )
    parser.add_argument(
        "--methods", default="feddf,ds_fl", help="methods to compare with Hybrid (%(default)s)"
    )
    options = parser.parse_args()
    names = options.federations.split(",")
    methods = options.methods.split(",")
    if options.quick:
        names = names[:1]
        methods = methods[:1]
    benchmark = Benchmark.load(ROOT / PUBLISHED)
    overrides = [f"clients.defaults.epochs={EPOCHS}"]
    lines = []
    for name in names:
        scores = {
            method: repeat(name, f"{method}/all", options, overrides)
            for method in (HYBRID, *methods)
        }
        for method, (archived, repeated) in scores.items():
            difference = paired_difference(scores[HYBRID].repeated, repeated)
            lines.append(
                [
                    benchmark.federations[name].title,
                    algorithm_name(method),
                    score_cell(archived, METRIC),
                    score_cell(repeated, METRIC),
                    "" if method == HYBRID else difference_cell(difference),
                ]
            )
    header = ["Federation", "Method", "Archived", f"{EPOCHS} local epochs", "Hybrid − method"]
    print(markdown_table(header, lines, ("left", "left", *["right"] * 3)))


if __name__ == "__main__":
    main()
