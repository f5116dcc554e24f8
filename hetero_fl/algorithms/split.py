"""FedGKT: mutual distillation between client models and a large model at the server."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.uploads import Upload, Uploads
from hetero_fl.algorithms.base import Algorithm, Needs, register_algorithm
from hetero_fl.algorithms.prediction import adjust_to_labels
from hetero_fl.algorithms.prototypes import CommonFeatureWidth, require_sent_state
from hetero_fl.algorithms.round_parts import (
    Items,
    add_model,
    local_fit,
    may_share,
)
from hetero_fl.config.clients import ModelConfig, expand_model_name
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import SupervisedDistillation, log_prior
from hetero_fl.core.participant import ClientDirectory, ClientInfo, Participant, floating_tensors
from hetero_fl.core.payload import ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows, TensorRows
from hetero_fl.utils.errors import UserError
from model_zoo import ModelError

# Slot of the server's model, whose inputs are features.
LARGE = "large"
# Shapes of the uploaded items, keyed by name.
UPLOADED = {"features": "`[n_k, d]`", "logits": "`[n_k, C]`", "labels": "`[n_k]`"}
# Columns of the server's training set, keyed by the name of the uploaded item.
COLUMNS = {"features": "x", "logits": "teacher", "labels": "y"}


@register_algorithm("fedgkt")
class FedGKT(CommonFeatureWidth):
    """Train a large server model on clients' features, with mutual distillation of logits.

    Clients minimize CE + λ·KL·T², where the server's logits of the client's rows are the teacher.
    Clients then upload the features, logits and label of every training row. The server trains its
    model on all features with the same loss, where the clients' logits are the teacher, and sends
    its own logits back (He et al. 2020, Algorithm 1). For evaluation, clients receive the large
    model. A client that missed rounds receives the logits of its last round of participation.

    Uploaded features and labels reveal information about each training row. Clients without
    `features` in `shares` upload nothing. Use this method where clients have little compute and the
    server may see features.

    Deviations: the inputs of the server's model are feature vectors, whereas the paper uses feature
    maps, and the models of clients may differ. The feature extractor is the backbone of a client's
    model, whose features have the common width.

    References:
        He et al., "Group Knowledge Transfer: Federated Learning of Large CNNs at the Edge", NeurIPS
            2020. https://arxiv.org/abs/2007.14513

    Example:
        >>> from hetero_fl.algorithms import FedGKT
        >>> method = FedGKT(large_model={"name": "mlp", "hidden": [512]})
        >>> list(method.uploads), method.uploads["features"].needed_share
        (['features', 'logits', 'labels'], 'features')
    """

    title = "FedGKT"
    _renamed = {"server_model": "large_model"}
    evaluated_when = (
        "after local training, by the server's model on the client's features (saved models: with "
        "clients' heads)"
    )
    shared = ()
    uploads = {
        name: ItemSpec(
            "rows",
            "each",
            private=True,
            share="features",
            rows_of="train",
            description=f"{name} of the training rows, {shape}",
        )
        for name, shape in UPLOADED.items()
    }
    downloads = {
        "logits": ItemSpec(
            "rows",
            share="predictions",
            description="the server's logits of the client's training rows, `[n_k, C]`",
        ),
        LARGE: ItemSpec(
            "params", description="parameters and buffers of the server's model, for evaluation"
        ),
    }

    temperature: PositiveFloat = Field(
        3.0, description="temperature T of the softmax, at clients and server"
    )
    weight: NonNegativeFloat = Field(
        1.0, description="weight λ of the distillation loss, at clients and server"
    )
    large_model: Annotated[ModelConfig, BeforeValidator(expand_model_name)] = Field(
        ModelConfig(name="mlp", hidden=[256, 256]),
        description="the server's model, which takes features as the columns of a table",
    )
    server_epochs: PositiveInt = Field(
        2, description="epochs per round of the large model on the uploaded rows"
    )
    server_batch_size: PositiveInt = Field(64, description="batch size of the large model")
    inference: Literal["server", "client"] = Field(
        "server", description="predict with the large model, or with the client's head"
    )

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # depends on a setting
        """Requirements of the method: one feature width for all clients."""
        by_server = self.inference == "server"
        return Needs(
            tasks=("multiclass",),
            also=("one feature width",),
            shared_model=by_server,
            unused_options=("fine_tune_epochs",) if by_server else (),
        )

    @override
    def configure(self, clients: ClientDirectory) -> tuple[Algorithm, list[str]]:
        method, notes = super().configure(clients)
        assert isinstance(method, FedGKT)
        large = method.large_model_spec(clients.profiles[0].arch.outputs)
        try:
            large.check()
        except ModelError as error:
            raise UserError(f"algorithm.large_model: {error}") from None
        if self.inference == "server":
            require_sent_state("algorithm.large_model", large)
        note = "fedgkt uploads the features, logits and label of every training row to the server"
        return method, [*notes, note]

    def large_model_spec(self, outputs: int) -> ModelSpec:
        """Return the specification of the server's model, which maps features to logits."""
        assert self.feature_dim is not None, "set by configure"
        config = self.large_model
        return ModelSpec.from_config(
            config.name,
            outputs,
            (self.feature_dim,),
            config.feature_dim,
            config.options,
            pretrained=config.pretrained,
        )

    @override
    def setup(self, server: Participant) -> None:
        add_model(server, LARGE, self.large_model_spec(server.task.outputs))

    @override
    def broadcast(self, server: Participant, recipient: ClientInfo) -> Items:
        if recipient.purpose == "train":
            logits = server.state.get("logits", {})
            return {"logits": logits[recipient.client_id]} if recipient.client_id in logits else {}
        is_used = self.inference == "server" and "logits" in server.state
        return {LARGE: floating_tensors(server.models[LARGE])} if is_used else {}

    @override
    def deploy(self, client: Participant, received: Payload) -> Plan[None]:
        yield from super().deploy(client, received)
        if LARGE in received:
            add_model(client, LARGE, self.large_model_spec(client.task.outputs), received[LARGE])

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        if "logits" in received:
            objective = SupervisedDistillation(weight=self.weight, temperature=self.temperature)
            rows = Rows("train", extra_columns={"teacher": received["logits"]})
            yield local_fit(client, objective, rows)
        else:
            yield local_fit(client)
        if not may_share(client, "features"):
            return {}
        features, logits = yield [Predict("model", readout="features"), Predict("model")]
        return {"features": features, "logits": logits, "labels": client.data("train", None)["y"]}

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        sent = uploads.containing("features")
        if not sent:
            return
        table = {
            column: torch.cat([u.payload[name] for u in sent]) for name, column in COLUMNS.items()
        }
        if any(u.client_info.settings.logit_adjustment for u in sent):
            table["log_prior"] = torch.cat([self.log_prior_of(server, u) for u in sent])
        yield Fit(
            {LARGE: None},
            SupervisedDistillation(slot=LARGE, weight=self.weight, temperature=self.temperature),
            TensorRows(table),
            epochs=self.server_epochs,
            batch_size=self.server_batch_size,
            optimizer=server.optimizer,
            keep=LARGE,
            label="server",
        )
        predictions = yield [Predict(LARGE, TensorRows({"x": u.payload["features"]})) for u in sent]
        logits = server.state.setdefault("logits", {})
        logits.update(zip((u.client for u in sent), predictions, strict=True))

    @staticmethod
    def log_prior_of(server: Participant, upload: Upload) -> Tensor:
        """Return a client's log class prior, repeated for each uploaded row, shape `[n, C]`.

        All values are 0 if the client does not use logit adjustment.
        """
        labels = upload.payload["labels"]
        counts = torch.bincount(labels, minlength=server.task.outputs)
        prior = log_prior(server.task, counts)
        if prior is None or not upload.client_info.settings.logit_adjustment:
            prior = torch.zeros(len(counts), device=counts.device)
        return prior.expand(len(labels), -1)

    @override
    def predict(self, client: Participant, rows: Rows, personal: bool) -> Plan[Tensor]:
        if LARGE not in client.models:
            return (yield from super().predict(client, rows, personal))
        features = yield Predict("model", rows, readout="features")
        logits = yield Predict(LARGE, TensorRows({"x": features}))
        return adjust_to_labels(self, client, logits, personal)
