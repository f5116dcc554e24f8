#!/usr/bin/env python3
"""Measure peak memory and time per commit of the store for clients' private state.

    python -m benchmarks store

The private state of each client has the size of a small CNN and is mostly stored on disk. In each
round, the state of a cohort is read, changed completely and staged, and a checkpoint is written. At
the end, another store reads all states. Target: 500 clients with 1.2 million float32 parameters in
less than 4 GB of resident memory.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import add_quick
from hetero_fl.federation.checkpoint import Checkpoints
from hetero_fl.federation.state_store import PrivateState, StateStore
from hetero_fl.utils.seeding import keyed_generator

LAYERS = 8


def peak() -> float:
    """Return the peak resident memory of this process in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def changed(private: PrivateState, parameters: int) -> PrivateState:
    """Return a copy of a client's state in which all tensors are changed."""
    start = private.models.get("model") or {
        f"layer{i}": torch.zeros(parameters // LAYERS) for i in range(LAYERS)
    }
    return PrivateState(
        {"model": {name: tensor + 1 for name, tensor in start.items()}}, {"rounds": 1}
    )


def run_round(
    checkpoints: Checkpoints, cohort: list[str], parameters: int, round_idx: int
) -> tuple[float, float, int]:
    """Change the states of a cohort and write a checkpoint.

    Returns:
        The seconds to read and stage the states, the seconds to commit and save, and the size of
        the checkpoint in bytes.
    """
    store, started = checkpoints.store, time.perf_counter()
    for client in cohort:
        store.stage(client, changed(store.get(client), parameters))
    middle = time.perf_counter()
    store.commit()
    path = checkpoints.save(round_idx, {"round": round_idx})
    return middle - started, time.perf_counter() - middle, path.stat().st_size


def main() -> None:
    """Measure rounds and the peak memory, and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--parameters", type=int, default=1_200_000)
    parser.add_argument("--cohort", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--memory", type=int, default=1024, help="MiB, as runtime.store_memory")
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="folder of the store; default: a temporary folder",
    )
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.clients = 20
        options.parameters = 10_000
        options.cohort = 5
        options.rounds = 2
    torch.set_num_threads(1)
    clients, before = [f"site_{i}" for i in range(options.clients)], peak()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, memory = Path(name), options.memory << 20
        checkpoints = Checkpoints(StateStore(folder, memory), print)
        print(f"imports: {before:.2f} GB resident")
        stage, commit, size = run_round(checkpoints, clients, options.parameters, 0)
        print(
            f"all {len(clients)} clients: staged in {stage:.2f} s, commit {commit:.2f} s, "
            f"{size / 1e6:.0f} MB written"
        )
        rounds = []
        for round_idx in range(1, options.rounds + 1):
            drawn = torch.randperm(len(clients), generator=keyed_generator("benchmark", round_idx))[
                : options.cohort
            ]
            rounds.append(
                run_round(checkpoints, [clients[i] for i in drawn], options.parameters, round_idx)
            )
        for what, values in zip(
            ("read, change, stage", "commit"), list(zip(*rounds, strict=True))[:2], strict=True
        ):
            print(
                f"cohort of {options.cohort}: {what} {statistics.median(values):.2f} s "
                f"({min(values):.2f} to {max(values):.2f})"
            )
        written = [r[2] / 1e6 for r in rounds]
        disk = sum(f.stat().st_size for f in folder.iterdir()) / 1e9
        print(
            f"written per round: {min(written):.0f} to {max(written):.0f} MB; "
            f"{disk:.2f} GB on disk at the end"
        )
        started = time.perf_counter()
        again = Checkpoints(StateStore(folder, memory), print)
        again.load_newest()
        verified = time.perf_counter() - started
        for client in clients:
            again.store.get(client)
        print(
            f"another store: verified in {verified:.2f} s, "
            f"read in {time.perf_counter() - started:.2f} s"
        )
    print(
        f"peak: {peak():.2f} GB resident (two stores of {options.memory} MiB; target: less than 4)"
    )


if __name__ == "__main__":
    main()
