#!/usr/bin/env python3
"""Measure secure aggregation: seconds of a round of the protocol, and bytes per client.

    python -m benchmarks secure_sum
    python -m benchmarks secure_sum --clients 100 --numbers 10000 --neighbours 54 --leaving 10

Nothing is trained. Clients reply one after the other in this process on one core. In a federation
they work in parallel, so a round waits for the server and one client. Targets: 20 clients with 10^6
numbers, and 100 clients with 10^4 numbers and the sparse graph, in less than 10 s each.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.common import add_quick
from hetero_fl.communication.protocol import (
    AggregatedUploads,
    Message,
    Traffic,
)
from hetero_fl.communication.secure_aggregation.crypto import num_neighbours
from hetero_fl.communication.secure_aggregation.protocol import SecureAggregation, VectorLayout
from hetero_fl.config.communication import SecureAggregationConfig
from hetero_fl.core.payload import Item, ItemSpec, Payload

SPECS = {"model": ItemSpec("params")}


@dataclass
class Cohort:
    """Clients with one model each, created again for each upload."""

    clients: list[str]
    numbers: int
    notes: dict[str, bytes] = field(default_factory=dict)
    busy: float = 0.0  # seconds of all clients

    def layout(self, round_idx: int) -> VectorLayout:
        """Return the layout of all vectors."""
        return VectorLayout.from_forms(
            [("a", {"model": Item({"w": torch.zeros(self.numbers)}, 1.0, "params")})], SPECS
        )

    def aggregation_group(self, client: str) -> str:
        """Return the only group."""
        return "a"

    def noise(self, *about: object) -> None:
        """Return no private items."""

    def num_rows(self, client: str) -> int:
        """Return the same number of rows for all clients."""
        return 1

    def upload(self, client: str) -> Payload:
        """Return the model of the client."""
        draw = torch.Generator().manual_seed(int(client.rpartition("_")[2]))
        return Payload(
            {"model": Item({"w": torch.randn(self.numbers, generator=draw)}, 1.0, "params")}
        )

    def hold(
        self, protocol: SecureAggregation, leaving: set[str]
    ) -> tuple[AggregatedUploads, Traffic]:
        """Run a round in which some clients drop out before they send their vector."""
        traffic = Traffic()
        exchanges = protocol.exchanges(self.clients, 0)
        try:
            while True:
                exchange = next(exchanges)
                for client in exchange.clients:
                    request = exchange.request(client, lambda _client: b"")
                    traffic.down += len(request.body)
                    if request.kind == "train" and client in leaving:
                        continue
                    reply = self.answer(protocol, client, request)
                    traffic.up += len(reply.body)
                    exchange.accept(client, reply)
        except StopIteration as stop:
            return stop.value, traffic

    def answer(self, protocol: SecureAggregation, client: str, request: Message) -> Message:
        """Time the reply of a client without training."""
        upload = self.upload(client).encode() if request.kind == "train" else b""
        started = time.process_time()
        answer = protocol.answer(client, request, 0, self.notes)
        reply = answer if isinstance(answer, Message) else answer.reply(upload)
        self.busy += time.process_time() - started
        return reply


def measure_round(clients: int, numbers: int, neighbours: int | None, leaving: int) -> None:
    """Run one round, check its sum and print its time."""
    cohort = Cohort([f"site_{i}" for i in range(1, clients + 1)], numbers)
    config = SecureAggregationConfig(
        threshold=max(0.51, 1 - 2 * max(leaving, 0.05 * clients) / clients), neighbours=neighbours
    )
    protocol = SecureAggregation(config, clients, cohort)
    gone = set(cohort.clients[1 : 1 + leaving])
    k = num_neighbours(clients, protocol.survivors, neighbours)
    started, wall = time.process_time(), time.perf_counter()
    summed, traffic = cohort.hold(protocol, gone)
    seconds, wall = time.process_time() - started, time.perf_counter() - wall
    assert len(summed.clients) == clients - leaving
    layout, plain = cohort.layout(0), np.zeros(numbers + 3, np.uint64)
    for client in summed.clients:
        plain += protocol.encode_upload(client, cohort.upload(client), layout, summed.unit, 0)
    assert np.array_equal(summed.total, plain)
    server, each = seconds - cohort.busy, 1e3 * cohort.busy / clients
    print(
        f"{clients} clients with {numbers:,} numbers and {k} neighbors, {leaving} dropping out: "
        f"{wall:.2f} s; processor time {seconds:.2f} s (server {server:.2f} s, per client "
        f"{each:.0f} ms); correct sum; per client {traffic.up / clients / 1e3:.0f} kB up and "
        f"{traffic.down / clients / 1e3:.0f} kB down"
    )


def main() -> None:
    """Measure the target cases, or one of another size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int)
    parser.add_argument("--numbers", type=int, default=10_000)
    parser.add_argument("--neighbours", type=int, default=None)
    parser.add_argument(
        "--leaving", type=int, default=0, help="clients that drop out before they send their vector"
    )
    add_quick(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        measure_round(5, 1_000, None, 1)
        return
    if options.clients:
        measure_round(options.clients, options.numbers, options.neighbours, options.leaving)
        return
    for leaving in (0, 4):
        measure_round(20, 10**6, None, leaving)
    for leaving in (0, 10):
        measure_round(100, 10**4, None, leaving)
    measure_round(100, 10**4, None, 33)


if __name__ == "__main__":
    main()
