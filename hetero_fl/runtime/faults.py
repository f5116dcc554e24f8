"""What befalls a task: drawn by the key of client and task number, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hetero_fl.config.devices import FaultsConfig
from hetero_fl.runtime.devices import Devices, uniform

What = Literal["fine", "before", "during", "after", "lost", "late", "twice", "corrupted"]
TOLD: dict[str, str] = {
    "before": "failed before training",
    "during": "failed during training",
    "after": "failed after training",
    "lost": "upload lost",
}


@dataclass(frozen=True)
class Fate:
    """What befalls a task. `by`: seconds that its upload is late; `share`: of the training after which it fails during it."""

    what: What = "fine"
    by: float = 0.0
    share: float = 1.0

    @property
    def fails(self) -> bool:
        """Whether no upload ever comes of it."""
        return self.what in TOLD

    @property
    def why(self) -> str:
        """The failure, in words."""
        return TOLD[self.what]


FINE = Fate()


class Faults:
    """The fates of all tasks, by probability; a machine's own chance of failing comes on top."""

    def __init__(self, config: FaultsConfig | None, devices: Devices) -> None:
        self.config, self.devices = config or FaultsConfig(), devices

    def fate(self, id: str, task: int) -> Fate:
        """What befalls the client's task of that number: the same however often it is asked."""
        seed = self.devices.federation.seed
        share = uniform(seed, "fate", id, task, "share")
        if uniform(seed, "fate", id, task, "device") < self.devices.device(id).failure:
            return Fate("during", share=share)
        drawn, below = uniform(seed, "fate", id, task), 0.0
        for what, chance in self.config.chances.items():
            below += chance
            if drawn < below:
                return Fate(what, by=self.config.delay if what == "late" else 0.0, share=share)  # type: ignore[arg-type]
        return FINE
