#!/usr/bin/env python3
"""Compare the time to accuracy of synchronous and asynchronous distillation.

    python -m benchmarks asynchronous --data fashionmnist.npz --out runs/asynchronous

Twelve clients of three architectures train with Hybrid on Fashion-MNIST, and the speeds of the
clients differ by a factor of ten (configs/fashion_devices.yaml with less data). One variant is
synchronous. The other variants wait until a deadline, over-select clients, or train asynchronously,
and end after a fraction of the simulated time of the synchronous variant. For each seed, the target
accuracy is the global test accuracy of the synchronous run after the last round, minus one point.
Finished runs are stored in `--out` and not repeated. The command also writes `table.md` and
`time_to_accuracy.png` to `--out`. Target: asynchronous training reaches the target accuracy in at
most 0.5 of the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hetero_fl.experiment import prepare
from hetero_fl.federation.trainer import add_evaluation

CONFIG = Path(__file__).parents[2] / "configs" / "fashion_devices.yaml"
SMALLER = [
    "data.train_limit=4000", "data.test_limit=1000", "data.proxy.size=400",
    "algorithm.distill_epochs=5",
    "evaluation.every=1", "runtime.threads=1", "runtime.executor=serial",
]  # fmt: skip
ASYNC = ["runtime.mode=async", "evaluation.every=2"]
WAYS: dict[str, list[str]] = {
    "synchronous": [],
    "deadline": ["cohort.deadline={deadline}", "evaluation.every=2"],
    "deadline, partial work": [
        "cohort.deadline={deadline}",
        "cohort.partial_work=true",
        "evaluation.every=2",
    ],
    "over-selection": ["clients.per_round=8", "cohort.over_selection=1.5", "evaluation.every=2"],
    "asynchronous": ASYNC,
    "asynchronous, buffer 6": [*ASYNC, "runtime.buffer=6"],
    "asynchronous, buffer 3": [*ASYNC, "runtime.buffer=3"],
}
COMPARED = ["synchronous", "deadline", "over-selection", "asynchronous", "asynchronous, buffer 6"]
POINT, TIME_SHARE = 0.01, 0.5
Run = dict[str, Any]
# Points of simulated seconds, accuracy, total bytes and total uploads.
Curve = Sequence[tuple[float, float, int, int]]


def hold(overrides: list[str], until: float | None, rounds: int) -> Run:
    """Execute a run and record the global test accuracy over simulated time.

    Args:
        overrides: Overrides of the configuration.
        until: Simulated seconds after which the run ends. If None, time is not limited.
        rounds: Maximum number of rounds.

    Returns:
        The points of the curve under `curve`, and the total counts of the rounds under `counts`.
    """
    prepared = prepare(CONFIG, [*overrides, f"rounds={rounds}"])
    session = prepared.make_trainer()
    curve: list[tuple[float, float, int, int]] = []
    counts: dict[str, int] = {}
    while session.completed < rounds and (until is None or session.now < until):
        record = session.run_round()
        for key, count in record["counts"].items():
            counts[key] = counts.get(key, 0) + count
        if session.completed % prepared.config.evaluation.every == 0 or session.completed == rounds:
            add_evaluation(record, session.evaluate())
            traffic = session.traffic.up + session.traffic.down
            curve.append((session.now, record["global"]["accuracy"], traffic, counts["arrived"]))
    session.executor.close()
    return {
        "curve": [point for point in curve if until is None or point[0] <= until],
        "counts": counts,
    }


def durations(overrides: list[str]) -> list[float]:
    """Return the simulated task duration of each client in the first round, in seconds."""
    session = prepare(CONFIG, overrides).make_trainer()
    timing, size = session.environment.timing, 200_000
    return [
        timing.task_times(client_id, size, size, 0.0, 0).arrived
        for client_id in session.federation.client_infos
    ]


def reached(curve: Curve, target: float) -> float | None:
    """Return the first time from which on the accuracy stays at or above a target.

    The result is None if the last accuracy is below the target.

    Args:
        curve: Points in the order of time.
        target: Target accuracy.
    """
    at = None
    for seconds, accuracy, *_ in reversed(curve):
        if accuracy < target:
            break
        at = seconds
    return at


def target_of(runs: Mapping[str, Run]) -> tuple[float, float]:
    """Return the target accuracy of a seed, and the duration of the synchronous run.

    Args:
        runs: Runs with this seed, keyed by variant.
    """
    seconds, accuracy, *_ = runs["synchronous"]["curve"][-1]
    return accuracy - POINT, seconds


def table(found: Mapping[str, Mapping[str, Run]], ways: Sequence[str]) -> str:
    """Format a Markdown table with a row for each variant.

    The columns are the relative time to the target accuracy for each seed, the accuracy at half of
    the time of the synchronous run, and the uploads and traffic until then.

    Args:
        found: Runs, keyed by seed and variant.
        ways: Names of the variants.
    """
    rows = [
        "| variant | relative time to the target | accuracy at half of the time "
        "| uploads until then | MB until then |"
    ]
    rows.append("| --- | --- | --- | --- | --- |")
    for variant in ways:
        shares, half = [], []
        for runs in found.values():
            target, duration = target_of(runs)
            at = reached(runs[variant]["curve"], target)
            shares.append("never" if at is None else f"{at / duration:.2f}")
            half.append([p for p in runs[variant]["curve"] if p[0] <= TIME_SHARE * duration][-1])
        accuracies = " / ".join(f"{accuracy:.3f}" for _, accuracy, *_ in half)
        uploads, sent = (statistics.mean(p[i] for p in half) for i in (3, 2))
        rows.append(
            f"| {variant} | {' / '.join(shares)} | {accuracies} "
            f"| {uploads:,.0f} | {sent / 1e6:,.0f} |"
        )
    return "\n".join(rows) + "\n"


def figure(found: Mapping[str, Mapping[str, Run]], ways: Sequence[str], path: Path) -> None:
    """Plot the accuracy above the target over relative simulated time.

    Lines are means over the seeds, and bands are ranges.

    Args:
        found: Runs, keyed by seed and variant.
        ways: Names of the variants.
        path: The PNG file to write.
    """
    from hetero_fl.reporting.plots import style

    grid = np.linspace(0, 1, 401)
    with style.plot_style():
        result = style.figure(3.4)
        axes = result.subplots()
        axes.axhline(0, color=style.GREY, linewidth=0.8)
        axes.text(
            1.0,
            -0.5,
            "target",
            color=style.GREY,
            ha="right",
            va="top",
            fontsize=style.MIN_FONT_SIZE,
        )
        for variant, color in zip(ways, (style.INK, *style.CATEGORIES, style.GREEN), strict=False):
            lines = []
            for runs in found.values():
                target, duration = target_of(runs)
                seconds, accuracy = (
                    np.array([p[i] for p in runs[variant]["curve"]]) for i in (0, 1)
                )
                inside = np.interp(
                    grid, seconds / duration, 100 * (accuracy - target), left=np.nan, right=np.nan
                )
                lines.append(inside)
            reached_all = ~np.isnan(lines).any(0)
            lows, highs, means = (
                f(np.array(lines)[:, reached_all], 0) for f in (np.min, np.max, np.mean)
            )
            if len(lines) > 1:
                axes.fill_between(
                    grid[reached_all], lows, highs, color=color, alpha=0.15, linewidth=0
                )
            axes.plot(
                grid[reached_all],
                means,
                "-" if variant.startswith("async") else "--",
                color=color,
                label=variant,
            )
        axes.set_ylim(-30, None)
        axes.set_xlim(0, 1.01)
        axes.set_xlabel("simulated time, as a share of the synchronous run's")
        axes.set_ylabel("accuracy above the target (points)")
        axes.legend(loc="lower right")
        path.write_bytes(style.to_png(result))


def main() -> None:
    """Execute missing runs, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="Fashion-MNIST as .npz instead of a download")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of the synchronous run")
    parser.add_argument("--ways", nargs="+", default=COMPARED, choices=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--share",
        type=float,
        default=TIME_SHARE,
        help="fraction of its time for the other variants",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    variants, found = (
        list(dict.fromkeys(["synchronous", *options.ways])),
        dict[str, dict[str, Run]](),
    )
    for seed in options.seeds:
        base = [
            *SMALLER,
            f"seed={seed}",
            *options.overrides,
            *([f"data.path={options.data}"] if options.data else []),
        ]
        seconds = durations(base)
        middle = statistics.median(seconds)
        print(
            f"seed {seed}: tasks take {min(seconds):.0f} to {max(seconds):.0f} s, "
            f"median {middle:.0f} s",
            file=sys.stderr,
        )
        runs = found[str(seed)] = {}
        for variant in variants:
            kept = options.out / f"{variant.replace(', ', '_').replace(' ', '_')}-{seed}.json"
            if not kept.exists():
                until, rounds = None, options.rounds
                if variant != "synchronous":
                    until, rounds = options.share * target_of(runs)[1], 40 * options.rounds
                changes = [change.format(deadline=1.5 * middle) for change in WAYS[variant]]
                kept.write_text(
                    json.dumps(hold([*base, *changes, *options.overrides], until, rounds))
                )
            runs[variant] = json.loads(kept.read_text())
            (target, duration), curve = target_of(runs), runs[variant]["curve"]
            at, last = reached(curve, target), curve[-1]
            when = (
                "not there for good"
                if at is None
                else f"there for good at {at:,.0f} s, {at / duration:.2f} of {duration:,.0f}"
            )
            print(
                f"  {variant}: target {target:.3f} {when}; last {last[1]:.3f} at {last[0]:,.0f} s; "
                f"{runs[variant]['counts']}",
                file=sys.stderr,
            )
    (options.out / "table.md").write_text(table(found, variants))
    print((options.out / "table.md").read_text())
    figure(found, variants, options.out / "time_to_accuracy.png")


if __name__ == "__main__":
    main()
