"""Partial sharing and personal models: FedPer, LG-FedAvg, FedBN, FedRep, FedBABU, Ditto.

The first five differ in the part of the model that travels and in when each part is trained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from hetero_fl.algorithms.base import (
    Items,
    SharedPart,
    common_part,
    register_algorithm,
    shared_part,
    upload_model,
)
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.algorithms.local_training import add_log_prior, local_fit
from hetero_fl.core.objectives import Proximal
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Plan, Predict, Rows

BODY = ("backbone.",)
HEAD = ("head.",)


@register_algorithm("fedper")
class FedPer(FedAvg):
    """Average the backbone; each client keeps its own head (Arivazhagan et al. 2019)."""

    title = "FedPer"
    shared = BODY


@register_algorithm("lg_fedavg")
class LGFedAvg(FedAvg):
    """Average the head; each client keeps its own backbone (Liang et al. 2020)."""

    title = "LG-FedAvg"
    shared = HEAD


def fit_part(client: Participant, part: tuple[str, ...], **changes: Any) -> Plan[None]:
    """Train a part of the model alone, if the model has it (`linear` has no backbone)."""
    if any(n.startswith(part) for n in client.arch["model"].parameter_names):
        yield replace(local_fit(client, **changes), train={"model": part})


@register_algorithm("fedbn")
class FedBN(FedAvg):
    """Average all but BatchNorm: each client keeps these layers, fitted to how its data looks.

    These are whole layers (Li et al. 2021, Algorithm 1), or their statistics alone (Andreux et al. 2020, SiloBN). Averaging `parameters()` alone comes to the latter. BatchNorm is found by type; a model without any is averaged as under
    FedAvg.
    """

    title = "FedBN"

    keep: Literal["layers", "statistics"] = Field(
        "layers",
        description="all of a BatchNorm layer stays, or its running mean and variance only",
    )

    @property
    def shared(self) -> SharedPart:  # type: ignore[override]  # follows from a setting
        """All of the model but its BatchNorm layers, or their statistics."""
        return SharedPart(local="batch_norm" if self.keep == "layers" else "batch_norm_statistics")


@register_algorithm("fedrep")
class FedRep(FedPer):
    """Average the backbone; train the head on it first, then the backbone under the new head.

    Each client keeps its head (Collins et al. 2021, Algorithm 1).
    """

    title = "FedRep"

    head_epochs: PositiveInt | None = Field(
        None, description="local epochs of the head; none: the client's own `epochs` or `steps`"
    )
    body_epochs: PositiveInt = Field(1, description="local epochs of the backbone, after the head")

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        epochs: dict[str, Any] = {} if self.head_epochs is None else {"epochs": self.head_epochs}
        yield from fit_part(client, HEAD, label="head", **epochs)
        yield from fit_part(client, BODY, epochs=self.body_epochs)
        return upload_model(self, client, self.weight_of(client))


@register_algorithm("fedbabu")
class FedBABU(FedPer):
    """Train and average the backbone alone; each client fine-tunes a copy of the model before it is used.

    All clients have the head that they began with (Oh et al. 2022, Algorithm 1 and section 5).
    """

    title = "FedBABU"
    evaluated_when = "after aggregation and fine-tuning of the client's copy, on the global test set too (the server's own: before it)"

    finetune_epochs: PositiveInt = Field(
        5, description="epochs on the client's own rows before its model is used"
    )
    finetune: Literal["all", "head"] = Field(
        "all", description="what fine-tuning moves: the whole model, or the head"
    )

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        yield from self.deploy(client, received)
        yield from fit_part(client, BODY)
        return upload_model(self, client, self.weight_of(client))

    def personalize(self, client: Participant, received: Payload) -> Plan[None]:
        part = None if self.finetune == "all" else HEAD
        fit = local_fit(
            client, epochs=self.finetune_epochs, label="personalise"
        )  # style: ok (label of a random stream)
        yield replace(fit, train={"model": part})

    def server_model(self, server: Participant) -> str | None:
        is_trained = any(
            common_part(shared_part(self, profile.settings), BODY)
            for profile in server.peers.profiles
        )
        # all clients have the same head
        return next(iter(server.models)) if is_trained and len(server.models) == 1 else None


PERSONAL = "personal"


@register_algorithm("ditto")
class Ditto(FedAvg):
    """Average parameters; each client also trains a personal model that is held close to the shared one.

    The personal model v is trained on loss + (λ/2)‖v − θ‖², θ the model as received (Li et al. 2021, Algorithm 1). It begins
    as the first model received and never leaves. On local tests the personal model is evaluated, on the global test the
    shared one; a client that has never trained uses the shared one for both.
    """

    title = "Ditto"
    evaluated_when = "personal model on local tests, the shared one on the global test, after aggregation (the models saved are personal)"

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
        objective = Proximal(client.task.kind, PERSONAL, mu=self.weight)
        context = {"anchor": client.models["model"]}
        epochs: dict[str, Any] = (
            {} if self.personal_epochs is None else {"epochs": self.personal_epochs}
        )
        personal = local_fit(client, objective, context=context, label=PERSONAL, **epochs)
        yield [local_fit(client), replace(personal, train={PERSONAL: None})]
        return upload_model(self, client, self.weight_of(client))

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        if not personal:
            return (yield Predict("model", rows))
        return add_log_prior(client, (yield Predict(PERSONAL, rows)))
