"""The client's side of a run: where plans of clients are made and carried out, in the simulator and on real machines alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hetero_fl.algorithms import Algorithm
from hetero_fl.architecture import Architecture, Tensors
from hetero_fl.channel.protocol import Message, Protocol
from hetero_fl.data import Preprocess
from hetero_fl.metrics import calibration, confusion, score
from hetero_fl.payload import Payload, report_of
from hetero_fl.plan import Plan, Rows
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.serial import Performer, carry_out, training_loss
from hetero_fl.runtime.store import Private, Store
from hetero_fl.state import Participant

Scores = dict[str, float | None]
READINGS = {  # what is read on which rows, and whether the client's own label frequencies hold there
    "personal": ("test", True),
    "global": ("common_test", False),
    "validation_personal": ("validation", True),
    "validation_global": ("common_validation", False),
}


@dataclass
class Reading:
    """What an evaluation tells of one client. Only scores leave a real site; the rest is for a simulation's report."""

    scores: dict[str, Scores] = field(default_factory=dict)
    confusion: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    model: Tensors = field(default_factory=dict)  # the deployed model, its architecture and the preprocessing it needs
    arch: Architecture | None = None
    view: Preprocess | None = None
    log_prior: list[float] | None = None  # what is added to the logits at home


class Site:
    """Carries out clients' plans with their own data and private state."""

    def __init__(
        self, algorithm: Algorithm, federation: Federation, store: Store, performer: Performer, protocol: Protocol
    ) -> None:
        self.algorithm, self.federation, self.store = algorithm, federation, store
        self.performer, self.protocol = performer, protocol
        self.watch: Callable[[str], None] | None = None  # told what is being done

    def answer(self, client: str, message: Message, round: int) -> Message:
        """The client's reply to one request of the protocol. Raises Diverged if its training does."""
        return self.protocol.answer(message, lambda broadcast: self._train(client, broadcast, round))

    def _train(self, client: str, broadcast: bytes, round: int) -> bytes:
        participant = self.federation.client(client, self.store.get(client), round)
        plan = self.algorithm.train(participant, Payload.decode(broadcast))
        items, reports = carry_out(plan, participant, self.performer, self._telling(client))
        self.store.stage(client, Private(self.algorithm.private(participant), participant.state))
        return Payload(items, report_of(training_loss(reports))).encode()

    def deployed(self, client: str, broadcast: bytes, round: int) -> Participant:
        """A copy of the client with the model that it would use now, personalised."""
        participant = self.federation.client(client, self.store.get(client), round)
        got = Payload.decode(broadcast)
        for plan in (self.algorithm.deploy(participant, got), self.algorithm.personalise(participant, got)):
            carry_out(plan, participant, self.performer)
        return participant

    def read(self, client: str, broadcast: bytes, round: int, details: bool = False) -> Reading:
        """Score the client's model at home and in common, on test and validation rows; `details`: all that a report shows."""
        if self.watch is not None:
            self.watch(f"{client}: evaluation")
        participant = self.deployed(client, broadcast, round)
        reading, task = Reading(), self.federation.task
        if details:
            slot, view = self.algorithm.used(participant)
            reading.model, reading.arch = participant.models[slot], participant.arch[slot]
            reading.view = view or self.federation.cards[client].preprocess
            at_home = self.algorithm.with_prior(participant, torch.zeros(task.outputs))
            reading.log_prior = at_home.tolist() if bool(at_home.any()) else None
        for name, (rows, home) in READINGS.items():
            y = participant.data(rows, None)["y"]
            if not len(y):
                continue
            logits = self._run(self.algorithm.predict(participant, Rows(rows), home), participant)
            reading.scores[name] = score(task, logits, y)
            if details and name in ("personal", "global") and task.kind != "regression":
                reading.confusion[name] = confusion(task, logits, y).tolist()
                reading.calibration[name] = calibration(task, logits, y)
        return reading

    def predict(self, participant: Participant, rows: Rows, home: bool) -> Tensor:
        """Logits of a deployed client's model."""
        return self._run(self.algorithm.predict(participant, rows, home), participant)

    def _run(self, plan: Plan[Tensor], participant: Participant) -> Tensor:
        return carry_out(plan, participant, self.performer)[0]

    def _telling(self, client: str) -> Callable[[str], None] | None:
        watch = self.watch
        return None if watch is None else lambda label: watch(f"{client}: {label}")
