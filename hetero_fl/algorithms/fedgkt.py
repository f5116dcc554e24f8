"""FedGKT: clients are extractors, the server trains a large model on their features, and both teach one another."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, register_algorithm
from hetero_fl.algorithms.prototypes import CommonFeatureWidth
from hetero_fl.config.clients import ModelConfig, expand_model_name
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import SupervisedDistillation, log_prior
from hetero_fl.core.participant import ClientDirectory, ClientInfo, Participant, floating_tensors
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows, TensorRows
from hetero_fl.utils.errors import UserError
from model_zoo import ModelError

LARGE = "large"  # the server's model, of features
ROWS = ("features", "logits", "labels")


@register_algorithm("fedgkt")
class FedGKT(CommonFeatureWidth):
    """Clients send features, logits and label of every private row; the server trains a large model on those, and each side
    learns from the other's logits (He et al. 2020, Algorithm 1).

    Clients train extractor and head on CE + λ·KL·T² towards the server's logits of their rows, the server its model on the
    same towards theirs, and sends its logits back.

    A client's own model, with features of the common width, is its extractor. An example is read by the server's model on
    the client's features. What each private row gives away is as much as its features tell of it.
    """

    shared = ()
    uploads = {
        name: ItemSpec("rows", "each", private=True, share="features", rows_of="train")
        for name in ROWS
    }
    downloads = {"logits": ItemSpec("rows", share="predictions")}
    tasks = ("multiclass",)
    evaluated_when = "after private training, by the server's model on the client's features (the models saved hold clients' heads)"

    temperature: PositiveFloat = Field(
        3.0, description="T of the softened softmax, at clients and server"
    )
    weight: NonNegativeFloat = Field(
        1.0, description="λ: weight of the other side's logits, at clients and server"
    )
    server_model: Annotated[ModelConfig, BeforeValidator(expand_model_name)] = Field(
        ModelConfig(name="mlp", hidden=[256, 256]),
        description="the large model; it takes features as a table's columns",
    )
    server_epochs: PositiveInt = Field(
        2, description="epochs a round of the large model on all rows that were sent"
    )
    server_batch_size: PositiveInt = Field(64, description="batch of these")
    inference: Literal["server", "client"] = Field(
        "server", description="large model on the features, or own head"
    )

    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        method, notes = super().configure(clients)
        assert isinstance(method, FedGKT)
        try:
            method.large_model(clients.profiles[0].arch.outputs).check()
        except ModelError as error:
            raise UserError(f"algorithm.server_model: {error}") from None
        return method, [
            *notes,
            "fedgkt: features, logits and label of every training row go to the server",
        ]

    def large_model(self, outputs: int) -> ModelSpec:
        """The server's model: features to logits."""
        assert self.feature_dim is not None  # `resolve` has set it
        m = self.server_model
        return ModelSpec.from_config(
            m.name, outputs, (self.feature_dim,), m.feature_dim, m.options, m.pretrained
        )

    def setup(self, server: Participant) -> None:
        server.arch[LARGE] = self.large_model(server.task.outputs)
        server.models[LARGE] = server.arch[LARGE].initial_tensors(server.round_context.seed)

    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        if not recipient.is_evaluation:
            logits = server.state.get("logits", {})
            return {"logits": logits[recipient.client_id]} if recipient.client_id in logits else {}
        read = self.inference == "server" and "logits" in server.state
        return {LARGE: floating_tensors(server.models[LARGE])} if read else {}

    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if LARGE in received:
            client.arch[LARGE], client.models[LARGE] = (
                self.large_model(client.task.outputs),
                received[LARGE],
            )

    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        if "logits" in received:
            taught = SupervisedDistillation(
                client.task.kind, weight=self.weight, temperature=self.temperature
            )
            yield self.fit(
                client, taught, Rows("train", extra_columns={"teacher": received["logits"]})
            )
        else:
            yield self.fit(client)
        if not self.may_share(client, "features"):
            return {}
        features, logits = yield [Predict("model", readout="features"), Predict("model")]
        labels = client.data("train", None)["y"]
        return {
            name: Item(v, kind="rows")
            for name, v in zip(ROWS, (features, logits, labels), strict=True)
        }

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        sent = uploads.having("features")
        if not sent:
            return
        x, teacher, y = (torch.cat([u.payload[name] for u in sent]) for name in ROWS)
        table = {"x": x, "y": y, "teacher": teacher}
        if self.logit_adjustment:  # of whoever sent the row
            table["log_prior"] = torch.cat(
                [self.log_prior_of(server, u.payload["labels"]) for u in sent]
            )
        yield Fit(
            {LARGE: None},
            SupervisedDistillation(
                server.task.kind, slot=LARGE, weight=self.weight, temperature=self.temperature
            ),
            TensorRows(table),
            epochs=self.server_epochs,
            batch_size=self.server_batch_size,
            optimizer=server.optimizer,
            keep=LARGE,
            label="server",
        )
        said = yield [Predict(LARGE, TensorRows({"x": u.payload["features"]})) for u in sent]
        mine = dict(zip((u.client for u in sent), said, strict=True))
        server.state["logits"] = {**server.state.get("logits", {}), **mine}

    @staticmethod
    def log_prior_of(server: Participant, labels: Tensor) -> Tensor:
        """log π of the sender of these labels, a row for each, `[n, C]`."""
        prior = log_prior(server.task, torch.bincount(labels, minlength=server.task.outputs))
        assert prior is not None  # the task is multi-class
        return prior.expand(len(labels), -1)

    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        if LARGE not in client.models:
            return (yield from super().predict(client, rows, personal))
        features = yield Predict("model", rows, readout="features")
        logits = yield Predict(LARGE, TensorRows({"x": features}))
        return self.add_log_prior(client, logits) if personal else logits

    def server_model_slot(self, server: Participant) -> str | None:
        return None  # its model is read at the clients, on their features
