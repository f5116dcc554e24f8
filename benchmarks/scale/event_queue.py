#!/usr/bin/env python3
"""Measure the cost per event of an asynchronous run with 100,000 clients.

    python -m benchmarks event_queue

The run uses FedBuff with a linear model on scikit-learn's digits, and 1,000 clients train at any
time. Uploads are precomputed, so the measurement covers the queue, client sampling, simulated
devices and faults, broadcasts, validation of uploads, and aggregation. Target: 1 ms of processor
time per event.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.common import add_quick
from hetero_fl.communication.protocol import Message
from hetero_fl.experiment import prepare
from hetero_fl.federation.executors.base import Reply

TARGET = 1.0


def source(clients: int, flight: int) -> dict[str, Any]:
    """Return the configuration.

    Args:
        clients: Number of clients.
        flight: Number of clients that train at any time.
    """
    return {
        "rounds": 1000,
        "data": {"name": "digits", "partition": {"kind": "drawn", "alpha": 0.5, "rows": 60}},
        "clients": {
            "per_round": flight,
            "defaults": {"optimizer": {"name": "sgd", "lr": 0.05}},
            "groups": [{"name": "client", "count": clients, "model": "linear"}],
        },
        "algorithm": {"name": "fedbuff"},
        "devices": {"speed": {"median": 1e8, "sigma": 0.9}, "up": 1e5, "down": 1e6, "jitter": 0.2},
        "faults": {"lost": 0.1, "late": 0.1, "delay": 60.0},
        "evaluation": {"clients": 10},
        "runtime": {"executor": "serial", "threads": 1},
    }


def main() -> None:
    """Time rounds and print the processor time per event."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument(
        "--flight", type=int, default=1000, help="clients in flight, and uploads of a round"
    )
    parser.add_argument("--rounds", type=int, default=5)
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.clients = 1_000
        options.flight = 100
        options.rounds = 1
    run = prepare(source(options.clients, options.flight)).make_trainer()
    answer, result = run.executor.run, list[Reply]()

    def again(
        clients: Sequence[str], request: Callable[[str], Message]
    ) -> Iterator[tuple[str, Reply]]:
        if not result:
            result.extend(reply for _, reply in answer(clients[:1], request))
        for client in clients:
            assert isinstance(result[0], Message)
            yield client, result[0]

    run.executor.run = again  # type: ignore[method-assign]
    torch.set_num_threads(1)
    run.run_round()
    events, started = 0, time.process_time()
    for _ in range(options.rounds):
        events += run.run_round()["counts"]["invited"]
    each = (time.process_time() - started) / events * 1000
    aim = "met" if each <= TARGET else "missed"
    print(
        f"{events:,} events of {options.clients:,} clients, {options.flight:,} in flight: "
        f"{each:.2f} ms each; target 1: {aim}"
    )


if __name__ == "__main__":
    main()
