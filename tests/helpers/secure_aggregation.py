"""A cohort and a server that hold one secure sum, any of whom may leave, or say something else, at any exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from hetero_fl.communication.protocol import Message, Messages, Replies, Summed, Traffic, hold_round
from hetero_fl.communication.secure_aggregation.protocol import Layout, SecureSum
from hetero_fl.config.communication import SecureSumConfig
from hetero_fl.core.payload import Item, ItemSpec, Payload, report_of
from hetero_fl.utils.seeding import generator

SPECS = {"model": ItemSpec("params"), "logits": ItemSpec("rows")}
EXCHANGES = ("keys", "shares", "train", "unmask")
# (client, message) -> what arrives in its place; None: nothing
Change = Callable[[str, Message], Message | None]


def upload(client: str, group: str = "a", size: int = 5) -> Payload:
    """Something to send: the numbers are the client's own."""
    g = generator("party", client)
    items = {
        "model": Item(
            {"w": torch.randn(size, 2, generator=g), "b": torch.randn(2, generator=g)},
            7.0,
            "params",
        ),
        "logits": Item(torch.randn(3, 2, generator=g), torch.rand(2, generator=g), "rows"),
    }
    return Payload(items, report_of(float(torch.rand(1, generator=g))))


class Party:
    """So many clients, of two groups in turn; `size`: rows of their matrix."""

    def __init__(self, count: int, size: int = 5, **config: float | int) -> None:
        self.clients = [f"site_{i}" for i in range(1, count + 1)]
        self.uploads = {c: upload(c, self.group(c), size) for c in self.clients}
        self.notes: dict[str, dict[str, bytes]] = {c: {} for c in self.clients}
        form = {n: self.uploads["site_1"].item(n) for n in SPECS}
        self._layout = Layout.of([("a", form), ("b", form)], SPECS)
        self.protocol = SecureSum(SecureSumConfig.model_validate(config), count, self)
        self.seen: list[tuple[str, str, Message]] = []  # (asked, client, reply)
        self.asked: list[tuple[str, Message]] = []

    def layout(self, round: int) -> Layout:
        return self._layout

    def group(self, client: str) -> str:
        return "ab"[int(client.rpartition("_")[2]) % 2]

    def noise(self, *about: object) -> None:
        """Nobody adds any."""

    def rows(self, client: str) -> int:
        return 7

    def reply(self, client: str, message: Message) -> Message:
        """What the client answers, its training done at once."""
        talk = self.protocol.answer(client, message, 0, self.notes[client])
        try:
            next(talk)
            talk.send(self.uploads[client].encode())
        except StopIteration as stop:
            made: Message = stop.value
            return made
        raise AssertionError("one broadcast, one upload")

    def hold(
        self,
        leaves: Mapping[str, str] | None = None,
        down: Change = lambda client, message: message,
        up: Change = lambda client, message: message,
    ) -> Summed:
        """The round. `leaves`: at which exchange a client is no longer there; `down` and `up` change what arrives."""
        gone: set[str] = set()

        def exchange(requests: Messages) -> Replies:
            for client in requests:
                request = down(client, requests[client])
                if request is None or (leaves or {}).get(client) == request.ask:
                    gone.add(client)
                if request is None or client in gone:
                    continue
                self.asked.append((client, request))
                made = self.reply(client, request)
                self.seen.append((request.ask, client, made))
                if (arrived := up(client, made)) is not None:
                    yield client, arrived

        done = hold_round(
            self.protocol, dict.fromkeys(self.clients, b"broadcast"), exchange, Traffic(), 0
        )
        assert isinstance(done, Summed)
        return done

    def plain(self, clients: list[str]) -> np.ndarray:
        """The sum of these clients' integers, modulo 2^64: what no mask was ever on."""
        total = np.zeros(self._layout.size, np.uint64)
        for client in clients:
            total += self.protocol.vector(client, self.uploads[client], self._layout, 8.0, 0)
        return total
