"""Ditto: a personal model beside the shared one, held near it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from hetero_fl.algorithms.base import Items, algorithm
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.objectives import Proximal
from hetero_fl.payload import Payload
from hetero_fl.plan import Plan, Predict, Rows
from hetero_fl.state import Participant

PERSONAL = "personal"


@algorithm("ditto")
class Ditto(FedAvg):
    """FedAvg, and at each client a personal model v trained on loss + (λ/2)‖v − θ‖², θ the model as received (Li et al. 2021,
    Algorithm 1).

    The personal model begins as the first model received and never leaves. It is read at home, the shared one in common;
    a client that has never trained reads the shared one.
    """

    reads = "personal model at home, the shared one in common, after aggregation (the models saved are personal)"

    weight: NonNegativeFloat = Field(0.1, description="λ: how strongly the personal model is held to the shared one")
    personal_epochs: PositiveInt | None = Field(
        None, description="local epochs of the personal model; none: the client's own `epochs` or `steps`"
    )

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        yield from super().deploy(client, got)
        client.arch[PERSONAL] = client.arch["model"]
        client.models.setdefault(PERSONAL, client.models["model"])

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from self.deploy(client, got)
        towards = Proximal(client.task.kind, PERSONAL, mu=self.weight)
        given = {"anchor": client.models["model"]}
        epochs: dict[str, Any] = {} if self.personal_epochs is None else {"epochs": self.personal_epochs}
        personal = self.fit(client, towards, given=given, label=PERSONAL, **epochs)
        yield [self.fit(client), replace(personal, train={PERSONAL: None})]
        return self.share(client)

    def used(self, client: Participant) -> tuple[str, None]:
        return PERSONAL, None

    def predict(self, client: Participant, rows: Rows, home: bool) -> Plan[Tensor]:
        if home:
            return (yield from super().predict(client, rows, home))
        return (yield Predict("model", rows))
