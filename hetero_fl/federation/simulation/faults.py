"""Simulated faults of tasks and of deliveries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from hetero_fl.communication.protocol import Message
from hetero_fl.config.simulation import FaultsConfig
from hetero_fl.federation.executors.base import Reply
from hetero_fl.federation.simulation.devices import Devices, uniform
from hetero_fl.utils.seeding import Key, stream_key

# What befalls a task: drawn by the key of client and task number, before anything is computed.

FaultKind = Literal["fine", "before", "during", "after", "lost", "late", "twice", "corrupted"]
DESCRIPTIONS: dict[str, str] = {
    "before": "failed before training",
    "during": "failed during training",
    "after": "failed after training",
    "lost": "upload lost",
}


@dataclass(frozen=True)
class FaultOutcome:
    """What befalls a task. `delay`: seconds that its upload is late; `completed_share`: of the training after which it fails during it."""

    kind: FaultKind = "fine"
    delay: float = 0.0
    completed_share: float = 1.0

    @property
    def is_failure(self) -> bool:
        """Whether no upload ever comes of it."""
        return self.kind in DESCRIPTIONS

    @property
    def description(self) -> str:
        """The failure, in words."""
        return DESCRIPTIONS[self.kind]


NO_FAULT = FaultOutcome()


class Faults:
    """The fates of all tasks, by probability; a machine's own chance of failing comes on top."""

    def __init__(self, config: FaultsConfig | None, devices: Devices) -> None:
        self.config = config or FaultsConfig()
        self.devices = devices

    def outcome(self, client_id: str, task: int) -> FaultOutcome:
        """What befalls the client's task of that number: the same however often it is asked."""
        seed = self.devices.federation.seed
        share = uniform(seed, "fate", client_id, task, "share")
        if (
            uniform(seed, "fate", client_id, task, "device")
            < self.devices.device(client_id).failure
        ):
            return FaultOutcome("during", completed_share=share)
        drawn = uniform(seed, "fate", client_id, task)
        below = 0.0
        for what, chance in self.config.probabilities.items():
            below += chance
            if drawn < below:
                delay = self.config.delay if what == "late" else 0.0
                return FaultOutcome(what, delay=delay, completed_share=share)  # type: ignore[arg-type]
        return NO_FAULT


# What happens to uploads on their way: some come twice, some with other bytes; the server's door
# tells both.

MOST = 8  # bytes that change


def inject_faults(
    replies: Iterator[tuple[str, Reply]], outcomes: Mapping[str, FaultOutcome], *parts: Key
) -> Iterator[tuple[str, Reply]]:
    """The replies as they arrive. `parts`: the key of these tasks, by which bytes are changed."""
    for client, reply in replies:
        what = outcomes[client].kind
        if isinstance(reply, Message) and what == "corrupted":
            reply = replace(reply.with_checksum(), content=flip_bytes(reply.body, *parts, client))
        yield client, reply
        if what == "twice":
            yield client, reply
        del reply  # a model's worth


def drop_duplicates(replies: Iterator[tuple[str, Reply]]) -> Iterator[tuple[str, Reply]]:
    """Each task's first reply; a second one of the same task is dropped."""
    answered: set[str] = set()
    for client, reply in replies:
        if client not in answered:
            answered.add(client)
            yield client, reply
        del reply  # a model's worth


def flip_bytes(body: bytes, *parts: Key) -> bytes:
    """The bytes with up to MOST of them changed, at least one, drawn by the parts."""
    changed = bytearray(body)
    for i in range(1 + stream_key(*parts, "bytes") % MOST if changed else 0):
        changed[stream_key(*parts, i, "place") % len(changed)] ^= (
            1 + stream_key(*parts, i, "bits") % 255
        )
    return (
        bytes(changed)
        if bytes(changed) != body
        else bytes([body[0] ^ 1]) + body[1:]
        if body
        else b"\0"
    )
