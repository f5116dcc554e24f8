#!/usr/bin/env python3
"""Measure the memory of aggregating 1,000 uploads in a FedAvg round, in multiples of the model.

    python -m benchmarks aggregation_memory

The measurement is the peak resident memory of the server process, minus the memory before the round
and the size of the broadcast model. The computation of clients is not included: with `serial`,
uploads arrive one at a time, and each upload is a copy of precomputed bytes. With `processes`,
clients train for one step in two workers, and early uploads wait in encoded form in the server
process. Each case runs in a new process that returns freed memory to the system immediately
(MALLOC_MMAP_THRESHOLD_). Targets: 3 models with `serial` (the mean, an upload and the decoded
upload), and 3 + 4 per worker with `processes`. Linux only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.common import arguments, parsed, rounds_of
from hetero_fl.communication.protocol import Message
from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.payload import Item, Payload
from hetero_fl.data import make_images
from hetero_fl.experiment import prepare
from hetero_fl.federation.executors.base import ALL_REPLIES, Arrival, InProcessExecutor, Until
from hetero_fl.federation.trainer import FederatedTrainer

WORKERS = 2
TARGETS = {"serial": 3.0, "processes": 3.0 + 4 * WORKERS}
MODEL = "fedavg_cnn"


def configuration(cohort: int) -> dict[str, object]:
    """Return a configuration with two rows per client, for one training step."""
    return {
        "data": {
            "train_limit": cohort * 2 + 1,
            "test_limit": 50,
            "partition": {"min_size": 2},
            "split": {"validation": 0.0, "test": 0.0},
            "validation": 1e-9,  # one row
        },
        "clients": {
            "count": cohort,
            "defaults": {"model": MODEL, "optimizer": {"name": "sgd", "lr": 0.01}},
        },
        "algorithm": {"name": "fedavg"},
    }


class CopyingExecutor(InProcessExecutor):
    """An executor without computation, in which every upload is a copy of the same bytes."""

    def __init__(self, rounds: FederatedTrainer) -> None:
        (arch,) = {card.arch for card in rounds.federation.client_infos.values()}
        model = Item(floating_tensors(rounds.federation.initial_tensors(arch)), 2.0, "params")
        self.upload = Payload({"model": model}, {"loss": "1.0"}).encode()
        super().__init__(rounds.executor.runtime)  # type: ignore[attr-defined]

    def run(
        self, clients: Sequence[str], request: Callable[[str], Message], until: Until = ALL_REPLIES
    ) -> Iterator[Arrival]:
        """Yield each client with an upload, after the request for the client was created."""
        for client in clients:
            assert request(client).body
            yield Arrival(client, Message("upload", self.upload[:1] + self.upload[1:]))


def measured(executor: str, cohort: int) -> None:
    """Measure one case in this process, and print the memory in multiples of the model size."""
    torch.set_num_threads(1)
    dataset = make_images(cohort * 2 + 1, 50, classes=10, channels=3, side=32)
    prepared = prepare(configuration(cohort), dataset=dataset)
    rounds = rounds_of(prepared, executor=executor, workers=WORKERS, threads=1)
    if executor == "serial":
        rounds.executor = CopyingExecutor(rounds)
    size = sum(t.nbytes for t in next(iter(rounds.server.models.values())).values())
    rounds.num_sampled = 2
    rounds.run_round()
    rounds.num_sampled = cohort
    before = status("VmRSS")
    # Reset the recorded peak.
    Path("/proc/self/clear_refs").write_text("5")
    rounds.run_round()
    # `size` is the broadcast, which is encoded once for all clients.
    peak = status("VmHWM") - before - size
    if executor == "processes":
        rounds.executor.close()
    print(peak / size)


def status(name: str) -> int:
    """Return a memory counter of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}")


def main() -> None:
    """Measure both cases in new processes, or with `--case` one case in this process."""
    parser = arguments(__doc__, pairs=1)
    parser.add_argument(
        "--case", choices=list(TARGETS), help="measure only this case, in this process"
    )
    parser.add_argument("--cohort", type=int, default=1000)
    options = parsed(parser)
    cohort = min(options.cohort, 40) if options.quick else options.cohort
    if options.case:
        measured(options.case, cohort)
        return
    print(f"aggregation of {cohort} uploads of {MODEL}, peak memory")
    for case, target in TARGETS.items():
        command = [
            sys.executable,
            "-m",
            "benchmarks",
            "aggregation_memory",
            "--case",
            case,
            "--cohort",
            str(cohort),
        ]
        environment = {
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        }
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        models = float(done.stdout)
        print(
            f"  {case}: {models:.1f} models; target {target:g}: "
            f"{'met' if round(models, 1) <= target else 'missed'}"
        )


if __name__ == "__main__":
    main()
