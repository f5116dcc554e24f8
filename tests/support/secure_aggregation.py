"""Clients and a server of one secure sum, with dropouts and changed messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from hetero_fl.communication.protocol import (
    AggregatedUploads,
    Message,
)
from hetero_fl.communication.secure_aggregation.crypto import SiteKeys
from hetero_fl.communication.secure_aggregation.protocol import SecureAggregation
from hetero_fl.communication.vector_layout import VectorLayout
from hetero_fl.config.communication import SecureAggregationConfig
from hetero_fl.core.payload import Item, ItemSpec, Payload, report_with_loss
from hetero_fl.utils.seeding import keyed_generator

SPECS = {"model": ItemSpec("params"), "logits": ItemSpec("rows")}
EXCHANGES = ("keys", "shares", "train", "consistency", "unmask")
# Replaces a message of a client; None drops it.
Change = Callable[[str, Message], Message | None]


def replacing(client: str, kind: str, change: Callable[[Message], Message]) -> Change:
    """Replace the messages of one kind to or from a client."""
    return lambda other, message: (
        change(message) if (other, message.kind) == (client, kind) else message
    )


def upload(client: str, group: str = "a", size: int = 5) -> Payload:
    """Return an upload with values that differ by client."""
    g = keyed_generator("party", client)
    items = {
        "model": Item(
            {"w": torch.randn(size, 2, generator=g), "b": torch.randn(2, generator=g)},
            7.0,
            "params",
        ),
        "logits": Item(torch.randn(3, 2, generator=g), torch.rand(2, generator=g), "rows"),
    }
    return Payload(items, report_with_loss(float(torch.rand(1, generator=g))))


class Party:
    """Clients of two alternating groups; `size` is the number of rows of their matrix."""

    def __init__(self, count: int, size: int = 5, **config: float | int) -> None:
        self.clients = [f"site_{i}" for i in range(1, count + 1)]
        self.client_ids = self.clients
        self.round_idx = 0
        self.uploads = {c: upload(c, self.aggregation_group(c), size) for c in self.clients}
        self.notes: dict[str, dict[str, bytes]] = {c: {} for c in self.clients}
        form = {n: self.uploads["site_1"].item(n) for n in SPECS}
        self._layout = VectorLayout.from_forms([("a", form), ("b", form)], SPECS)
        self.protocol = SecureAggregation(
            SecureAggregationConfig.model_validate(config), count, self
        )
        self.site_keys: dict[str, SiteKeys] = {}
        # Requests, clients and replies.
        self.seen: list[tuple[str, str, Message]] = []
        self.requests: list[tuple[str, Message]] = []

    def layout(self, round_idx: int) -> VectorLayout:
        return self._layout

    def aggregation_group(self, client: str) -> str:
        return "ab"[int(client.rpartition("_")[2]) % 2]

    def noise(self, *about: object) -> None:
        pass

    def num_rows(self, client: str) -> int:
        return 7

    def reply(self, client: str, message: Message) -> Message:
        """Return the client's answer; training finishes at once."""
        self.protocol.site_keys = self.site_keys.get(client, SiteKeys())
        answer = self.protocol.answer(client, message, self.round_idx, self.notes[client])
        if isinstance(answer, Message):
            return answer
        return answer.reply(self.uploads[client].encode())

    def run_round(
        self,
        leaves: Mapping[str, str] | None = None,
        down: Change = lambda client, message: message,
        up: Change = lambda client, message: message,
        again: bool = False,
    ) -> AggregatedUploads:
        """Run the next round, or the last one `again`.

        The round has dropouts by exchange (`leaves`), and changed messages.
        """
        absent: set[str] = set()
        self.round_idx += not again

        exchanges = self.protocol.exchanges(self.clients, self.round_idx)
        try:
            while True:
                exchange = next(exchanges)
                for client in exchange.clients:
                    request = down(client, exchange.request(client, lambda client: b"broadcast"))
                    if request is None or (leaves or {}).get(client) == request.kind:
                        absent.add(client)
                    if request is None or client in absent:
                        continue
                    self.requests.append((client, request))
                    result = self.reply(client, request)
                    self.seen.append((request.kind, client, result))
                    if (arrived := up(client, result)) is not None:
                        exchange.accept(client, arrived)
        except StopIteration as stop:
            assert isinstance(stop.value, AggregatedUploads)
            return stop.value

    def plain(self, clients: list[str]) -> np.ndarray:
        """Return the plain sum of these clients' integers modulo 2^64."""
        total = np.zeros(self._layout.size, np.uint64)
        for client in clients:
            total += self.protocol.encode_upload(client, self.uploads[client], self._layout, 8.0, 0)
        return total
