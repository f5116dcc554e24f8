"""Measure accuracy and traffic with compression in one direction, in both, and without.

    python -m benchmarks channel_cost [--seeds 0,1,2,3,4] [--out runs/channel_cost] [key=value ...]

The benchmark compares the settings in `CHANNELS` on `configs/medical_hetero.yaml`. Finished runs in
`--out` are not repeated. The command writes `channel_cost.csv` to `--out`, with a line for each
run, and prints the table of docs/how_to/compression.md, which contains means and standard
deviations over the seeds.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import hetero_fl

ROOT = Path(__file__).resolve().parents[2]
UP = "channel.compress=[topk: 0.01, quantize: 8]"
DOWN = "channel.compress_down=[topk: 0.05, quantize: 4]"
ENTROPY = "channel.entropy=true"
CHANNELS: dict[str, list[str]] = {
    "none": [],
    "up": [UP, ENTROPY],
    "down": [DOWN, ENTROPY],
    "small": ["channel.preset=small"],
}
METRICS = {
    "global_last_balanced_accuracy": "global balanced accuracy",
    "global_last_auroc": "global AUROC",
    "personal_last_accuracy": "local accuracy",
    "personal_last_balanced_accuracy": "local balanced accuracy",
    "personal_last_auroc": "local AUROC",
}
COLUMNS = ("seed", "up_bytes", "down_bytes", *METRICS)
MB = 1e6

Row = Mapping[str, str]


def run_channel(name: str, seeds: Sequence[int], out: Path, changes: Sequence[str]) -> list[Row]:
    """Run the missing seeds of a setting and return a row for each seed.

    Args:
        name: Name of the setting in `CHANNELS`.
        seeds: Seeds of the runs.
        out: Folder that contains a comparison for each setting.
        changes: Overrides of the configuration.
    """
    overrides = [*CHANNELS[name], "output.plots=false", "output.report=false", *changes]
    comparison = hetero_fl.compare(
        ROOT / "configs" / "medical_hetero.yaml",
        "hybrid",
        seeds,
        out=out / name,
        overrides=overrides,
        quiet=False,
    )
    with (comparison.path / "comparison.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def format_row(name: str, rows: Sequence[Row]) -> str:
    """Format the table row of a setting, with means and standard deviations over the seeds."""
    up, down = (
        statistics.fmean(float(r[f"{direction}_bytes"]) for r in rows) / MB
        for direction in ("up", "down")
    )
    cells = [f"`{name}`", f"{up:,.1f}", f"{down:,.1f}"]
    for metric in METRICS:
        values = [100 * float(row[metric]) for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.fmean(values):.1f} ± {spread:.1f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Execute missing runs, write the CSV file and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--out", type=Path, default=Path("runs/channel_cost"))
    parser.add_argument("changes", nargs="*", metavar="key=value")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    found = {n: run_channel(n, seeds, options.out, options.changes) for n in CHANNELS}
    with (options.out / "channel_cost.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["channel", *COLUMNS])
        for name, rows in found.items():
            writer.writerows([name, *(row[column] for column in COLUMNS)] for row in rows)
    print(f"| channel | MB up | MB down | {' | '.join(METRICS.values())} |")
    print(f"| {' | '.join(['---'] * (3 + len(METRICS)))} |")
    for name, rows in found.items():
        print(format_row(name, rows))


if __name__ == "__main__":
    main()
