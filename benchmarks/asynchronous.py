#!/usr/bin/env python3
"""How long distillation takes in simulated time: asynchronous against rounds that wait, with a deadline, with over-selection.

    python benchmarks/asynchronous.py --data fashionmnist.npz --out runs/asynchronous

Twelve clients of three architectures on Fashion-MNIST, speeds ten-fold apart (configs/fashion_devices.yaml). The synchronous run
sets the mark: its accuracy in common after the last round, less one point. Printed is when each way first gets there, when it
stays (every later evaluation is above it, too), and what share that is of the time which the synchronous run takes to its end,
and to the same mark. Target: at most 0.5 of either. `--out` gets the curves as JSON and a figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from hetero_fl.experiment import prepare
from hetero_fl.runtime.readings import record_readings

ROOT = Path(__file__).parents[1]
ASYNC = "runtime.mode=async"
WAYS: dict[str, list[str]] = {
    "synchronous": [],
    "deadline": ["cohort.deadline={median}"],
    "deadline, partial work": ["cohort.deadline={median}", "cohort.partial_work=true"],
    "over-selection": ["clients.per_round=8", "cohort.over_selection=1.5"],
    "asynchronous": [ASYNC],
    "asynchronous, buffer 6": [ASYNC, "runtime.buffer=6"],
    "asynchronous, buffer 3": [ASYNC, "runtime.buffer=3"],
}
POINT = 0.01
Curve = list[tuple[float, float, int]]  # simulated seconds, accuracy, bytes


def run(overrides: list[str], until: float | None, rounds: int) -> tuple[Curve, dict[str, Any]]:
    """Accuracy in common (mean over clients) by simulated time; ends after the rounds, or when the time is over."""
    prepared = prepare(ROOT / "configs" / "fashion_devices.yaml", [*overrides, f"rounds={rounds}"])
    session = prepared.rounds()
    curve: Curve = []
    told: dict[str, Any] = {"counts": {}, "staleness": {}}
    while session.completed < rounds and (until is None or session.now < until):
        record = session.round()
        for name in told:
            for key, count in record.get(name, {}).items():
                told[name][key] = told[name].get(key, 0) + count
        if session.completed % prepared.config.evaluation.every == 0 or session.completed == rounds:
            record_readings(record, session.evaluate())
            traffic = session.traffic.up + session.traffic.down
            curve.append((session.now, record["global"]["accuracy"], traffic))
    session.executor.close()
    return curve, told


def reached(curve: Curve, mark: float) -> float | None:
    """When accuracy is above the mark for good."""
    at = None
    for seconds, accuracy, _ in reversed(curve):
        if accuracy < mark:
            break
        at = seconds
    return at


def durations(overrides: list[str]) -> list[float]:
    """Seconds that each client's task takes in the first synchronous round."""
    session = prepare(ROOT / "configs" / "fashion_devices.yaml", overrides).rounds()
    timing, size = session.conditions.timing, 200_000
    return [timing.duration(id, size, size, 0.0, 0) for id in session.federation.cards]


def figure(curves: dict[str, Curve], mark: float, path: Path) -> None:
    """Accuracy by simulated hours."""
    from hetero_fl.reporting import style

    with style.drawing():
        made = style.figure(3.6)
        axes = made.subplots()
        for name, curve in curves.items():
            late = name.startswith("asynchronous")
            axes.plot([s / 3600 for s, *_ in curve], [a for _, a, _ in curve], "-" if late else "--", label=name)
        axes.axhline(mark, color=style.GREY, linewidth=0.8)
        axes.set_xlabel("simulated hours")
        axes.set_ylabel("accuracy in common")
        axes.legend()
        path.write_bytes(style.png(made))


def main() -> None:
    """Run all ways, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="Fashion-MNIST as .npz, in place of the download")
    parser.add_argument("--rounds", type=int, default=20, help="of the synchronous run")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.7, help="of its time, which the others are given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    base = [f"seed={options.seed}", "runtime.threads=1", "runtime.executor=serial", *options.overrides]
    base += [f"data.path={options.data}"] if options.data else []
    seconds = durations(base)
    print(f"a task takes {min(seconds):.0f} to {max(seconds):.0f} s, half of them {statistics.median(seconds):.0f}")
    curves: dict[str, Curve] = {}
    staleness: dict[str, Any] = {}
    whole = mark = own = 0.0
    for name in dict.fromkeys(["synchronous", *options.ways]):
        changes = [change.format(median=1.5 * statistics.median(seconds)) for change in WAYS[name]]
        until, rounds = (
            (None, options.rounds) if name == "synchronous" else (options.share * whole, 40 * options.rounds)
        )
        curves[name], told = run([*base, *changes], until, rounds)
        staleness[name] = told["staleness"]
        if name == "synchronous":
            whole, mark = curves[name][-1][0], curves[name][-1][1] - POINT
            own = reached(curves[name], mark) or whole
            print(f"mark {mark:.3f}; the synchronous run ends at {whole:,.0f} s and is above it from {own:,.0f} s on")
        at, best = reached(curves[name], mark), max(accuracy for _, accuracy, _ in curves[name])
        first = next((seconds for seconds, accuracy, _ in curves[name] if accuracy >= mark), None)
        when = "never there" if first is None else f"first there at {first:,.0f} s, {first / whole:.2f} of the run"
        when += (
            "" if at is None else f"; for good at {at:,.0f} s, {at / whole:.2f} of the run, {at / own:.2f} to the mark"
        )
        print(f"  {name}: {when}; last {curves[name][-1][1]:.3f}, best {best:.3f}; {told['counts']}", flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        found = {"mark": mark, "curves": curves, "staleness": staleness}
        (options.out / "curves.json").write_text(json.dumps(found))
        figure(curves, mark, options.out / "time_to_accuracy.png")


if __name__ == "__main__":
    main()
