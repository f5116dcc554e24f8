#!/usr/bin/env python3
"""Run many rounds of a federation whose nodes are killed at random, and look for leaks.

    python -m benchmarks soak [--flower] [--rounds 500] [--restarts 0.05] [--out FILE.csv]

Four nodes in separate processes have tiny models and private heads, compressed uploads and
residuals. After each round, a node is killed and restarted with probability `--restarts`. Every
`--every` rounds, the memory and open files of the server and the nodes are sampled. The output is
the slope over rounds with its standard error: for the server after `--warm` rounds, and for nodes
over all intervals between two restarts, each with its own intercept.
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
# Part of the command line of helper processes of Python.
RESOURCES = "multiprocessing"
Pids = Callable[[], list[tuple[str, Any]]]
Kill = Callable[[random.Random], None]
Go = Callable[[dict[str, Any], Path, Callable[[dict[str, Any]], None]], Run]
Stretch = list[tuple[int, float]]  # (round, value) of one process


def source(rounds: int) -> dict[str, Any]:
    """Return a configuration of cheap rounds with all kinds of state."""
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
    """Return the anonymous memory of a process in MiB, including pages shared by a fork.

    Reading a Python object changes its reference count, which copies shared pages.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def files(pid: int) -> int:
    """Return the number of open files and sockets of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def children() -> int:
    """Return the number of descendants of this process."""
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
    """Return the children of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            pid, rest = stat.read_text().split(" ", 1)
            if int(rest.rpartition(")")[2].split()[1]) == parent:
                found.append(int(pid))
    return found


def ports() -> int:
    """Return the number of ports on which this process or a descendant listens."""
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
    """Run nodes on Unix sockets."""
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
def flower(_folder: Path) -> Iterator[tuple[Pids, Kill, Go]]:
    """Run nodes of Flower, which the launcher restarts after they were killed."""
    from hetero_fl.deployment.local.launcher import LAUNCHER, run_local_federation

    from hetero_fl.utils.processes import CompanionProcess

    nursery = CompanionProcess(LAUNCHER)
    pid = nursery._process.pid

    def pids() -> list[tuple[str, int]]:
        links = [
            ("superlink", child)
            for child in below(os.getpid())
            if child != pid and RESOURCES not in command_line(child)
        ]
        return [*(("node", child) for child in below(pid)), *links]

    def kill(rng: random.Random) -> None:
        os.kill(rng.choice(below(pid)), signal.SIGKILL)

    def go(made: dict[str, Any], out: Path, look: Callable[[dict[str, Any]], None]) -> Run:
        return run_local_federation(made, out=out, callbacks=[look], launcher=nursery)

    yield pids, kill, go


def command_line(pid: int) -> str:
    """Return the command line of a process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return RESOURCES


def end(process: Any) -> None:
    """Kill a process and release its resources."""
    process.kill()
    process.join()
    process.close()


def slope(stretches: Sequence[Stretch]) -> tuple[float, float, int]:
    """Fit one slope and an intercept for each stretch.

    Returns:
        Slope, its standard error, and the number of samples.
    """
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
    """Run the federation, sample it and print the report."""
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
        help="warm-up rounds of the server and of each node",
    )
    parser.add_argument(
        "--flower",
        action="store_true",
        help="use Flower with signed messages instead of Unix sockets",
    )
    parser.add_argument("--out", type=Path, help="CSV file of all samples")
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
        # Starts the fork server, which is not part of the measurement.
        end(start_node(Path("nowhere"), "nobody", Path("nowhere")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        held = flower(folder) if options.flower else sockets(folder)
        before = children(), files(os.getpid()), ports()
        with held as (pids, kill, go):

            def look(record: dict[str, Any]) -> None:
                nonlocal restarts
                if record["round"] % options.every == 0:
                    # Garbage and free memory of the server are not leaks.
                    gc.collect()
                    LIBC.malloc_trim(0)
                    for who, pid in [("server", os.getpid()), *pids()]:
                        # The process may have been killed.
                        with suppress(OSError):
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
    print(f"child processes, open files, listening ports: before {before}, after {after}")
    print(f"sites' folders at the end: {left:.1f} MiB")


def report(samples: Sequence[tuple[int, str, int, float, int]], warm: int) -> None:
    """Print the table of slopes."""
    print(
        "| | median MiB | KiB per round | most files | files per round | samples |\n"
        "|---|---|---|---|---|---|"
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
            f"| {who} | {middle:.0f} | {rate:.2f} ± {error:.2f} | {most} "
            f"| {opened:.4f} ± {wrong:.4f} | {count} |"
        )


if __name__ == "__main__":
    main()
