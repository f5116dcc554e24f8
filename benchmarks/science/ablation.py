#!/usr/bin/env python3
"""Leave out one component of Hybrid at a time, in federations of the benchmark.

    python -m benchmarks ablation [--federations digits,sensors] [--seeds 630,631]

Repeats the archived runs of Hybrid with components (docs/benchmark) with the same tuned settings,
with all components and without one. The table contains the difference from the runs with all
components, in points of balanced accuracy on the global test, with a 95% interval from paired runs.
Interrupted commands continue.
"""

from __future__ import annotations

from benchmarks.science.repeated_rows import difference_cell, repeat, repetition_parser
from benchmarks.science.thresholds import ROOT
from hetero_fl.experiment.benchmark.archive import PUBLISHED
from hetero_fl.experiment.benchmark.protocol import Benchmark
from hetero_fl.reporting.comparison.significance import paired_difference
from hetero_fl.reporting.rendering import markdown_table

ROW = "hybrid/all"
CHANGES = {
    "logit-adjusted loss": "algorithm.logit_adjustment=false",
    "contrast-weighted teacher": "algorithm.teacher=mean",
    "alignment": "algorithm.align=0",
    "recalibrated statistics": "algorithm.recalibrate=[]",
    "replay at the clients": "algorithm.replay_weight=0",
}
"""The changes that leave out a component, keyed by its name.

Fine-tuning before local tests does not change the scores on the global test.
"""


def main() -> None:
    """Print a table with a row for each component."""
    parser = repetition_parser(__doc__, "runs/ablation")
    parser.add_argument(
        "--federations",
        default="digits,fashion_classes,fashion_dirichlet",
        help="names in configs/benchmark (%(default)s)",
    )
    options = parser.parse_args()
    names = options.federations.split(",")
    changes = CHANGES
    if options.quick:
        names = names[:1]
        changes = dict(list(CHANGES.items())[:1])
    benchmark = Benchmark.load(ROOT / PUBLISHED)

    complete = {name: repeat(name, ROW, options, []).repeated for name in names}
    rows = []
    for component, change in changes.items():
        cells = []
        for name in names:
            without = repeat(name, ROW, options, [change]).repeated
            cells.append(difference_cell(paired_difference(without, complete[name])))
        rows.append([component, *cells])
    titles = [benchmark.federations[name].title for name in names]
    print(markdown_table(["Left out", *titles], rows, ["left", *["right"] * len(titles)]))


if __name__ == "__main__":
    main()
