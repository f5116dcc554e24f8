"""Simulated faults of clients' tasks and of the delivery of uploads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hetero_fl.config.simulation import FaultsConfig
from hetero_fl.federation.simulation.devices import Devices, uniform
from hetero_fl.utils.seeding import Key, stream_key

FaultKind = Literal["fine", "before", "during", "after", "lost", "late", "twice", "corrupted"]
DESCRIPTIONS: dict[str, str] = {
    "before": "failed before training",
    "during": "failed during training",
    "after": "failed after training",
    "lost": "upload lost",
}
# Largest number of bytes changed in a corrupted upload.
MAX_CHANGED_BYTES = 8


@dataclass(frozen=True)
class FaultOutcome:
    """Simulated fault of a task.

    Attributes:
        kind: Kind of the fault. "fine" if there is no fault.
        delay: Delay of the upload in seconds, in addition to the normal duration of the task.
        completed_share: Fraction of the training that is completed if the task fails during
            training.
    """

    kind: FaultKind = "fine"
    delay: float = 0.0
    completed_share: float = 1.0

    @property
    def is_failure(self) -> bool:
        """Whether no upload arrives at the server."""
        return self.kind in DESCRIPTIONS

    @property
    def description(self) -> str:
        """Description of the failure.

        Raises:
            KeyError: If the fault is not a failure (see `is_failure`).
        """
        return DESCRIPTIONS[self.kind]


NO_FAULT = FaultOutcome()


class Faults:
    """Simulated faults of all tasks.

    The fault of a task depends only on the seed of the run, the client id and the number of the
    task.

    Args:
        config: Probabilities of faults. If None, the probabilities are 0.
        devices: Devices of the clients, which have additional failure probabilities.
    """

    def __init__(self, config: FaultsConfig | None, devices: Devices) -> None:
        self.config = config or FaultsConfig()
        self.devices = devices

    def outcome(self, client_id: str, task: int) -> FaultOutcome:
        """Return the fault of a task. Repeated calls return the same fault.

        Args:
            client_id: The client.
            task: Number of the task.
        """
        seed = self.devices.federation.seed
        share = uniform(seed, "fate", client_id, task, "share")
        if (
            uniform(seed, "fate", client_id, task, "device")
            < self.devices.device(client_id).failure
        ):
            return FaultOutcome("during", completed_share=share)
        drawn = uniform(seed, "fate", client_id, task)
        below = 0.0
        for kind, probability in self.config.probabilities.items():
            below += probability
            if drawn < below:
                delay = self.config.delay if kind == "late" else 0.0
                return FaultOutcome(
                    kind,  # type: ignore[arg-type]  # a key of a mapping is any string
                    delay=delay,
                    completed_share=share,
                )
        return NO_FAULT


def flip_bytes(body: bytes, *parts: Key) -> bytes:
    """Return a copy of a byte string in which 1 to `MAX_CHANGED_BYTES` bytes are changed.

    Args:
        body: The byte string. If the byte string is empty, a zero byte is returned.
        *parts: Values that seed the random draws.
    """
    if not body:
        return b"\0"
    changed = bytearray(body)
    for i in range(1 + stream_key(*parts, "bytes") % MAX_CHANGED_BYTES):
        position = stream_key(*parts, i, "place") % len(changed)
        changed[position] ^= 1 + stream_key(*parts, i, "bits") % 255
    if bytes(changed) == body:
        # Two changes of the same byte can cancel each other.
        return bytes([body[0] ^ 1]) + body[1:]
    return bytes(changed)
