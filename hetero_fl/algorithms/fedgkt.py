"""FedGKT: clients are extractors, the server trains a large model on their features, and both teach one another."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, algorithm
from hetero_fl.algorithms.prototypes import CommonWidth
from hetero_fl.config.clients import ModelConfig, named
from hetero_fl.core.model_spec import Architecture
from hetero_fl.core.objectives import Taught, log_prior
from hetero_fl.core.participant import Card, Participant, Roster, floats
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows, Table
from hetero_fl.utils.errors import UserError
from model_zoo import ModelError

LARGE = "large"  # the server's model, of features
ROWS = ("features", "logits", "labels")


@algorithm("fedgkt")
class FedGKT(CommonWidth):
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
    reads = "after private training, by the server's model on the client's features (the models saved hold clients' heads)"

    temperature: PositiveFloat = Field(
        3.0, description="T of the softened softmax, at clients and server"
    )
    weight: NonNegativeFloat = Field(
        1.0, description="λ: weight of the other side's logits, at clients and server"
    )
    server_model: Annotated[ModelConfig, BeforeValidator(named)] = Field(
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

    def resolve(self, cards: Roster) -> tuple[Algorithm, list[str]]:
        method, notes = super().resolve(cards)
        assert isinstance(method, FedGKT)
        try:
            method.large(cards.kinds[0].arch.outputs).check()
        except ModelError as error:
            raise UserError(f"algorithm.server_model: {error}") from None
        return method, [
            *notes,
            "fedgkt: features, logits and label of every training row go to the server",
        ]

    def large(self, outputs: int) -> Architecture:
        """The server's model: features to logits."""
        assert self.feature_dim is not None  # `resolve` has set it
        m = self.server_model
        return Architecture.of(
            m.name, outputs, (self.feature_dim,), m.feature_dim, m.options, m.pretrained
        )

    def start(self, server: Participant) -> None:
        server.arch[LARGE] = self.large(server.task.outputs)
        server.models[LARGE] = server.arch[LARGE].initial(server.clock.seed)

    def broadcast(self, server: Participant, card: Card) -> Items:
        if not card.reading:
            logits = server.state.get("logits", {})
            return {"logits": logits[card.id]} if card.id in logits else {}
        read = self.inference == "server" and "logits" in server.state
        return {LARGE: floats(server.models[LARGE])} if read else {}

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        yield from super().deploy(client, got)
        if LARGE in got:
            client.arch[LARGE], client.models[LARGE] = self.large(client.task.outputs), got[LARGE]

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        if "logits" in got:
            taught = Taught(client.task.kind, weight=self.weight, temperature=self.temperature)
            yield self.fit(client, taught, Rows("train", beside={"teacher": got["logits"]}))
        else:
            yield self.fit(client)
        if not self.gives(client, "features"):
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
                [self.prior_of(server, u.payload["labels"]) for u in sent]
            )
        yield Fit(
            {LARGE: None},
            Taught(server.task.kind, slot=LARGE, weight=self.weight, temperature=self.temperature),
            Table(table),
            epochs=self.server_epochs,
            batch_size=self.server_batch_size,
            optimizer=server.optimizer,
            keep=LARGE,
            label="server",
        )
        said = yield [Predict(LARGE, Table({"x": u.payload["features"]})) for u in sent]
        mine = dict(zip((u.client for u in sent), said, strict=True))
        server.state["logits"] = {**server.state.get("logits", {}), **mine}

    @staticmethod
    def prior_of(server: Participant, labels: Tensor) -> Tensor:
        """log π of the sender of these labels, a row for each, `[n, C]`."""
        prior = log_prior(server.task, torch.bincount(labels, minlength=server.task.outputs))
        assert prior is not None  # the task is multi-class
        return prior.expand(len(labels), -1)

    def predict(self, client: Participant, rows: Rows, home: bool) -> Plan[Tensor]:
        if LARGE not in client.models:
            return (yield from super().predict(client, rows, home))
        features = yield Predict("model", rows, readout="features")
        logits = yield Predict(LARGE, Table({"x": features}))
        return self.with_prior(client, logits) if home else logits

    def server_slot(self, server: Participant) -> str | None:
        return None  # its model is read at the clients, on their features
