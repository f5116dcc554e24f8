"""HeteroFL: one wide model at the server, of which each client trains a leading slice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from hetero_fl.aggregation.averaging import corner, corner_means, step
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, algorithm
from hetero_fl.algorithms.family import choose_model, choose_widths, told
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.architecture import Architecture, Tensors
from hetero_fl.config.clients import ModelConfig, named
from hetero_fl.errors import UserError
from hetero_fl.objectives import Masked
from hetero_fl.payload import Item, ItemSpec, Payload
from hetero_fl.plan import Plan, Predict, Rows
from hetero_fl.state import Card, Participant
from model_zoo import narrow

HEAD = ("head.weight", "head.bias")


@algorithm("heterofl")
class HeteroFL(FedAvg):
    """Each client trains the leading channels of one wide model; each element of it becomes the mean over the clients whose
    slice it is in (Diao et al. 2021, Algorithm 1).

    BatchNorm is static: batches normalise themselves, its scales and shifts are averaged, and statistics, which differ by
    width, stay with the client, as it reads its own narrow model. The scaler acts then, too, for the same reason.
    """

    uploads = {"model": ItemSpec("params"), "head": ItemSpec("params", private=True)}

    one_by_one = True

    model: Annotated[ModelConfig, BeforeValidator(named)] | None = Field(
        None,
        description="the wide model; none: the most frequent kind that the clients run and that can be narrowed, its widest",
    )
    widths: dict[str, float] | list[float] | None = Field(
        None,
        description="share of the wide model's channels by id or pattern, or in turn; none: as wide as its own model is",
    )
    scaler: bool = Field(True, description="divide what a narrow model's layers give by its share of the width")
    masked: bool = Field(
        False, description="hold the logits of classes that a client lacks at nought, and average their rows without it"
    )

    def resolve(self, cards: Mapping[str, Card]) -> tuple[Algorithm, list[str]]:
        model = self.model or choose_model(cards)
        widths = choose_widths(self.widths, model, cards)
        views = sorted({card.arch.input_shape for card in cards.values()})
        if self.masked and len(views) > 1:
            raise UserError(
                f"algorithm.masked: clients see examples of {len(views)} shapes ({views[0]} and {views[1]}), "
                "whose models are averaged apart; masked is for one"
            )
        return self.model_copy(update={"model": model, "widths": widths}), told(model, widths)

    # The family ----------------------------------------------------------------------------------------------------
    def wide(self, arch: Architecture) -> Architecture:
        """The wide model for what a client with this one sees."""
        assert self.model is not None  # `resolve` has set it
        m = self.model
        return Architecture.of(m.name, arch.outputs, arch.input_shape, m.feature_dim, m.options)

    def architecture(self, card: Card) -> Architecture:
        assert isinstance(self.widths, dict)
        wide, share = self.wide(card.arch), self.widths[card.id]
        if share == 1:
            return wide
        name, options = narrow(wide.name, dict(wide.options), share, self.scaler)
        return Architecture.of(name, wide.outputs, wide.input_shape, wide.feature_dim, options)

    def family(self, card: Card) -> str:
        return self.wide(card.arch).id

    def stays(self, arch: Architecture) -> frozenset[str]:
        return arch.batch_norm_names - arch.parameter_names

    # The round -----------------------------------------------------------------------------------------------------
    def start(self, server: Participant) -> None:
        server.arch = {arch.id: arch for arch in (self.wide(card.arch) for card in server.peers.values())}
        server.models = {id: server.arch[id].initial(server.clock.seed) for id in sorted(server.arch)}

    def broadcast(self, server: Participant, card: Card) -> Items:
        items = super().broadcast(server, card)
        return {name: {n: corner(t, card.arch.shapes[n]) for n, t in wide.items()} for name, wide in items.items()}

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from self.deploy(client, got)
        if self.masks(client):
            yield self.fit(client, Masked(client.task.kind), given={"present": self.present(client)})
        else:
            yield self.fit(client)
        return self.share(client)

    def masks(self, client: Participant) -> bool:
        """Whether the mask means anything for this task."""
        return self.masked and client.task.kind == "multiclass"

    @staticmethod
    def present(client: Participant) -> Tensor:
        """1 for each class that the client has rows of, else 0, `[C]`; all 1 where it may not tell."""
        has = (
            client.counts > 0
            if "statistics" in client.settings.shares
            else torch.ones_like(client.counts, dtype=torch.bool)
        )
        return has.to(torch.get_default_dtype())

    def share(self, client: Participant) -> Items:
        items = super().share(client)
        if not items or not self.masks(client) or HEAD[0] not in items["model"].values:
            return items
        model = dict(items["model"].values)
        weight, bias = model.pop(HEAD[0]), model.pop(HEAD[1])
        width = self.wide(client.arch["model"]).shapes[HEAD[0]][1]
        # As wide as the wide head, so that heads of all widths add up: bias last, no weight where the client owns nothing.
        values, say = weight.new_zeros(2, len(bias), width + 1)
        values[:, : weight.shape[1]], values[:, width] = weight, bias
        say[:, : weight.shape[1]], say[:, width] = 1, 1
        say *= self.weight_of(client) * self.present(client)[:, None]
        return {"model": replace(items["model"], values=model), "head": Item(values, say, "params")}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        weights: dict[str, float] = {}
        families: dict[str, dict[str, None]] = {}
        for card in uploads.senders("model"):
            weights[card.arch.id] = weights.get(card.arch.id, 0.0) + self.weight_of(card)
            families.setdefault(self.family(card), {})[card.arch.id] = None
        means, head = uploads.mean_by_group("model"), uploads.mean("head")
        for family, groups in families.items():
            model = server.models[family]
            mean = corner_means(model, [(means[group], weights[group]) for group in groups])
            if head is not None:
                mean |= self.heads(model, head, uploads.total("head")[1])
            server.models[family] = step(model, mean, self.server_lr, server.arch[family].parameter_names)
        yield from ()

    @staticmethod
    def heads(model: Tensors, mean: Tensor, weight: Tensor) -> Tensors:
        """The head's means, where anybody had a say."""
        width = mean.shape[1] - 1
        now = torch.cat([model[HEAD[0]], model[HEAD[1]][:, None]], 1)
        new = torch.where(weight > 0, mean, now)
        return {HEAD[0]: new[:, :width].clone(), HEAD[1]: new[:, width].clone()}

    # Reading -------------------------------------------------------------------------------------------------------
    def predict(self, client: Participant, rows: Rows, home: bool) -> Plan[Tensor]:
        if not home or not self.masks(client):
            return (yield from super().predict(client, rows, home))
        logits = yield Predict("model", rows)
        return self.with_prior(client, logits * self.present(client))

    def server_slot(self, server: Participant) -> str | None:
        slot = super().server_slot(server)
        return None if slot is None or self.stays(server.arch[slot]) else slot  # its statistics are nobody's
