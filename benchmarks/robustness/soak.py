#!/usr/bin/env python3
"""Many rounds of a federation whose nodes are killed at random: does memory grow, is anything left over?

    python -m benchmarks soak [--flower] [--rounds 500] [--restarts 0.05] [--out FILE.csv]

Four nodes in processes of their own with tiny models and private heads, compressed uploads and residuals. After each round a node
is killed with probability `--restarts` and started anew. Every `--every` rounds the memory and the open files
of the server and of each node are taken. Reported is the slope over rounds with its standard error, of the server after
`--warm` rounds, and of nodes over all stretches between two restarts, each with a level of its own.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import math
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.common import add_quick
from benchmarks.robustness.unix_socket import UnixSocket, start_node
from hetero_fl.deployment.server import run_federation
from hetero_fl.reporting.run import Run

CLIENTS = ["site_1", "site_2", "site_3", "site_4"]
LIBC = ctypes.CDLL("libc.so.6")
RESOURCES = "multiprocessing"  # processes of Python's own
Pids = Callable[[], list[tuple[str, Any]]]
Kill = Callable[[random.Random], None]
Go = Callable[[dict[str, Any], Path, Callable[[dict[str, Any]], None]], Run]
Stretch = list[tuple[int, float]]  # (round, value) of one process


def source(rounds: int) -> dict[str, Any]:
    """Rounds that are as cheap as can be, with everything in them that keeps state."""
    return {
        "name": "soak",
        "rounds": rounds,
        "data": {"name": "digits", "train_limit": 200, "test_limit": 40, "proxy": {"size": 20}},
        "clients": {
            "defaults": {
                "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
                "batch_size": 32,
            },
            "groups": [
                {
                    "name": "site",
                    "count": 4,
                    "model": [{"name": "mlp", "hidden": [16]}, "cnn_bn_small"],
                }
            ],
        },
        "algorithm": {"name": "hybrid", "heads": "keep"},
        "channel": {"compress": [{"topk": 0.1}]},
        "evaluation": {"every": 25},
        "runtime": {"threads": 1},
        "output": {"plots": False, "report": False},
    }


def memory(pid: int) -> float:
    """MiB that a process has, but for what lies in files; pages that it shares with the one it was forked from included, as
    merely reading an object makes them its own."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def files(pid: int) -> int:
    """Open files and sockets of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def children() -> int:
    """Processes below this one."""
    found, count = {os.getpid()}, 0
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = stat.read_text().split(" ", 1)
            parents[int(pid)] = int(rest.rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
        count += len(more)
    return count


def below(parent: int) -> list[int]:
    """The processes that one has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            pid, rest = stat.read_text().split(" ", 1)
            if int(rest.rpartition(")")[2].split()[1]) == parent:
                found.append(int(pid))
    return found


def ports() -> int:
    """Ports at which this process or one below it listens."""
    held, more = {os.getpid()}, {os.getpid()}
    while more := {child for pid in more for child in below(pid)} - held:
        held |= more
    owned = set()
    for pid in held:
        with suppress(OSError):
            owned |= {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[3] == "0A" and f"socket:[{line[9]}]" in owned for line in lines)


@contextmanager
def sockets(folder: Path) -> Iterator[tuple[Pids, Kill, Go]]:
    """Nodes on Unix sockets."""
    transport = UnixSocket(folder / "socket")
    nodes = {client: start_node(folder / "socket", client, folder / "sites") for client in CLIENTS}

    def kill(rng: random.Random) -> None:
        client = rng.choice(CLIENTS)
        end(nodes[client])
        nodes[client] = start_node(folder / "socket", client, folder / "sites")

    def go(made: dict[str, Any], out: Path, look: Callable[[dict[str, Any]], None]) -> Run:
        return run_federation(made, transport, out=out, wait=300.0, callbacks=[look])

    yield lambda: [(client, process.pid) for client, process in nodes.items()], kill, go
    for node in nodes.values():
        end(node)


@contextmanager
def flower(folder: Path) -> Iterator[tuple[Pids, Kill, Go]]:
    """Nodes that speak with Flower's SuperLink, each started again by the nursery when it was killed."""
    from hetero_fl.deployment.local.launcher import LAUNCHER, run_local_federation
    from hetero_fl.utils.processes import CompanionProcess

    nursery = CompanionProcess(LAUNCHER)
    pid = nursery._process.pid

    def pids() -> list[tuple[str, int]]:
        links = [
            ("superlink", child)
            for child in below(os.getpid())
            if child != pid and RESOURCES not in told(child)
        ]
        return [*(("node", child) for child in below(pid)), *links]

    def kill(rng: random.Random) -> None:
        os.kill(rng.choice(below(pid)), signal.SIGKILL)

    def go(made: dict[str, Any], out: Path, look: Callable[[dict[str, Any]], None]) -> Run:
        return run_local_federation(made, out=out, callbacks=[look], launcher=nursery)

    yield pids, kill, go


def told(pid: int) -> str:
    """How a process was started."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return RESOURCES


def end(process: Any) -> None:
    """Kill a process, and leave nothing of it."""
    process.kill()
    process.join()
    process.close()


def slope(stretches: Sequence[Stretch]) -> tuple[float, float, int]:
    """Least squares with one slope and a level for each stretch: (slope, standard error, samples)."""
    centred = []
    for stretch in stretches:
        if len(stretch) > 1:
            x, y = (sum(v) / len(stretch) for v in zip(*stretch, strict=True))
            centred += [(a - x, b - y) for a, b in stretch]
    free = len(centred) - 1 - sum(len(s) > 1 for s in stretches)
    square = sum(a * a for a, _ in centred)
    if free < 1 or not square:
        return math.nan, math.nan, len(centred)
    rate = sum(a * b for a, b in centred) / square
    rest = sum((b - rate * a) ** 2 for a, b in centred)
    return rate, math.sqrt(rest / free / square), len(centred)


def main() -> None:
    """Run, sample, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument(
        "--restarts",
        type=float,
        default=0.05,
        help="probability that a node is killed after a round",
    )
    parser.add_argument("--every", type=int, default=5, help="rounds between two samples")
    parser.add_argument(
        "--warm",
        type=int,
        default=50,
        help="rounds of the server, and of a node, that are left out",
    )
    parser.add_argument(
        "--flower",
        action="store_true",
        help="through Flower, with signed messages; else Unix sockets",
    )
    parser.add_argument("--out", type=Path, help="where all samples go, as CSV")
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 10
        options.every = 1
        options.warm = 2
    rng, began = random.Random(0), time.perf_counter()
    samples: list[tuple[int, str, int, float, int]] = []  # round, who, pid, MiB, files
    restarts = 0
    if not options.flower:
        # what starting processes takes for itself
        end(start_node(Path("nowhere"), "nobody", Path("nowhere")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        held = flower(folder) if options.flower else sockets(folder)
        before = children(), files(os.getpid()), ports()
        with held as (pids, kill, go):

            def look(record: dict[str, Any]) -> None:
                nonlocal restarts
                if record["round"] % options.every == 0:
                    # cycles that wait for the collector, and what the allocator keeps for later,
                    # tell nothing:
                    gc.collect()
                    LIBC.malloc_trim(0)  # so of the server; nodes are taken as they are
                    for who, pid in [("server", os.getpid()), *pids()]:
                        with suppress(OSError):  # it was killed just now
                            samples.append((record["round"], who, pid, memory(pid), files(pid)))
                if rng.random() < options.restarts:
                    kill(rng)
                    restarts += 1

            counts = go(source(options.rounds), folder / "run", look).summary["wall"]
        left = (
            sum(path.stat().st_size for path in folder.rglob("sites/**/*") if path.is_file())
            / 2**20
        )
        time.sleep(1.0)
    after = children(), files(os.getpid()), ports()
    if options.out is not None:
        with options.out.open("w", newline="") as file:
            csv.writer(file).writerows([("round", "who", "pid", "MiB", "files"), *samples])
    report(samples, options.warm)
    seconds = time.perf_counter() - began
    print(f"{options.rounds} rounds in {seconds:.0f} s, {restarts} restarts; {counts}")
    print(
        f"processes below this one, its open files, ports listened at: before {before}, after {after}"
    )
    print(f"sites' folders at the end: {left:.1f} MiB")


def report(samples: Sequence[tuple[int, str, int, float, int]], warm: int) -> None:
    """The table of slopes."""
    print(
        "| | MiB, median | KiB a round | files, most | files a round | samples |\n|---|---|---|---|---|---|"
    )
    for who in ("server", "superlink", "nodes"):
        sets: dict[int, list[tuple[int, float, int]]] = {}
        for number, name, pid, mib, opened in samples:
            if (name if name in ("server", "superlink") else "nodes") == who:
                sets.setdefault(pid, []).append((number, mib, opened))
        if not sets:
            continue
        kept = [[s for s in rows if s[0] - rows[0][0] >= warm] for rows in sets.values()]
        rate, error, count = slope([[(n, 1024 * mib) for n, mib, _ in rows] for rows in kept])
        opened, wrong, _ = slope([[(n, float(f)) for n, _, f in rows] for rows in kept])
        every = sorted(mib for rows in kept for _, mib, _ in rows)
        most = max((f for rows in kept for _, _, f in rows), default=0)
        middle = every[len(every) // 2] if every else math.nan
        print(
            f"| {who} | {middle:.0f} | {rate:.2f} ± {error:.2f} | {most} | {opened:.4f} ± {wrong:.4f} | {count} |"
        )


if __name__ == "__main__":
    main()
