#!/usr/bin/env python3
"""Check that runs that are killed and resumed have the same models as uninterrupted runs.

    python -m benchmarks kills [--kills 100] [--each 5] [--kinds serial batched …] [--out DIR]

Four clients of three architectures with private heads train with Hybrid and top-k compression on
scikit-learn's digits. The kinds of runs take turns: serial, batched, with worker processes,
asynchronous with faults, and federations on Flower, whose nodes end with the server. A run is
killed up to `--each` times at random times after its start, and resumed each time. The models and
scores are then compared with those of an uninterrupted run, which is a simulation for federations
on Flower. The counts are stored in `--out`, so that the same command continues.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import add_quick
from hetero_fl.deployment.flower.local_federation import run_local_federation
from hetero_fl.experiment import run

Source = dict[str, Any]
ROUNDS = 8
# The fork server imports modules once for all runs. Optimizers import torch._dynamo.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hetero_fl.experiment", "sklearn.datasets", "torch._dynamo"])
SLOW = {"speed": {"median": 1e6, "sigma": 0.9}, "up": 1e5}
FAULTS = {
    "before": 0.05,
    "during": 0.05,
    "lost": 0.1,
    "late": 0.1,
    "twice": 0.1,
    "corrupted": 0.1,
    "delay": 5.0,
}
KINDS: dict[str, Source] = {
    "serial": {"runtime": {"executor": "serial"}},
    "batched": {"runtime": {"executor": "batched"}},
    "processes": {"runtime": {"executor": "processes", "workers": 2}},
    "asynchronous": {
        "runtime": {"executor": "serial", "mode": "async", "buffer": 2},
        "devices": SLOW,
        "faults": FAULTS,
    },
    "federation": {"runtime": {"executor": "serial"}},
    "secure": {
        "runtime": {"executor": "serial"},
        "algorithm": {"name": "fedavg"},
        "channel": {"secure_sum": {"threshold": 2}},
    },
}
FEDERATED = ("federation", "secure")
# Keys of records that depend on wall time or exist only in federations.
TIMED = ("seconds", "wall", "tasks", "counts")


def source(kind: str) -> Source:
    """Return the configuration of a kind of run in `KINDS`."""
    models = [
        "cnn_bn_small",
        {"name": "mlp", "hidden": [24]},
        {"name": "cnn", "width": 4, "norm": "group"},
    ]
    result: Source = {
        "name": "kills",
        "rounds": ROUNDS,
        "data": {
            "name": "digits",
            "train_limit": 330,
            "test_limit": 90,
            "partition": {"kind": "dirichlet", "alpha": 0.5, "min_size": 30},
            "proxy": {"size": 60},
        },
        "clients": {
            "per_round": 3,
            "defaults": {
                "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
                "batch_size": 16,
            },
            "groups": [{"name": "site", "count": 4, "model": models}],
        },
        "algorithm": {"name": "hybrid", "heads": "keep"},
        "channel": {"compress": [{"topk": 0.1}, {"quantize": 8}]},
        "output": {"plots": False, "report": False},
        **KINDS[kind],
    }
    result["runtime"] = {"threads": 1, **result["runtime"]}
    return result


def train(kind: str, out: str, is_federation: bool) -> None:
    """Start or resume a run in this process, on Flower if `is_federation`."""
    if is_federation:
        run_local_federation(source(kind), out=out, resume=True)
    else:
        run(source(kind), out=out, resume=True)


def start(kind: str, out: Path, is_federation: bool = False) -> Any:
    """Start or resume a run in a new process, and return the process."""
    process = CONTEXT.Process(target=train, args=(kind, str(out), is_federation))
    process.start()
    return process


def read_results(out: Path) -> tuple[dict[str, bytes], list[Source]]:
    """Return the model files and the records of a finished run, without `TIMED` keys."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in line.items() if k not in TIMED} for line in lines]
    return {p.name: p.read_bytes() for p in sorted((out / "models").glob("*.safetensors"))}, figures


def run_whole(kind: str, folder: Path) -> tuple[tuple[dict[str, bytes], list[Source]], float]:
    """Execute an uninterrupted run, and return its results and the median seconds per round."""
    out = folder / f"whole-{kind}"
    process = start(kind, out)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{kind}: the uninterrupted run failed")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return read_results(out), median(sum(json.loads(line)["seconds"].values()) for line in lines)


def completed_rounds(out: Path) -> int:
    """Return the number of completed rounds of a run."""
    lines = out / "metrics.jsonl"
    return len(lines.read_bytes().splitlines()) if lines.exists() else 0


def kill(process: Any, out: Path) -> tuple[int, int]:
    """Kill the process of a run.

    Returns:
        1 if the process was running, else 0; and 1 if the run was also past its first checkpoint
        and unfinished, else 0.
    """
    process.kill()
    process.join()
    hit = process.exitcode == -signal.SIGKILL
    mid = hit and any((out / "checkpoint").glob("*.ckpt")) and not (out / "summary.json").exists()
    return int(hit), int(mid)


def main() -> None:
    """Kill, resume and compare runs until the requested number of kills is reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="total number of kills")
    parser.add_argument("--each", type=int, default=5, help="maximum number of kills of one run")
    parser.add_argument("--out", type=Path, help="folder that stores the counts")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="kinds of runs"
    )
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.kills = 1
        options.kinds = options.kinds[:1]
    rng = random.Random(os.urandom(8))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        tally_file = folder / "tally.json"
        tally = {"kills": 0, "mid": 0, "runs": 0, "wrong": 0}
        if tally_file.exists():
            tally = json.loads(tally_file.read_text())
        references = {kind: run_whole(kind, folder) for kind in options.kinds}
        while tally["kills"] < options.kills:
            kind = options.kinds[tally["runs"] % len(options.kinds)]
            out = folder / "killed"
            shutil.rmtree(out, ignore_errors=True)
            expected, round_seconds = references[kind]
            hits = 0
            mids = 0
            is_federation = kind in FEDERATED
            while hits < min(options.each, options.kills - tally["kills"]):
                process = start(kind, out, is_federation)
                goal = completed_rounds(out) + rng.choice((0, 1, 1))
                while completed_rounds(out) < goal and process.is_alive():
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, 1.5 if goal else 10) * round_seconds)
                hit, mid = kill(process, out)
                hits += hit
                mids += mid
                # The process had ended before it was killed.
                if not hit:
                    break
            process = start(kind, out, is_federation)
            process.join()
            same = process.exitcode == 0 and read_results(out) == expected
            tally = {
                "kills": tally["kills"] + hits,
                "mid": tally["mid"] + mids,
                "runs": tally["runs"] + 1,
                "wrong": tally["wrong"] + (not same),
            }
            tally_file.write_text(json.dumps(tally))
            print(
                f"{kind}: {hits} kills, {mids} in mid-run, {'identical' if same else 'DIFFERENT'}",
                flush=True,
            )
    print(
        "{kills} kills of {runs} runs, {mid} of them after the first checkpoint: "
        "{wrong} resumed runs differ".format(**tally)
    )
    sys.exit(bool(tally["wrong"]))


if __name__ == "__main__":
    main()
