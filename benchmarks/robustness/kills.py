#!/usr/bin/env python3
"""Kill runs at random times: resumed runs must end with byte-identical models.

    python -m benchmarks kills [--kills 100] [--each 5] [--kinds serial batched …] [--out DIR]

Hybrid with top-k on scikit-learn's digits, four clients of three architectures with private heads.
The kinds of runs take turns: serial, batched, with worker processes, asynchronous with faults, and
federations of processes. There the server is killed, and nodes as well except with secure
aggregation; the results are compared with a simulation. A run is killed up to `--each` times at any
time after its start and is resumed each time; then its models and scores are compared with those of
an uninterrupted run. With `--out`, which stores the counts, the same command continues.
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
from benchmarks.robustness.unix_socket import UnixSocket, start_node
from hetero_fl.deployment.server import run_federation
from hetero_fl.experiment import run

Source = dict[str, Any]
ROUNDS = 8
CLIENTS = [f"site_{i}" for i in range(1, 5)]
# The fork server imports modules once for all runs; optimizers load torch._dynamo.
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
# Keys that depend on real time, or exist only in federations.
TIMED = ("seconds", "wall", "tasks", "counts")


def source(kind: str) -> Source:
    """Return the configuration of a kind of run."""
    models = [
        "cnn_bn_small",
        {"name": "mlp", "hidden": [24]},
        {"name": "cnn", "width": 4, "norm": "group"},
    ]
    made: Source = {
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
    made["runtime"] = {"threads": 1, **made["runtime"]}
    return made


def go_on(kind: str, out: str, socket: str) -> None:
    """Start or resume a run, as a federation if there is a socket."""
    if socket:
        run_federation(
            source(kind), UnixSocket(Path(socket)), out=Path(out), resume=True, wait=300.0
        )
    else:
        run(source(kind), out=out, resume=True)


def start(kind: str, out: Path, socket: str = "") -> Any:
    """Start or resume a run in a new process."""
    process = CONTEXT.Process(target=go_on, args=(kind, str(out), socket))
    process.start()
    return process


def left(out: Path) -> tuple[dict[str, bytes], list[Source]]:
    """Return the models and scores of a finished run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in line.items() if k not in TIMED} for line in lines]
    return {p.name: p.read_bytes() for p in sorted((out / "models").iterdir())}, figures


def whole(kind: str, folder: Path) -> tuple[tuple[dict[str, bytes], list[Source]], float]:
    """Execute an uninterrupted run; return its results and the seconds of a round."""
    out = folder / f"whole-{kind}"
    process = start(kind, out)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{kind}: the uninterrupted run failed")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return left(out), median(sum(json.loads(line)["seconds"].values()) for line in lines)


def held(out: Path) -> int:
    """Return the number of completed rounds."""
    lines = out / "metrics.jsonl"
    return len(lines.read_bytes().splitlines()) if lines.exists() else 0


def kill(process: Any, out: Path) -> tuple[int, int]:
    """Kill a run; return whether it was running, and whether it was past its first checkpoint."""
    process.kill()
    process.join()
    hit = process.exitcode == -signal.SIGKILL
    mid = hit and any((out / "checkpoint").glob("*.ckpt")) and not (out / "summary.json").exists()
    return int(hit), int(mid)


class Sites:
    """The nodes of a federation, which outlive its server."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "socket"
        self.folder = folder / "sites"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.processes = {
            client: start_node(self.socket, client, self.folder) for client in CLIENTS
        }

    def restart(self, client: str) -> None:
        """Kill and restart a node."""
        self.processes[client].kill()
        self.processes[client].join()
        self.processes[client] = start_node(self.socket, client, self.folder)

    def close(self) -> None:
        """Kill all nodes."""
        for process in self.processes.values():
            process.kill()
            process.join()


def main() -> None:
    """Kill, resume and compare runs."""
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
        references = {kind: whole(kind, folder) for kind in options.kinds}
        while tally["kills"] < options.kills:
            kind, out = options.kinds[tally["runs"] % len(options.kinds)], folder / "killed"
            shutil.rmtree(out, ignore_errors=True)
            (want, took), hits, mids = references[kind], 0, 0
            sites = Sites(folder) if kind in FEDERATED else None
            socket = str(sites.socket) if sites is not None else ""
            while hits < min(options.each, options.kills - tally["kills"]):
                process, goal = start(kind, out, socket), held(out) + rng.choice((0, 1, 1))
                while held(out) < goal and process.is_alive():
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, 1.5 if goal else 10) * took)
                if kind == "federation" and sites is not None and rng.random() < 0.5:
                    sites.restart(rng.choice(CLIENTS))
                    time.sleep(rng.uniform(0, took))
                hit, mid = kill(process, out)
                hits, mids = hits + hit, mids + mid
                # The run had ended before.
                if not hit:
                    break
            process = start(kind, out, socket)
            process.join()
            if sites is not None:
                sites.close()
            same = process.exitcode == 0 and left(out) == want
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
