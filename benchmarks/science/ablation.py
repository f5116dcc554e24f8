#!/usr/bin/env python3
"""Leave out one component of Hybrid at a time, in federations of the benchmark.

    python -m benchmarks ablation [--federations digits,sensors] [--seeds 630,631]

Repeats the archived runs of Hybrid with components (docs/benchmark) with the same tuned settings,
with all components and without one. The table contains the difference from the runs with all
components, in points of balanced accuracy on the global test, with a 95% interval from paired runs.
Interrupted commands continue.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common import repetition_parser
from benchmarks.science.thresholds import METRIC, ROOT
from hetero_fl.experiment.benchmark.archive import PUBLISHED
from hetero_fl.experiment.benchmark.protocol import Benchmark
from hetero_fl.experiment.benchmark.repetition import repeat_row
from hetero_fl.reporting.benchmark.tables import format_points
from hetero_fl.reporting.comparison.significance import PairedDifference, paired_difference
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


def cell(difference: PairedDifference | None) -> str:
    """Format a difference in points with its interval."""
    if difference is None:
        return "–"
    low, high = format_points(difference.low), format_points(difference.high)
    return f"{format_points(difference.mean)} [{low}, {high}]"


def main() -> None:
    """Print a table with a row for each component."""
    parser = repetition_parser(__doc__, "runs/ablation")
    parser.add_argument(
        "--federations",
        default="digits,fashion_dirichlet,fashion_classes,sensors",
        help="names in configs/benchmark (%(default)s)",
    )
    options = parser.parse_args()
    names, seeds = options.federations.split(","), options.seeds
    changes, extra = CHANGES, []
    if options.quick:
        names, seeds, extra = names[:1], [630], ["rounds=1"]
        changes = dict([*CHANGES.items()][:1])
    benchmark = Benchmark.load(ROOT / PUBLISHED)

    def repeat(name: str, overrides: Sequence[str] = ()) -> dict[int, float]:
        scores = repeat_row(
            name, ROW, out=options.out, seeds=seeds, overrides=[*overrides, *extra], quiet=True
        )
        return {seed: repeated for seed, (_, repeated) in scores[METRIC].items()}

    complete = {name: repeat(name) for name in names}
    rows = []
    for component, change in changes.items():
        cells = [cell(paired_difference(repeat(name, [change]), complete[name])) for name in names]
        rows.append([component, *cells])
    titles = [benchmark.federations[name].title for name in names]
    print(markdown_table(["Left out", *titles], rows, ["left", *["right"] * len(titles)]))


if __name__ == "__main__":
    main()
