#!/usr/bin/env python3
"""SIGKILL at random moments: resumed runs end with the models of uninterrupted ones, byte for byte.

    python benchmarks/kills.py [--kills 100]

Hybrid on scikit-learn's digits, clients with heads of their own; in turn serial, batched, with worker processes, and asynchronous
with faults. Each run is killed once (half of them while rounds are held), resumed, and its models and figures are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = ["rounds=4", "algorithm.heads=keep", "output.plots=false", "output.report=false", "runtime.threads=1"]
SLOW = [
    "devices.speed.median=1e7",
    "devices.speed.sigma=0.9",
    "faults.lost=0.1",
    "faults.corrupted=0.1",
    "faults.twice=0.1",
]
KINDS = {
    "serial": ["runtime.executor=serial"],
    "batched": ["runtime.executor=batched"],
    "processes": ["runtime.executor=processes", "runtime.workers=2"],
    "asynchronous": ["runtime.executor=serial", "runtime.mode=async", "runtime.buffer=2", *SLOW],
}


def start(out: Path, kind: str) -> subprocess.Popen[bytes]:
    """A run, or what is left of it, in a process of its own."""
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train.py"),
        "--config",
        str(ROOT / "configs" / "digits_quickstart.yaml"),
    ]
    resume = ["--resume"] if (out / "config.yaml").exists() else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        [*command, "--out", str(out), *resume, *BASE, *KINDS[kind]], env=environment, stderr=quiet, stdout=quiet
    )


def left(out: Path) -> tuple[dict[str, bytes], list[dict[str, object]]]:
    """Models and figures of a finished run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return {p.name: p.read_bytes() for p in sorted((out / "models").iterdir())}, figures


def main() -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    options = parser.parse_args()
    rng, wrong, mid = random.Random(os.urandom(8)), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        want, took = {}, {}
        for kind in KINDS:
            begun, out = time.monotonic(), Path(folder) / kind
            if start(out, kind).wait() != 0:
                raise SystemExit(f"{kind}: the uninterrupted run failed")
            want[kind], took[kind] = left(out), time.monotonic() - begun
        for i in range(options.kills):
            kind, out = list(KINDS)[i % len(KINDS)], Path(folder) / f"killed{i}"
            process = start(out, kind)
            if i // len(KINDS) % 2:
                time.sleep(rng.uniform(0, 0.95) * took[kind])
            else:
                while not (out / "metrics.jsonl").exists() and process.poll() is None:
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, 0.3) * took[kind])
            process.kill()
            mid += (
                process.wait() == -signal.SIGKILL
                and (out / "checkpoint").exists()
                and not (out / "summary.json").exists()
            )
            same = start(out, kind).wait() == 0 and left(out) == want[kind]
            wrong += not same
            if not same:
                print(f"kill {i} ({kind}): the resumed run is another one", flush=True)
    print(f"{options.kills} kills, {mid} of them in the middle of rounds: {wrong} resumed runs differ")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
