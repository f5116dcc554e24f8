"""Both directions of a run's channel, as client and server make them alike from the method and the federation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hetero_fl.algorithms import Algorithm
from hetero_fl.architecture import Architecture
from hetero_fl.channel.link import Link
from hetero_fl.channel.stages import dearest, stages_of
from hetero_fl.channel.streams import sorts_of
from hetero_fl.config.channel import ChannelConfig
from hetero_fl.payload import Item, Payload
from hetero_fl.runtime.federation import SERVER, Federation
from hetero_fl.runtime.protection import Protection
from hetero_fl.seeding import Key
from hetero_fl.state import Card


class Links:
    """What is sent and received on either side. Bounds, which send nothing that a federation would, are not compressed.

    `bound`: messages as long as they can be, where that depends on the numbers; `at_most`: whether it does.
    """

    def __init__(self, algorithm: Algorithm, federation: Federation, bound: bool = False) -> None:
        config = federation.channel if algorithm.counted else ChannelConfig()
        up, down = (stages_of(chain, config.entropy) for chain in (config.compress, config.compress_down))
        self.at_most = bound and dearest(up) != up
        self.algorithm, self.seed = algorithm, federation.seed
        self.summed = config.secure_sum is not None
        specs = Protection.of(algorithm, federation).specs
        self.up = Link(dearest(up) if bound else up, specs, federation.task.outputs)
        self.down = Link(down, algorithm.downloads, federation.task.outputs)
        self._statistics: dict[Architecture, frozenset[str]] = {}

    # Up --------------------------------------------------------------------------------------------------------------
    def upload(
        self, card: Card, round: int, payload: Payload, got: Payload, memory: dict[str, Any], again: int = 0
    ) -> bytes:
        """A client's upload, which trained on what it `got`; `memory` is its private state. `again`: how often it was asked in
        that round before, for draws of their own.

        What is to be summed in secret is rounded as the chain has it, and goes on as the numbers that the chain's end reads.
        """
        sent = self.up.send(payload, self._key(card.id, round, again), self._untouched(card), got, memory)
        if not self.summed or self.up.streams is None:
            return sent
        return self.uploaded(card, round, sent, payload.items_, got, again).encode()

    def uploaded(
        self, card: Card, round: int, data: bytes, like: Mapping[str, Item], got: Payload, again: int = 0
    ) -> Payload:
        """The upload at the server, which knows what the client `got` and what its upload is `like`. Raises PayloadError."""
        return self.up.receive(data, self._key(card.id, round, again), self._untouched(card), got, like)

    def _untouched(self, card: Card) -> frozenset[str]:
        return self._buffers([card.arch, *self.algorithm.extras(card.arch).values()])

    # Down ------------------------------------------------------------------------------------------------------------
    def broadcast(self, round: int, payload: Payload, archs: Iterable[Architecture]) -> bytes:
        """What the server, which holds models of these architectures, sends. Clients that are sent the same receive the same."""
        return self.down.send(payload, self._key(SERVER, round), self._buffers(archs))

    def received(self, round: int, data: bytes) -> Payload:
        """A broadcast at the client. Raises PayloadError."""
        return self.down.receive(data, self._key(SERVER, round))

    def heard(self, round: int, payload: Payload, archs: Iterable[Architecture]) -> Payload:
        """What a client makes of a broadcast."""
        if self.down.streams is None:
            return payload
        return self.received(round, self.broadcast(round, payload, archs))

    def _key(self, sender: str, round: int, again: int = 0) -> tuple[Key, ...]:
        return (self.seed, round, sender, "link", *(("again", again) if again else ()))

    def _buffers(self, archs: Iterable[Architecture]) -> frozenset[str]:
        """Names of what is no parameter (running means and variances): averaged as it is, never cut or rounded."""
        found: frozenset[str] = frozenset()
        for arch in archs:
            if arch not in self._statistics:
                self._statistics[arch] = frozenset(arch.shapes) - arch.parameter_names
            found |= self._statistics[arch]
        return found


def idle(name: str, algorithm: Algorithm, federation: Federation) -> list[str]:
    """Lines on stages that find nothing to do in what clients of this method send."""
    config = federation.channel
    if not algorithm.counted:
        return [f"channel is not used: {name} sends nothing"] if config.compress or config.compress_down else []
    sorts = {sort for spec in algorithm.uploads.values() for sort in sorts_of(spec)}
    stages = zip(config.compress, stages_of(config.compress, config.entropy), strict=True)
    notes = [
        f"channel.compress: {c.name} finds nothing to do in what {name} sends" for c, s in stages if not sorts & s.sorts
    ]
    classes = federation.task.outputs
    for key, chain in (("compress", config.compress), ("compress_down", config.compress_down)):
        notes += [
            f"channel.{key}: top_classes {c.top_classes} leaves predictions of {classes} classes as they are"
            for c in chain
            if c.top_classes is not None and c.top_classes + 1 >= classes
        ]
    if config.entropy and not any(c.topk for c in config.compress):
        notes.append("channel.entropy is not used: it codes the places that topk sends")
    return notes
