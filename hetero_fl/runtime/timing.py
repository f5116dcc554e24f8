"""How long a task takes in simulated time: arithmetic on what is known before it is computed, never the clock."""

from __future__ import annotations

from dataclasses import dataclass

from hetero_fl.runtime.batches import whole_steps
from hetero_fl.runtime.costs import work as operations
from hetero_fl.runtime.devices import Devices, log_normal
from hetero_fl.state import Card


@dataclass(frozen=True)
class Stages:
    """When a task's parts are done, in simulated seconds since the run began."""

    invited: float
    received: float  # the broadcast is there
    trained: float
    arrived: float  # the upload is at the server, if nothing befalls it


class Timing:
    """Durations of clients' tasks: down/bandwidth + operations/speed + up/bandwidth, while the client is online."""

    def __init__(self, devices: Devices) -> None:
        self.devices, self.federation = devices, devices.federation

    def computing(self, id: str, task: int) -> float:
        """Seconds that a client's whole local training takes, while it is online. `task`: its number, for the jitter."""
        device = self.devices.device(id)
        factor = log_normal(1.0, device.jitter, self.federation.seed, "jitter", id, task)
        return factor * operations(self.federation.cards[id]) / device.speed

    def stages(self, id: str, down_bytes: int, up_bytes: int, at: float, task: int, work: float = 1.0) -> Stages:
        """A task that is given out at `at`; `work`: the share of the steps that it does."""
        device = self.devices.device(id)
        received = device.finish(at, down_bytes / device.down)
        trained = device.finish(received, work * self.computing(id, task))
        return Stages(at, received, trained, device.finish(trained, up_bytes / device.up))

    def duration(self, id: str, down_bytes: int, up_bytes: int, at: float, task: int) -> float:
        """Seconds from when a task is given out to when its upload arrives, waiting for the client to be online included."""
        return self.stages(id, down_bytes, up_bytes, at, task).arrived - at

    def share_in_time(self, id: str, down_bytes: int, up_bytes: int, at: float, task: int, deadline: float) -> float:
        """The share of the steps after which the upload still arrives by `deadline`: at most 1, 0 if there is time for none."""
        device = self.devices.device(id)
        spare = device.time_until(at, deadline) - down_bytes / device.down - up_bytes / device.up
        whole = self.computing(id, task)
        return 1.0 if spare >= whole else max(0.0, spare / whole)


def local_steps(card: Card) -> int:
    """Steps of a client's whole local training in a round."""
    s = card.settings
    return whole_steps(card.n, s.batch_size, s.epochs, s.steps)
