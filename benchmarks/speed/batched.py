#!/usr/bin/env python3
"""Compare vectorized and serial local training of clients with the same model.

    python -m benchmarks batched
    python -m benchmarks batched --models mlp --groups 100 --batches 10 --rows 60

Both sides train the same models on the same batches, in turns, in one process. The table has a row
for each model, image size and batch size, and a column for each number of clients, with the median
and range of the time ratio batched/serial. If the ratio is below 1, vectorized training is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.common import add_quick
from hetero_fl.algorithms import local_fit
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit
from hetero_fl.data import make_images
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.serial import SerialBackend
from hetero_fl.engine.vectorized import VectorizedBackend
from hetero_fl.experiment import prepare
from hetero_fl.federation.state_store import PrivateState

MODELS = ["linear", "mlp", "cnn_bn_small", "cnn_gn_small", "lenet", "fedavg_cnn"]


def equal_clients(
    model: str, clients: int, batch: int, *, rows: int, side: int, optimizer: str
) -> list[tuple[Participant, Fit]]:
    """Create clients with the same model and the local training of one epoch.

    Args:
        model: Name of the model.
        clients: Number of clients.
        batch: Batch size.
        rows: Number of training rows per client.
        side: Side length of the images in pixels.
        optimizer: Name of the optimizer.

    Returns:
        Pairs of a client and its local training.
    """
    source = {
        "data": {
            "name": "synthetic_images",
            "split": {"validation": 0.0, "test": 0.0},
            "test_limit": 50,
            "partition": {"kind": "iid"},
            "proxy": {"size": 0},
        },
        "clients": {
            "count": clients,
            "defaults": {
                "model": model,
                "optimizer": {"name": optimizer, "lr": 0.01},
                "batch_size": batch,
            },
        },
        "algorithm": {"name": "local"},
    }
    prepared = prepare(source, dataset=make_images(clients * rows + 100, classes=10, side=side))
    federation = prepared.federation
    result = [
        federation.client(client_id, PrivateState(), 0) for client_id in federation.client_infos
    ]
    return [(client, local_fit(client)) for client in result]


def pairs(
    work: list[tuple[Participant, Fit]], count: int, device: torch.device
) -> list[tuple[float, float]]:
    """Time serial and vectorized training in turns.

    Args:
        work: Pairs of a client and its local training.
        count: Number of timed pairs after the warm-up pair.
        device: The device.

    Returns:
        Pairs of the seconds of serial and vectorized training.
    """
    serial, batched, seconds = (
        SerialBackend(DeviceMemory(device)),
        VectorizedBackend(DeviceMemory(device), print),
        [],
    )
    for i in range(count + 1):
        started = time.perf_counter()
        serial.run(work)
        middle = time.perf_counter()
        batched.run(work)
        if i:
            seconds.append((middle - started, time.perf_counter() - middle))
    return seconds


def main() -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument(
        "--groups", nargs="+", type=int, default=[2, 5, 20], help="numbers of clients"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[10, 32])
    parser.add_argument(
        "--sides", nargs="+", type=int, default=[8, 28], help="image sides in pixels"
    )
    parser.add_argument("--rows", type=int, default=100, help="training rows per client")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument(
        "--pairs", type=int, default=5, help="timed pairs per case after one warm-up pair"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.models = ["linear", "mlp"]
        options.groups = [2]
        options.batches = [10]
        options.rows = 20
        options.pairs = 1
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(
        f"{'model':14} {'side':>4} {'batch':>5} "
        + " ".join(f"{f'{g} clients':>18}" for g in options.groups)
    )
    for model in options.models:
        for side in options.sides:
            if model == "lenet" and side < 12:
                continue
            for batch in options.batches:
                cells = []
                for clients in options.groups:
                    work = equal_clients(
                        model,
                        clients,
                        batch,
                        rows=options.rows,
                        side=side,
                        optimizer=options.optimizer,
                    )
                    ratios = [b / s for s, b in pairs(work, options.pairs, device)]
                    cells.append(
                        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                    )
                print(
                    f"{model:14} {side:4} {batch:5} " + " ".join(f"{c:>18}" for c in cells),
                    flush=True,
                )


if __name__ == "__main__":
    main()
