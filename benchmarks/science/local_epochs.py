#!/usr/bin/env python3
"""Repeat rows of the benchmark that distill on proxy rows with more local epochs.

    python -m benchmarks local_epochs [--federations digits,sensors] [--methods feddf,ds_fl]

In the benchmark (docs/benchmark), methods that distill on proxy rows tune the epochs on these rows
and have the local epochs of the configuration. This benchmark repeats their rows with components
with the same tuned settings and three local epochs. The table contains the balanced accuracy on the
global test with both numbers of epochs, in percent, and the difference between Hybrid and the
method with three epochs, in points, with a 95% interval from paired runs. Interrupted commands
continue.
"""

from __future__ import annotations

from benchmarks.common import repetition_parser
from benchmarks.science.ablation import cell
from benchmarks.science.thresholds import METRIC, ROOT
from hetero_fl.experiment.benchmark.archive import PUBLISHED
from hetero_fl.experiment.benchmark.protocol import Benchmark
from hetero_fl.experiment.benchmark.repetition import repeat_row
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
        default="digits,fashion_dirichlet,fashion_classes,sensors,xrays_three",
        help="names in configs/benchmark (%(default)s)",
    )
    parser.add_argument(
        "--methods", default="feddf,ds_fl", help="methods to compare with Hybrid (%(default)s)"
    )
    options = parser.parse_args()
    names, methods = options.federations.split(","), options.methods.split(",")
    seeds = options.seeds
    overrides = [f"clients.defaults.epochs={EPOCHS}"]
    if options.quick:
        names, methods, seeds, overrides = names[:1], methods[:1], [630], [*overrides, "rounds=1"]
    benchmark = Benchmark.load(ROOT / PUBLISHED)
    lines = []
    for name in names:
        hybrid: dict[int, float] = {}
        for method in (HYBRID, *methods):
            scores = repeat_row(
                name,
                f"{method}/all",
                out=options.out,
                seeds=seeds,
                overrides=overrides,
                quiet=True,
            )[METRIC]
            archived = {seed: old for seed, (old, _) in scores.items()}
            repeated = {seed: new for seed, (_, new) in scores.items()}
            hybrid = hybrid or repeated
            difference = "" if method == HYBRID else cell(paired_difference(hybrid, repeated))
            lines.append(
                [
                    benchmark.federations[name].title,
                    algorithm_name(method),
                    score_cell(archived, METRIC),
                    score_cell(repeated, METRIC),
                    difference,
                ]
            )
    header = ["Federation", "Method", "Archived", f"{EPOCHS} local epochs", "Hybrid − method"]
    print(markdown_table(header, lines, ("left", "left", *["right"] * 3)))


if __name__ == "__main__":
    main()
