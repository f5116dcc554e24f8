#!/usr/bin/env python3
"""Compare local training of a client with a loop in plain PyTorch with the same arithmetic.

    python -m benchmarks serial_overhead

Both sides train the same model with the same batch size and optimizer, in turns, in one process.
The output is the median and range of the time ratios. Targets: 1.05 for CNNs and 1.15 for a
two-layer MLP.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.common import add_quick
from hetero_fl.algorithms import local_fit
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit
from hetero_fl.data import make_images
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.serial import SerialBackend
from hetero_fl.experiment import prepare
from hetero_fl.federation.state_store import PrivateState
from hetero_fl.utils.seeding import keyed_generator
from model_zoo import SplitModel

CASES = {
    "small CNN (cnn_bn_small, 28x28, batch 32, SGD)": ("cnn_bn_small", "sgd", 32, 1.05),
    "small CNN (cnn_bn_small, 28x28, batch 32, Adam)": ("cnn_bn_small", "adam", 32, 1.05),
    "FedAvg's CNN (28x28, batch 10, SGD)": ("fedavg_cnn", "sgd", 10, 1.05),
    "two-layer MLP (28x28, batch 32, SGD)": ("mlp", "sgd", 32, 1.15),
    "two-layer MLP (28x28, batch 32, Adam)": ("mlp", "adam", 32, 1.15),
}


def participant(model: str, optimizer: str, batch: int, rows: int) -> tuple[Participant, Fit]:
    """Create a client and its local training of one epoch.

    Args:
        model: Name of the model.
        optimizer: Name of the optimizer.
        batch: Batch size.
        rows: Number of generated rows.
    """
    source = {
        "data": {"name": "synthetic_images", "split": {"validation": 0.0, "test": 0.1}},
        "clients": {
            "count": 1,
            "defaults": {
                "model": model,
                "optimizer": {"name": optimizer, "lr": 0.01},
                "batch_size": batch,
            },
        },
        "algorithm": {"name": "local"},
    }
    prepared = prepare(source, dataset=make_images(rows, classes=10, side=28))
    (client_id,) = prepared.federation.client_infos
    client = prepared.federation.client(client_id, PrivateState(), 0)
    return client, local_fit(client)


def bare_loop(module: SplitModel, start: dict, x: torch.Tensor, y: torch.Tensor, fit: Fit) -> None:
    """Train one epoch in plain PyTorch.

    Args:
        module: The model.
        start: Initial `state_dict`.
        x: Inputs, `[N, ...]`.
        y: Labels, `[N]`.
        fit: Local training that provides the optimizer and the batch size.
    """
    module.load_state_dict(start)
    module.train()
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[fit.optimizer.name]
    optimizer = kind(module.parameters(), fit.optimizer.lr, fused=True)
    for rows in torch.randperm(len(x), generator=keyed_generator("bare")).split(fit.batch_size):
        optimizer.zero_grad()
        F.cross_entropy(module(x[rows]).logits, y[rows]).backward()
        optimizer.step()


def main() -> None:
    """Measure all cases and print one line for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=5, help="timed pairs per case after one warm-up pair"
    )
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=1)
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.pairs = 1
        options.rows = 200
    torch.set_num_threads(options.threads)
    for name, (model, optimizer, batch, target) in CASES.items():
        client, fit = participant(model, optimizer, batch, options.rows)
        serial = SerialBackend(DeviceMemory(torch.device("cpu")))
        columns = client.data("train", None)
        module = client.arch["model"].build()
        start = {n: t.clone() for n, t in client.models["model"].items()}
        ratios, seconds = [], []
        for i in range(options.pairs + 1):
            started = time.perf_counter()
            bare_loop(module, start, columns["x"], columns["y"], fit)
            middle = time.perf_counter()
            serial.run([(client, fit)])
            end = time.perf_counter()
            if i:
                ratios.append((end - middle) / (middle - started))
                seconds.append(middle - started)
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(
            f"{name:52} {statistics.median(ratios):.3f} ({spread}; target {target}); "
            f"bare {statistics.median(seconds):.2f} s"
        )


if __name__ == "__main__":
    main()
