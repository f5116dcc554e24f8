#!/usr/bin/env python3
"""Measure the time and traffic of one round of the secure aggregation protocol.

    python -m benchmarks secure_sum
    python -m benchmarks secure_sum --clients 100 --numbers 10000 --leaving 10

No model is trained. Clients reply one after the other in this process on one core. In a federation,
clients work in parallel, so a round waits for the server and one client. Targets: less than 10 s
each for 20 clients with 10^6 numbers, and for 100 clients with 10^4 numbers.
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
from hetero_fl.communication.secure_aggregation.protocol import SecureAggregation
from hetero_fl.communication.vector_layout import VectorLayout
from hetero_fl.config.communication import SecureAggregationConfig
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.reporting.formatting import format_bytes

SPECS = {"model": ItemSpec("params")}
COLUMNS = (
    "clients", "numbers", "dropouts", "processor time", "server", "one client", "up", "down",
)  # fmt: skip


@dataclass
class Cohort:
    """Clients with one random model each, which is generated again for each upload.

    Attributes:
        client_ids: Client ids, in natural order.
        numbers: Number of parameters of a model.
        notes: State of the clients between messages.
        busy: Processor time of all clients in seconds.
    """

    client_ids: list[str]
    numbers: int
    notes: dict[str, bytes] = field(default_factory=dict)
    busy: float = 0.0

    def layout(self, round_idx: int) -> VectorLayout:
        """Return the layout of the vectors of all clients."""
        return VectorLayout.from_forms(
            [("a", {"model": Item({"w": torch.zeros(self.numbers)}, 1.0, "params")})], SPECS
        )

    def aggregation_group(self, client: str) -> str:
        """Return the only aggregation group."""
        return "a"

    def noise(self, *about: object) -> None:
        """Return None, because no noise is added."""

    def num_rows(self, client: str) -> int:
        """Return 1, because all clients have the same weight."""
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
        """Run a round in which some clients drop out before they send a vector.

        Args:
            protocol: The protocol.
            leaving: Ids of the clients that drop out.

        Returns:
            The aggregated uploads, and the traffic of the round.
        """
        traffic = Traffic()
        exchanges = protocol.exchanges(self.client_ids, 0)
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
        """Return the reply of a client, and add the processor time to `busy`."""
        upload = self.upload(client).encode() if request.kind == "train" else b""
        started = time.process_time()
        answer = protocol.answer(client, request, 0, self.notes)
        reply = answer if isinstance(answer, Message) else answer.reply(upload)
        self.busy += time.process_time() - started
        return reply


def measure_round(clients: int, numbers: int, leaving: int) -> None:
    """Run one round, check the sum and print a table row with time and traffic.

    Args:
        clients: Number of clients.
        numbers: Number of values per upload.
        leaving: Number of clients that drop out.
    """
    cohort = Cohort([f"site_{i}" for i in range(1, clients + 1)], numbers)
    config = SecureAggregationConfig(
        threshold=max(0.51, 1 - 2 * max(leaving, 0.05 * clients) / clients)
    )
    protocol = SecureAggregation(config, clients, cohort)
    gone = set(cohort.client_ids[1 : 1 + leaving])
    started = time.process_time()
    summed, traffic = cohort.hold(protocol, gone)
    seconds = time.process_time() - started
    assert len(summed.clients) == clients - leaving
    layout, plain = cohort.layout(0), np.zeros(numbers + 3, np.uint64)
    for client in summed.clients:
        plain += protocol.encode_upload(client, cohort.upload(client), layout, summed.unit, 0)
    assert np.array_equal(summed.total, plain)
    cells = [
        f"{clients}",
        f"{numbers:,}",
        f"{leaving}",
        f"{seconds:.1f} s",
        f"{seconds - cohort.busy:.1f} s",
        f"{1e3 * cohort.busy / clients:.0f} ms",
        format_bytes(traffic.up / clients),
        format_bytes(traffic.down / clients),
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure the cases with targets, or with `--clients` a single case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int)
    parser.add_argument("--numbers", type=int, default=10_000)
    parser.add_argument(
        "--leaving", type=int, default=0, help="clients that drop out before they send their vector"
    )
    add_quick(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{' ---: |' * len(COLUMNS)}")
    if options.quick:
        measure_round(5, 1_000, 1)
        return
    if options.clients:
        measure_round(options.clients, options.numbers, options.leaving)
        return
    for leaving in (0, 4):
        measure_round(20, 10**6, leaving)
    for leaving in (0, 10):
        measure_round(100, 10**4, leaving)
    measure_round(100, 10**4, 33)


if __name__ == "__main__":
    main()
