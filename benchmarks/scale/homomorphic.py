#!/usr/bin/env python3
"""Measure a round of FedAvg with homomorphic encryption, with secure aggregation and without both.

    python -m benchmarks homomorphic
    python -m benchmarks record homomorphic homomorphic

The round is the second one, in which clients receive the encrypted sum of the first. Clients train
one step and reply one after the other in this process on one core, and the sum is decrypted once
for all of them. In a federation, clients work in parallel, and each decrypts the sum. Errors are
the largest difference from the mean of plain uploads, divided by the largest magnitude.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import add_quick
from hetero_fl.communication.protocol import Message, encoded
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.payload import Payload
from hetero_fl.experiment import prepare
from hetero_fl.federation.trainer import FederatedTrainer

MODELS = {"CNN": "cnn_bn_medium", "ResNet-18": "resnet18"}
CHANNELS: dict[str, dict[str, Any]] = {
    "none": {},
    "secure aggregation": {"secure_sum": {}},
    "homomorphic encryption": {"homomorphic": {}},
}


@dataclass
class Figures:
    """Figures of one round.

    Attributes:
        up: Bytes sent by a client, as a mean over clients.
        down: Bytes sent to a client, as a mean over clients.
        seconds: Processor time of all clients and the server.
        models: Tensors of the model that clients receive after the first round.
    """

    up: float
    down: float
    seconds: float
    models: Tensors


def measure_round(model: str, clients: int, channel: dict[str, Any]) -> Figures:
    """Run two rounds of FedAvg, in which each client trains one step, and measure the second.

    Args:
        model: Model of all clients.
        clients: Number of clients.
        channel: Section `channel` of the configuration.
    """
    prepared = prepare(
        {
            "data": {"name": "digits", "train_limit": 100 * clients},
            "clients": {"count": clients, "defaults": {"model": model, "steps": 1}},
            "algorithm": {"name": "fedavg"},
            "rounds": 2,
            "channel": channel,
            "runtime": {"executor": "serial", "threads": 1, "device": "cpu"},
        }
    )
    trainer = prepared.make_trainer()
    trainer.run_round()
    models = received_model(trainer)
    started = time.process_time()
    record = trainer.run_round()
    seconds = time.process_time() - started
    trainer.executor.close()
    return Figures(record["up_bytes"] / clients, record["down_bytes"] / clients, seconds, models)


def received_model(trainer: FederatedTrainer) -> Tensors:
    """Return the tensors of the model that the first client receives next."""
    client = trainer.federation.client_infos.clients.ids[0]
    content = trainer.link.content(trainer.link.broadcast(trainer.federation.client_infos[client]))
    if trainer.federation.channel.homomorphic is not None:
        protocol = trainer.executor.runtime.protocol  # type: ignore[attr-defined]
        content = protocol.broadcast_in(client, Message("train", content, trainer.completed))
    tensors: Tensors = Payload.decode(encoded(content))["model"]
    return tensors


def largest_error(exact: Tensors, found: Tensors) -> float:
    """Return the largest difference, divided by the largest magnitude of all tensors."""
    difference = max(
        float((exact[name].double() - found[name].double()).abs().max())
        for name in exact
        if exact[name].is_floating_point()
    )
    return difference / max(float(t.abs().max()) for t in exact.values() if t.is_floating_point())


def main() -> None:
    """Print the figures of both models as a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=4)
    add_quick(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | numbers | protection | up | down | seconds | error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for title, model in list(MODELS.items())[: 1 if options.quick else None]:
        plain: Tensors = {}
        for channel, section in CHANNELS.items():
            figures = measure_round(model, options.clients, section)
            plain = plain or figures.models
            error = largest_error(plain, figures.models)
            numbers = sum(t.numel() for t in plain.values())
            print(
                f"| {title} | {numbers:,} | {channel} | {figures.up / 1e6:,.2f} MB | "
                f"{figures.down / 1e6:,.2f} MB | {figures.seconds:.1f} | "
                f"{f'{error:.1e}' if section else '–'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
