"""Partial sharing and personal models: FedPer, LG-FedAvg, FedBN, FedRep, FedBABU, Ditto."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from hetero_fl.algorithms.base import Items, register_algorithm
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import Proximal
from hetero_fl.core.participant import Participant, common_part
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Plan, Predict, Rows

# Partial sharing: one mechanism, told apart by the part of the model that travels and by when each
# part is trained.

BODY = ("backbone.",)
HEAD = ("head.",)


@register_algorithm("fedper")
class FedPer(FedAvg):
    """The backbone is averaged, each client keeps its own head (Arivazhagan et al. 2019)."""

    shared = BODY

    def fit_part(self, client: Participant, part: tuple[str, ...], **changes: Any) -> Plan[None]:
        """Local training of that part alone; none where the model has nothing in it (`linear` has no backbone)."""
        if any(n.startswith(part) for n in client.arch["model"].parameter_names):
            yield replace(self.fit(client, **changes), train={"model": part})


@register_algorithm("lg_fedavg")
class LGFedAvg(FedAvg):
    """The head is averaged, each client keeps its own backbone (Liang et al. 2020, LG-FedAvg)."""

    shared = HEAD


@register_algorithm("fedbn")
class FedBN(FedAvg):
    """All but BatchNorm is averaged: each client keeps these layers (Li et al. 2021, Algorithm 1), or their statistics alone
    (Andreux et al. 2020, SiloBN).

    Averaging `parameters()` alone comes to the latter. BatchNorm is found by type; a model without any is averaged as under
    FedAvg.
    """

    keep: Literal["layers", "statistics"] = Field(
        "layers",
        description="all of a BatchNorm layer stays, or its running mean and variance only",
    )

    def local_tensor_names(self, arch: ModelSpec) -> frozenset[str]:
        names = arch.batch_norm_names
        return names if self.keep == "layers" else names - arch.parameter_names

    def server_model_slot(self, server: Participant) -> str | None:
        slot = super().server_model_slot(server)
        # its BatchNorm was never trained
        return None if slot is None or self.local_tensor_names(server.arch[slot]) else slot


@register_algorithm("fedrep")
class FedRep(FedPer):
    """As FedPer, each part trained by itself: the head on the backbone as received, then the backbone under the new head
    (Collins et al. 2021, Algorithm 1)."""

    head_epochs: PositiveInt | None = Field(
        None, description="local epochs of the head; none: the client's own `epochs` or `steps`"
    )
    body_epochs: PositiveInt = Field(1, description="local epochs of the backbone, after the head")

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        epochs: dict[str, Any] = {} if self.head_epochs is None else {"epochs": self.head_epochs}
        yield from self.fit_part(client, HEAD, label="head", **epochs)
        yield from self.fit_part(client, BODY, epochs=self.body_epochs)
        return self.share(client)


@register_algorithm("fedbabu")
class FedBABU(FedPer):
    """The backbone alone is trained, under the head that all began with, and averaged; whoever uses the model fine-tunes it
    on its own rows first (Oh et al. 2022, Algorithm 1 and section 5)."""

    evaluated_when = "after aggregation and fine-tuning of the client's copy, in common too (the server's own: before it)"

    finetune_epochs: PositiveInt = Field(
        5, description="epochs on the client's own rows before its model is used"
    )
    finetune: Literal["all", "head"] = Field(
        "all", description="what fine-tuning moves: the whole model, or the head"
    )

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        yield from self.fit_part(client, BODY)
        return self.share(client)

    def personalize(self, client: Participant, received: Payload) -> Plan[None]:
        part = None if self.finetune == "all" else HEAD
        yield replace(
            self.fit(client, epochs=self.finetune_epochs, label="personalise"),
            train={"model": part},
        )

    def server_model_slot(self, server: Participant) -> str | None:
        trained = any(
            common_part(self.shared_part(kind.settings), BODY) for kind in server.peers.profiles
        )
        # the head is everybody's
        return next(iter(server.models)) if trained and len(server.models) == 1 else None


# Ditto: a personal model beside the shared one, held near it.

PERSONAL = "personal"


@register_algorithm("ditto")
class Ditto(FedAvg):
    """FedAvg, and at each client a personal model v trained on loss + (λ/2)‖v − θ‖², θ the model as received (Li et al. 2021,
    Algorithm 1).

    The personal model begins as the first model received and never leaves. It is read at home, the shared one in common;
    a client that has never trained reads the shared one.
    """

    evaluated_when = "personal model at home, the shared one in common, after aggregation (the models saved are personal)"

    weight: NonNegativeFloat = Field(
        0.1, description="λ: how strongly the personal model is held to the shared one"
    )
    personal_epochs: PositiveInt | None = Field(
        None,
        description="local epochs of the personal model; none: the client's own `epochs` or `steps`",
    )

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        client.arch[PERSONAL] = client.arch["model"]
        client.models.setdefault(PERSONAL, client.models["model"])

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        towards = Proximal(client.task.kind, PERSONAL, mu=self.weight)
        given = {"anchor": client.models["model"]}
        epochs: dict[str, Any] = (
            {} if self.personal_epochs is None else {"epochs": self.personal_epochs}
        )
        personal = self.fit(client, towards, context=given, label=PERSONAL, **epochs)
        yield [self.fit(client), replace(personal, train={PERSONAL: None})]
        return self.share(client)

    def inference_model(self, client: Participant) -> tuple[str, None]:
        return PERSONAL, None

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        if personal:
            return (yield from super().predict(client, rows, personal))
        return (yield Predict("model", rows))
