"""FedAsync and FedBuff as event loops."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from hetero_fl.utils.seeding import Key, keyed_generator
from tests.references.loops.averaging import FedProx
from tests.references.loops.base import State, copied, floats, load


@dataclass
class Task:
    """A client's training, from the assignment to the arrival of the upload."""

    end: float
    i: int
    version: int
    attempt: int
    start: State


class FedAsync(FedProx):
    """Uploads are mixed into the model of their architecture on arrival.

    Attributes:
        seconds: Duration of the tasks of each client.
    """

    def start(self) -> None:
        super().start()
        self.seconds = [1.0] * len(self.cards)
        self.tasks: list[Task] = []
        self.attempts: Counter[int] = Counter()
        self.now, self.version = 0.0, 0
        # Version and attempt of the task that is computed.
        self.trained, self.attempt = 0, 0

    def draws(self, who: str, label: str, *more: Key, use: int = 0) -> torch.Generator:
        again = ("again", self.attempt) if self.attempt else ()
        return keyed_generator(self.federation.seed, self.trained, who, label, use, *again, *more)

    def work(self) -> None:
        """Wait for as many uploads as there are clients."""
        for _ in self.cards:
            # Tasks that end at the same time are all finished before new ones are assigned.
            if not any(task.end <= self.now for task in self.tasks):
                self.assign()
            task = min(self.tasks, key=lambda task: task.end)
            self.tasks.remove(task)
            self.now = task.end
            module = load(self.modules[self.group(task.i)], task.start)
            self.trained, self.attempt = task.version, task.attempt
            self.local(task.i, module)
            with torch.no_grad():
                self.arrived(task, copied(floats(module)))

    def assign(self) -> None:
        """Give a task to every idle client."""
        busy = {task.i for task in self.tasks}
        for i in range(len(self.cards)):
            if i not in busy:
                start = copied(self.shared[self.group(i)])
                end = self.now + self.seconds[i]
                self.tasks.append(Task(end, i, self.version, self.attempts[i], start))
                self.attempts[i] += 1

    def local(self, i: int, module: torch.nn.Module) -> None:
        loss = self.near(i, module, copied(floats(module)), self.rho) if self.rho else None
        self.train(i, module, loss)

    @property
    def rho(self) -> float:
        """Weight of the proximal term."""
        return float(self.method.rho)

    def arrived(self, task: Task, end: State) -> None:
        """Use an upload."""
        rate = self.method.alpha * self.freshness(task)
        for name, tensor in self.shared[self.group(task.i)].items():
            tensor.lerp_(end[name], rate)
        self.next_version()

    def next_version(self) -> None:
        """Count a new model of the server."""
        self.version += 1
        self.attempts.clear()

    def freshness(self, task: Task) -> float:
        """Return s(τ) for an upload."""
        s, stale = self.method, self.version - task.version
        if s.staleness == "constant":
            return 1.0
        if s.staleness == "polynomial":
            return float((1 + stale) ** -(0.5 if s.a is None else s.a))
        return 1.0 if stale <= s.b else 1 / ((10 if s.a is None else s.a) * (stale - s.b) + 1)


class FedBuff(FedAsync):
    """Means of changes in buffers of size K."""

    rho = 0.0

    def start(self) -> None:
        super().start()
        self.buffer: list[tuple[Task, float, State]] = []

    def arrived(self, task: Task, end: State) -> None:
        self.buffer.append((task, self.freshness(task), end))
        if len(self.buffer) < self.method.buffer:
            return
        for group in self.shared:
            sent = [entry for entry in self.buffer if self.group(entry[0].i) == group]
            if sent:
                self.apply(group, sent)
        self.buffer = []
        self.next_version()

    def apply(self, group: str, sent: list[tuple[Task, float, State]]) -> None:
        """Update the model of one architecture."""
        parameters, k = self.parameters(group), len(sent)
        for name, tensor in self.shared[group].items():
            if name in parameters:
                changes = [s * (end[name] - task.start[name]) for task, s, end in sent]
                tensor.add_(total(changes), alpha=self.method.server_lr / k)
            else:
                # A variance moves toward the clients' by the factor Σs / K.
                moves = [s * (end[name] - tensor) for _, s, end in sent]
                tensor.add_(total(moves), alpha=1 / k)


def total(tensors: list[Tensor]) -> Tensor:
    """Return the sum."""
    return torch.stack(tensors).sum(0)
