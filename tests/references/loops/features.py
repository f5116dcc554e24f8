"""Methods that exchange features: FedGKT, FedTGP, FedGH, FedGen and FedMRL."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.algorithms.mutual import MENTEE, PROJECTION
from hetero_fl.core.model_spec import ModelSpec
from tests.references.loops.averaging import FedAvg
from tests.references.loops.base import (
    READ,
    Loop,
    State,
    adam,
    descend,
    divergence,
    floats,
    load,
    predicted,
)


class FedGKT(Loop):
    """A large server model learns from the clients' features, and they from its logits."""

    def start(self) -> None:
        super().start()
        self.large = self.module(self.method.large_model_spec(10))
        self.optimizer = adam([self.large])
        self.predictions: tuple[Tensor, ...] = ()

    def work(self) -> None:
        s, sent = self.method, []
        for i, model in enumerate(self.models):
            self.train_client(i, model)
            sent.append(both(model, self.data[i]["train"]["x"]))
        x, teacher = (torch.cat(parts) for parts in zip(*sent, strict=True))
        y = torch.cat([rows["train"]["y"] for rows in self.data])
        orders = self.batches(len(y), "server", "server", s.server_batch_size, s.server_epochs)
        losses = (self.loss(self.large(x[o]).logits, y[o], teacher[o]) for o in orders)
        descend([self.large], losses, self.optimizer)
        self.predictions = tuple(predicted(self.large, features) for features, _ in sent)

    def train_client(self, i: int, model: nn.Module) -> None:
        """Train a client for an epoch."""
        if not self.predictions:
            return self.train(i, model)
        x, y, teacher = self.data[i]["train"]["x"], self.data[i]["train"]["y"], self.predictions[i]
        orders = self.batches(len(y), self.cards[i].client_id)
        losses = (self.loss(model(x[o]).logits, y[o], teacher[o]) for o in orders)
        return self.losses[-1].append(descend([model], losses))

    def loss(self, logits: Tensor, y: Tensor, teacher: Tensor) -> Tensor:
        """Return the task loss plus distillation from the other side."""
        s = self.method
        return F.cross_entropy(logits, y) + s.weight * divergence(logits, teacher, s.temperature)

    def read(self) -> None:
        for i, model in enumerate(self.models):
            for name in READ:
                features = predicted(model, self.data[i][name]["x"], "features")
                self.score(i, name, predicted(self.large, features))


class FedTGP(Loop):
    """Prototypes trained at the server."""

    def start(self) -> None:
        super().start()
        width = self.models[0].feature_dim
        vectors = ModelSpec.from_config("linear", width, (10,)).initial_tensors(
            self.federation.seed
        )["head.weight"]
        self.vectors = nn.Parameter(vectors.T.contiguous())
        self.network = self.module(
            ModelSpec.from_config("mlp", width, (width,), options={"hidden": [width]})
        )
        self.prototypes: Tensor | None = None
        self.known = torch.zeros(10)

    def work(self) -> None:
        sums = []
        for i, model in enumerate(self.models):
            self.train(i, model, self.pulled(model))
            sums.append(self.class_sums(i, model))
        means, has = means_of(sums)
        own = has[..., None].float()
        centres, present = (means * own).sum(0) / own.sum(0).clamp(min=1), has.any(0)
        gap = torch.where(
            present[:, None] & present, torch.cdist(centres, centres), torch.zeros(())
        ).max()
        s, x, y = self.method, means[has], has.nonzero()[:, 1]
        margin = gap.clamp(max=s.margin) * torch.eye(10)
        optimizer = torch.optim.SGD(
            [self.vectors, *self.network.parameters()], s.server_lr, fused=True
        )
        orders = self.batches(len(y), "server", "prototypes", s.server_batch_size, s.server_epochs)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            prototypes = self.network(self.vectors).logits
            divergence = (x[:, None] - prototypes).square().sum(-1).clamp(min=1e-12).sqrt()
            return F.cross_entropy(-(divergence + margin[y]), y)

        descend([self.network], (loss(x[o], y[o]) for o in orders), optimizer)
        self.prototypes = predicted(self.network, self.vectors.detach())
        self.known = torch.maximum(self.known, present.float())

    def pulled(self, model: nn.Module) -> object:
        """Return the task loss plus the distance to the prototype of the class."""
        prototypes, known = self.prototypes, self.known
        if prototypes is None:
            return None

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            out = model(x)
            divergence = (out.features - prototypes[y]).square().mean(-1)
            return (
                F.cross_entropy(out.logits, y) + (self.method.weight * divergence * known[y]).mean()
            )

        return loss

    def read(self) -> None:
        assert self.prototypes is not None
        has = self.known > 0
        for i, model in enumerate(self.models):
            for name in READ:
                features = predicted(model, self.data[i][name]["x"], "features")
                divergence = torch.cdist(features, self.prototypes)
                far = -divergence[:, has].amax(-1, keepdim=True) - 20
                self.score(i, name, torch.where(has, -divergence, far))


class FedGH(Loop):
    """One head, trained at the server on feature means."""

    def start(self) -> None:
        super().start()
        self.head = self.module(ModelSpec.from_config("linear", 10, (self.models[0].feature_dim,)))

    def work(self) -> None:
        sums, s = [], self.method
        for i, model in enumerate(self.models):
            self.train(i, model)
            sums.append(self.class_sums(i, model))
        means, has = means_of(sums)
        x, y = means[has], has.nonzero()[:, 1]
        optimizer = torch.optim.SGD(self.head.parameters(), s.server_lr, fused=True)
        orders = self.batches(len(y), "server", "head", s.server_batch_size, s.server_epochs)
        descend(
            [self.head], (F.cross_entropy(self.head(x[o]).logits, y[o]) for o in orders), optimizer
        )
        for model in self.models:
            load(model, floats(self.head))


class FedGen(FedAvg):
    """A generator of features in addition to averaged models."""

    def start(self) -> None:
        super().start()
        self.maker = self.module(self.method.generator(10))
        self.optimizer = adam([self.maker], self.method.generator_lr)
        self.heads: list[State] = []
        self.labels: Tensor | None = None

    def drawn(self, labels: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return inputs of the generator and their classes."""
        s = self.method
        y = torch.multinomial(labels, s.generator_batch_size, replacement=True, generator=draws)
        noise = torch.randn(len(y), s.noise_dim, generator=draws)
        return torch.cat([torch.eye(10)[y], noise], 1), y

    def local(self, i: int, module: nn.Module) -> None:
        labels, s, client_id = self.labels, self.method, self.cards[i].client_id
        self.maker.eval().requires_grad_(False)

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            own = F.cross_entropy(module(x).logits, y)
            if labels is None:
                return own
            fake, classes = self.drawn(labels, self.draws(client_id, "train", "fake", step))
            return own + s.weight * F.cross_entropy(module.head(self.maker(fake).logits), classes)  # type: ignore[operator]

        self.train(i, module, loss)
        self.heads.append(
            {n: t.clone() for n, t in floats(module).items() if n.startswith("head.")}
        )

    def work(self) -> None:
        self.heads = []
        super().work()
        s, counts = self.method, torch.stack(self.counts)
        self.labels = labels = counts.sum(0)
        weights = counts / torch.where(labels > 0, labels, torch.ones_like(labels))
        weight, bias = (
            torch.stack([h[f"head.{n}"] for h in self.heads]) for n in ("weight", "bias")
        )
        self.maker.requires_grad_(True)

        def loss(step: int) -> Tensor:
            x, y = self.drawn(labels, self.draws("server", "generator", step))
            z = self.maker(x).logits
            logits = torch.einsum("kcd,bd->kbc", weight, z) + bias[:, None]
            wrong = -logits.log_softmax(-1)[:, torch.arange(len(z)), y]
            noise = x[:, 10:]
            far = (z[:, None] - z).abs().mean(-1) * (noise[:, None] - noise).square().mean(-1)
            return (weights[:, y] * wrong).sum(0).mean() + s.diversity * torch.exp(-far.mean())

        descend([self.maker], map(loss, range(s.generator_steps)), self.optimizer)


class FedMRL(Loop):
    """A personal model, a small common one and a projection of both features."""

    def start(self) -> None:
        super().start()
        extras = [c.models for c in self.cards]
        self.mentee = self.module(extras[0][MENTEE])
        self.shared = {n: t.clone() for n, t in floats(self.mentee).items()}
        self.projections = [self.module(extra[PROJECTION]) for extra in extras]

    def work(self) -> None:
        mean = {n: torch.zeros_like(t) for n, t in self.shared.items()}
        total = sum(float(c.num_rows) for c in self.cards)
        for i, model in enumerate(self.models):
            load(self.mentee, self.shared)
            self.train(
                i,
                model,
                self.nested(model, self.projections[i]),
                besides=[self.mentee, self.projections[i]],
            )
            for name, tensor in floats(self.mentee).items():
                mean[name].add_(tensor, alpha=self.cards[i].num_rows / total)
        self.shared = mean

    def nested(self, model: nn.Module, projection: nn.Module) -> object:
        """Return the loss of both heads on both features."""

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            g = self.mentee(x).features
            r = projection(torch.cat([g, model(x).features], -1)).logits
            coarse = self.mentee.head(r[:, : g.shape[1]])  # type: ignore[operator]
            return F.cross_entropy(model.head(r), y) + F.cross_entropy(coarse, y)  # type: ignore[operator]

        return loss

    @torch.no_grad()
    def read(self) -> None:
        load(self.mentee, self.shared)
        for i, model in enumerate(self.models):
            for name in READ:
                x = self.data[i][name]["x"]
                g, f = predicted(self.mentee, x, "features"), predicted(model, x, "features")
                self.score(
                    i, name, model.head(predicted(self.projections[i], torch.cat([g, f], 1)))
                )  # type: ignore[operator]


@torch.no_grad()
def both(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and logits in evaluation mode."""
    module.eval()
    out = [module(some) for some in x.split(500)]
    return torch.cat([o.features for o in out]), torch.cat([o.logits for o in out])


def means_of(sums: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return each client's mean of each class, and whether it has the class."""
    counts = torch.stack([n for _, n in sums])
    return torch.stack([s for s, _ in sums]) / counts.clamp(min=1)[..., None], counts > 0
