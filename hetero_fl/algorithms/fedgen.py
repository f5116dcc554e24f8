"""FedGen: a generator of features, made at the server from the clients' heads, goes with the averaged model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, algorithm
from hetero_fl.algorithms.fedavg import FedAvg
from hetero_fl.algorithms.width import CommonHead
from hetero_fl.architecture import Architecture
from hetero_fl.config.optimizer import OptimizerConfig
from hetero_fl.latent import FromGenerator, Generate
from hetero_fl.payload import Item, ItemSpec, Payload
from hetero_fl.plan import Draws, Fit, Plan
from hetero_fl.state import Card, Columns, Participant, floats

GENERATOR = "generator"


@algorithm("fedgen")
class FedGen(CommonHead, FedAvg):
    """FedAvg within each architecture, and a generator G(y, ε) of features from which clients learn beside their own rows
    (Zhu et al. 2021, Algorithm 1).

    The server trains G to make what the clients' heads take for class y, each head weighted by its client's share of that
    class. Classes are drawn by their frequency among the round's clients.

    Heads of all architectures teach the one generator. A client that does not release its label counts speaks as if its
    rows were spread evenly; one that keeps its head does not teach. G: linear, BatchNorm, ReLU, linear. The authors' code
    takes weight 10 and latent_weight 10, both with decay 0.98.
    """

    features_leave = False  # G makes its own
    uploads = {
        "model": ItemSpec("params", use="each"),
        "counts": ItemSpec("counts", use="each", private=True, share="statistics"),
    }
    tasks = ("multiclass",)

    weight: NonNegativeFloat = Field(1.0, description="α: weight of the loss on drawn features, at the client")
    latent_weight: NonNegativeFloat = Field(
        0.0, description="β: weight of KL from the head's word on features drawn for the batch's own classes"
    )
    decay: float = Field(1.0, gt=0, le=1, description="factor on both weights from round to round")
    diversity: NonNegativeFloat = Field(1.0, description="η: weight of the diversity term, at the server")
    generator_steps: PositiveInt = Field(50, description="steps a round of the generator")
    generator_lr: PositiveFloat = Field(3e-4, description="learning rate of Adam for the generator")
    generator_hidden: PositiveInt = Field(256, description="units in the generator")
    generator_batch_size: PositiveInt = Field(32, ge=2, description="features drawn a step, at server and clients")
    noise_dim: PositiveInt = Field(32, description="width of the generator's noise ε, standard normal")

    def generator(self, classes: int) -> Architecture:
        """From class and noise to features."""
        options = {"hidden": [self.generator_hidden], "norm": "batch"}
        return Architecture.of("mlp", self.feature_dim or 1, (classes + self.noise_dim,), options=options)

    def start(self, server: Participant) -> None:
        server.arch[GENERATOR] = self.generator(server.task.outputs)
        server.models[GENERATOR] = server.arch[GENERATOR].initial(server.clock.seed)

    def broadcast(self, server: Participant, card: Card) -> Items:
        items = super().broadcast(server, card)
        if "labels" in server.state and not card.reading:
            items |= {GENERATOR: floats(server.models[GENERATOR]), "labels": server.state["labels"]}
        return items

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from self.deploy(client, got)
        if GENERATOR in got:
            arch = client.arch[GENERATOR] = self.generator(client.task.outputs)
            client.models[GENERATOR] = {**arch.initial(client.clock.seed), **got[GENERATOR]}
            yield self.with_generator(client, got["labels"])
            del client.models[GENERATOR]  # it comes anew
        else:
            yield self.fit(client)
        items = self.share(client)
        if items and self.gives(client, "statistics"):
            items["counts"] = Item(client.counts, kind="counts")
        return items

    def with_generator(self, client: Participant, labels: Tensor) -> Fit:
        """Local training with drawn features beside each batch."""
        fade = self.decay**client.clock.round
        objective = FromGenerator(
            client.task.kind, weight=self.weight * fade, latent_weight=self.latent_weight * fade, generator=GENERATOR
        )
        beside = {"fake": Draws(self.drawn(labels), self.generator_batch_size)}
        if self.latent_weight:
            size = client.settings.batch_size + 1  # a last batch of one joins the one before
            beside["noise"] = Draws(lambda g, size: {"x": torch.randn(size, self.noise_dim, generator=g)}, size)
        given = {"one_hot": torch.eye(client.task.outputs)}
        return self.fit(client, objective, given=given, frozen=(GENERATOR,), beside=beside)

    def drawn(self, labels: Tensor) -> Callable[[torch.Generator, int], Columns]:
        """Draws of classes with these frequencies `[C]`, one-hot beside noise."""
        one_hot = torch.eye(len(labels))

        def draw(generator: torch.Generator, size: int) -> Columns:
            y = torch.multinomial(labels, size, replacement=True, generator=generator)
            noise = torch.randn(size, self.noise_dim, generator=generator)
            return {"x": torch.cat([one_hot[y], noise], 1), "y": y}

        return draw

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        yield from super().aggregate(server, uploads)
        teachers = [u for u in uploads.having("model") if "head.weight" in u.payload["model"]]
        if not teachers:
            return
        classes = server.task.outputs
        evenly = [torch.full((classes,), u.card.n / classes) for u in teachers]
        counts = torch.stack([u.payload.get("counts", e) for u, e in zip(teachers, evenly, strict=True)])
        labels = server.state["labels"] = counts.sum(0)
        heads = {n: torch.stack([u.payload["model"][f"head.{n}"] for u in teachers]) for n in ("weight", "bias")}
        yield Fit(
            {GENERATOR: None},
            Generate(self.diversity, GENERATOR),
            Draws(self.drawn(labels), self.generator_batch_size),
            steps=self.generator_steps,
            optimizer=OptimizerConfig(name="adam", lr=self.generator_lr),
            given={"heads": heads, "say": counts / torch.where(labels > 0, labels, torch.ones_like(labels))},
            keep=GENERATOR,
            label=GENERATOR,
        )

    def server_slot(self, server: Participant) -> str | None:
        groups = {slot: tensors for slot, tensors in server.models.items() if slot != GENERATOR}
        whole = any(self.part(kind.settings) is None for kind in server.peers.kinds)
        return next(iter(groups)) if whole and len(groups) == 1 else None
