"""HeteroFL: one wide model at the server, of which each client trains a leading slice."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from hetero_fl.aggregation.averaging import corner, corner_means, step
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Algorithm, Items, algorithm
from hetero_fl.algorithms.family import choose_model, choose_widths, derived, slice_name, told
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.algorithms.masked_head import HEAD, packed, unpacked
from hetero_fl.architecture import Architecture
from hetero_fl.config.clients import ModelConfig, named
from hetero_fl.errors import UserError
from hetero_fl.objectives import Masked
from hetero_fl.payload import Item, ItemSpec, Payload
from hetero_fl.plan import Plan, Predict, Rows
from hetero_fl.state import Card, Participant, Roster
from model_zoo import narrow


@algorithm("heterofl")
class HeteroFL(FedAvg):
    """Train leading slices of one wide model; average each element over its owners (Diao et al. 2021, Algorithm 1).

    Each owner counts once, as in the authors' code. Deviation: the mask of absent classes is off by default. BatchNorm is
    static: batches are normalized by their own statistics, which differ by width and stay with the client; scales and shifts
    are averaged. Each client is evaluated with its own narrow model, so the scaler is applied there as well.
    """

    uploads = {"model": ItemSpec("params"), "head": ItemSpec("params", private=True)}
    requires = ("one model family",)

    weighting: Literal["uniform", "samples"] = Field("uniform", description="each owner counts once, or as n_k")
    model: Annotated[ModelConfig, BeforeValidator(named)] | None = Field(
        None, description="the wide model; none: the clients' most frequent kind that can be narrowed, its widest"
    )
    widths: dict[str, float] | list[float] | None = Field(
        None,
        description="share of the wide model's channels by id or pattern, or in turn; none: as wide as its own model is",
    )
    scaler: bool = Field(True, description="divide what a narrow model's layers give by its share of the width")
    masked: bool = Field(
        False, description="hold the logits of classes that a client lacks at nought, and average their rows without it"
    )

    @property
    def one_by_one(self) -> bool:
        return self.widths is not None

    def resolve(self, cards: Roster) -> tuple[Algorithm, list[str]]:
        model = self.model or choose_model(cards)
        widths = choose_widths(self.widths, model, cards)
        views = sorted({kind.arch.input_shape for kind in cards.kinds})
        if self.masked and len(views) > 1:
            raise UserError(
                f"algorithm.masked: clients see examples of {len(views)} shapes, averaged apart; it is for one: {views}"
            )
        return self.model_copy(update={"model": model, "widths": widths}), told(model, widths, cards)

    # The family ----------------------------------------------------------------------------------------------------
    def wide(self, arch: Architecture) -> Architecture:
        """The wide model for what a client with this one sees."""
        assert self.model is not None  # `resolve` has set it
        m = self.model
        about = (m.feature_dim, m.options)
        return Architecture.of(m.name, arch.outputs, arch.input_shape, *about, vocabulary=arch.vocabulary)

    def architecture(self, card: Card) -> Architecture:
        assert self.model is not None and not isinstance(self.widths, list)  # `resolve` has set them
        wide = self.wide(card.arch)
        if (share := derived(card.arch, self.model) if self.widths is None else self.widths[card.id]) == 1:
            return wide
        name, options = narrow(wide.name, dict(wide.options), share, self.scaler)
        return replace(wide, name=name, options=tuple(sorted(options.items())))

    def called(self, card: Card) -> str:
        return slice_name(card, self.wide(card.arch), self.widths)

    def family(self, card: Card) -> str:
        return self.wide(card.arch).id

    def stays(self, arch: Architecture) -> frozenset[str]:
        return arch.batch_norm_names - arch.parameter_names

    # The round -----------------------------------------------------------------------------------------------------
    def start(self, server: Participant) -> None:
        server.arch = {arch.id: arch for arch in (self.wide(kind.arch) for kind in server.peers.kinds)}
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
        all_ = torch.ones(len(client.counts))
        return (client.counts > 0).to(all_.dtype) if "statistics" in client.settings.shares else all_

    def share(self, client: Participant) -> Items:
        items = super().share(client)
        if not items or not self.masks(client) or HEAD[0] not in items["model"].values:
            return items
        model = dict(items["model"].values)
        width, say = self.wide(client.arch["model"]).shapes[HEAD[0]][1], self.weight_of(client) * self.present(client)
        values, say = packed(model.pop(HEAD[0]), model.pop(HEAD[1]), width, say)
        return {"model": replace(items["model"], values=model), "head": Item(values, say, "params")}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        weights: dict[str, float] = {}
        families: dict[str, dict[str, None]] = {}
        for card, worth in zip(uploads.senders("model"), uploads.worths("model"), strict=True):
            weights[card.arch.id] = weights.get(card.arch.id, 0.0) + worth * self.weight_of(card)
            families.setdefault(self.family(card), {})[card.arch.id] = None
        means, head = uploads.mean_by_group("model"), uploads.mean("head")
        for family, groups in families.items():
            model = server.models[family]
            mean = corner_means(model, [(means[group], weights[group]) for group in groups])
            if head is not None:
                mean |= unpacked(model, head, uploads.total("head")[1])
            server.models[family] = step(model, mean, self.server_lr, server.arch[family].parameter_names)
        yield from ()

    def predict(self, client: Participant, rows: Rows, home: bool) -> Plan[Tensor]:
        if not home or not self.masks(client):
            return (yield from super().predict(client, rows, home))
        return self.with_prior(client, (yield Predict("model", rows)) * self.present(client))

    def server_slot(self, server: Participant) -> str | None:
        slot = super().server_slot(server)
        return None if slot is None or self.stays(server.arch[slot]) else slot  # its statistics are nobody's
