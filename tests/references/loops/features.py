"""Methods that exchange features or class means: FD, FedProto, FedTGP, FedGH, FedGKT and FedGen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.core.model_spec import ModelSpec
from tests.references.loops.averaging import FedAvg
from tests.references.loops.base import (
    CLASSES,
    Loop,
    Loss,
    State,
    descend,
    divergence,
    floats,
    load,
    predicted,
    sgd,
    summed,
)


class FD(Loop):
    """Toward the consensus logits of the example's class."""

    def start(self) -> None:
        super().start()
        self.teacher: Tensor | None = None
        self.known = torch.zeros(CLASSES)

    def work(self) -> None:
        sums, weights = torch.zeros(CLASSES, CLASSES), torch.zeros(CLASSES, CLASSES)
        for i in self.cohort:
            model = self.models[i]
            self.train(i, model, self.pulled(i, model))
            own, weight = self.statistics(i, model)
            sums, weights = sums + own, weights + weight
        self.teacher = sums / torch.where(weights > 0, weights, 1.0)
        self.known = (weights[:, 0] > 0).to(weights)

    def statistics(self, i: int, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Return sums by class of a client's outputs, and their weights."""
        rows, n = self.data[i]["train"], self.counts[i]
        z = predicted(model, rows["x"])
        if self.method.teacher == "mean":
            return summed(z, rows["y"]), n[:, None].expand(-1, CLASSES)
        weight = (n * (1 - n / n.sum()) + 0.1) / n.sum()
        sums = summed(z.log_softmax(-1).clamp(min=-8), rows["y"])
        return sums * weight, n[:, None] * weight

    def pulled(self, i: int, model: nn.Module) -> Loss | None:
        """Return the task loss plus the divergence from the teacher."""
        teacher, known, s = self.teacher, self.known, self.method
        if teacher is None:
            return None

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            z, t = model(x), s.temperature
            log_t = F.log_softmax(teacher[y] / t, -1)
            distance = (log_t.exp() * (log_t - F.log_softmax(z / t, -1))).sum(-1) * t**2
            return self.entropy(i, z, y) + s.weight * (distance * known[y]).mean()

        return loss


class FedProto(Loop):
    """Features toward class prototypes; predict the nearest prototype."""

    def start(self) -> None:
        super().start()
        # Distances are not logits of adjusted training.
        self.adds_prior = self.own_models = self.method.inference == "head"
        self.prototypes: Tensor | None = None
        self.known = torch.zeros(CLASSES)

    def work(self) -> None:
        sums = []
        for i in self.cohort:
            model = self.models[i]
            self.train(i, model, self.pulled(i, model))
            sums.append(self.class_sums(i, model))
        self.update(sums)

    def update(self, sums: list[tuple[Tensor, Tensor]]) -> None:
        """Compute the prototypes."""
        total, counts = (torch.stack(part).sum(0) for part in zip(*sums, strict=True))
        mean, sent = total / counts.clamp(min=1)[:, None], counts > 0
        before = torch.zeros_like(mean) if self.prototypes is None else self.prototypes
        self.prototypes = torch.where(sent[:, None], mean, before)
        self.known = torch.maximum(self.known, sent.to(mean))

    def pulled(self, i: int, model: nn.Module) -> Loss | None:
        """Return the task loss plus the distance to the prototype of the class."""
        prototypes, known, weight = self.prototypes, self.known, self.method.weight
        if prototypes is None:
            return None

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            features = model.forward_features(x)  # type: ignore[operator]
            logits = model.forward_head(features)  # type: ignore[operator]
            distance = (features - prototypes[y]).square().mean(-1)
            return self.entropy(i, logits, y) + weight * (distance * known[y]).mean()

        return loss

    def outputs(self, i: int, model: nn.Module, name: str) -> Tensor:
        if self.method.inference == "head":
            return super().outputs(i, model, name)
        features = predicted(model, self.data[i][name]["x"], "features")
        is_own = self.method.inference == "own" and name == "test"
        has = self.known * self.counts[i] > 0 if is_own else self.known > 0
        return self.nearness(features, has)

    def nearness(self, features: Tensor, has: Tensor) -> Tensor:
        """Return negative distances; classes without a prototype are 20 below the lowest."""
        assert self.prototypes is not None
        distance = torch.cdist(features, self.prototypes)
        far = -distance[:, has].amax(-1, keepdim=True) - 20
        return torch.where(has, -distance, far)


class FedTGP(FedProto):
    """Prototypes trained at the server."""

    def start(self) -> None:
        super().start()
        width = self.models[0].num_features
        vectors = ModelSpec.from_config("linear", width, (CLASSES,)).initial_tensors(
            self.federation.seed
        )["head.weight"]
        self.vectors = nn.Parameter(vectors.T.contiguous())
        network = ModelSpec.from_config("mlp", width, (width,), options={"hidden": [width]})
        self.network = self.module(network)

    def update(self, sums: list[tuple[Tensor, Tensor]]) -> None:
        means, has = means_of(sums)
        own = has[..., None].to(means)
        centres, present = (means * own).sum(0) / own.sum(0).clamp(min=1), has.any(0)
        pairs = present[:, None] & present
        gap = torch.where(pairs, torch.cdist(centres, centres), 0.0).max()
        s, x, y = self.method, means[has], has.nonzero()[:, 1]
        margin = gap.clamp(max=s.margin) * torch.eye(CLASSES)
        optimizer = sgd([self.network], s.server_lr)
        optimizer.add_param_group({"params": [self.vectors]})
        orders = self.batches(len(y), "server", "prototypes", s.server_batch_size, s.server_epochs)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            prototypes = self.network(self.vectors)
            distance = (x[:, None] - prototypes).square().sum(-1).clamp(min=1e-12).sqrt()
            return F.cross_entropy(-(distance + margin[y]), y)

        descend([self.network], (loss(x[o], y[o]) for o in orders), optimizer)
        self.prototypes = predicted(self.network, self.vectors.detach())
        self.known = torch.maximum(self.known, present.to(means))


class FedGH(Loop):
    """One head, trained at the server on feature means."""

    own_models = False

    def start(self) -> None:
        super().start()
        arch = ModelSpec.from_config("linear", CLASSES, (self.models[0].num_features,))
        self.head = self.module(arch)
        self.is_trained = False

    def server_models(self) -> dict[str, State]:
        return {"head": floats(self.head)}

    def work(self) -> None:
        sums, s = [], self.method
        for i in self.cohort:
            self.train(i, self.models[i])
            sums.append(self.class_sums(i, self.models[i]))
        means, has = means_of(sums)
        x, y = means[has], has.nonzero()[:, 1]
        optimizer = sgd([self.head], s.server_lr)
        orders = self.batches(len(y), "server", "head", s.server_batch_size, s.server_epochs)
        losses = (F.cross_entropy(self.head(x[o]), y[o]) for o in orders)
        descend([self.head], losses, optimizer)
        for model in self.models:
            load(model, floats(self.head))


class FedGKT(Loop):
    """A large server model learns from the clients' features, and they from its logits."""

    def start(self) -> None:
        super().start()
        self.own_models = self.method.inference == "client"
        self.large = self.module(self.method.large_model_spec(CLASSES))
        self.for_large = self.optimizer(self.config.server.optimizer, [self.large])
        self.predictions: dict[int, Tensor] = {}

    def server_models(self) -> dict[str, State]:
        return {"large": floats(self.large)}

    def work(self) -> None:
        s, sent = self.method, {}
        for i in self.cohort:
            model = self.models[i]
            self.train(i, model, self.taught(i, model))
            sent[i] = both(model, self.data[i]["train"]["x"])
        x, teacher = (torch.cat(parts) for parts in zip(*sent.values(), strict=True))
        y = torch.cat([self.data[i]["train"]["y"] for i in sent])
        zeros = torch.zeros(CLASSES)
        prior = torch.cat(
            [self.adjusted(i, zeros).expand(len(z), -1) for i, (_, z) in sent.items()]
        )
        orders = self.batches(len(y), "server", "server", s.server_batch_size, s.server_epochs)

        def loss(rows: Tensor) -> Tensor:
            z = self.large(x[rows])
            distance = divergence(z, teacher[rows], s.temperature)
            return F.cross_entropy(z + prior[rows], y[rows]) + s.weight * distance

        descend([self.large], map(loss, orders), self.for_large)
        for i, (features, _) in sent.items():
            self.predictions[i] = predicted(self.large, features)

    def taught(self, i: int, model: nn.Module) -> Loss | None:
        """Return the task loss plus distillation from the server's logits."""
        if i not in self.predictions:
            return None
        teacher, orders, s = self.predictions[i], self.own_batches(i), self.method

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            z = model(x)
            distance = divergence(z, teacher[orders[step]], s.temperature)
            return self.entropy(i, z, y) + s.weight * distance

        return loss

    def outputs(self, i: int, model: nn.Module, name: str) -> Tensor:
        if self.method.inference == "client":
            return super().outputs(i, model, name)
        return predicted(self.large, predicted(model, self.data[i][name]["x"], "features"))


class FedGen(FedAvg):
    """A generator of features in addition to averaged models."""

    def start(self) -> None:
        super().start()
        self.maker = self.module(self.method.generator(CLASSES))
        parameters = self.maker.parameters()
        self.for_maker = torch.optim.Adam(parameters, self.method.generator_lr, fused=True)
        self.heads: list[State] = []
        self.labels: Tensor | None = None

    def server_models(self) -> dict[str, State]:
        return {**self.shared, "generator": floats(self.maker)}

    def drawn(self, labels: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return inputs of the generator and their classes."""
        s = self.method
        y = torch.multinomial(labels, s.generator_batch_size, replacement=True, generator=draws)
        noise = torch.randn(len(y), s.noise_dim, generator=draws)
        return torch.cat([torch.eye(CLASSES)[y], noise], 1), y

    def local(self, i: int, module: nn.Module) -> None:
        self.maker.eval().requires_grad_(False)
        self.train(i, module, self.generated(i, module))
        state = floats(module)
        self.heads.append({n: t.clone() for n, t in state.items() if n.startswith("head.")})

    def generated(self, i: int, module: nn.Module) -> Loss | None:
        """Return the task loss plus losses on generated features."""
        labels, s, client_id = self.labels, self.method, self.cards[i].client_id
        if labels is None:
            return None
        fade = s.decay**self.done
        size = self.cards[i].settings.batch_size + 1

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            z = module(x)
            fake, classes = self.drawn(labels, self.draws(client_id, "train", "fake", step))
            guess = module.head(self.maker(fake))  # type: ignore[operator]
            total = self.entropy(i, z, y) + fade * s.weight * F.cross_entropy(guess, classes)
            if s.latent_weight:
                draws = self.draws(client_id, "train", "noise", step)
                noise = torch.randn(size, s.noise_dim, generator=draws)[: len(y)]
                latent = self.maker(torch.cat([torch.eye(CLASSES)[y], noise], 1))
                like = module.head(latent)  # type: ignore[operator]
                total = total + fade * s.latent_weight * divergence(z, like)
            return total

        return loss

    def work(self) -> None:
        self.heads = []
        super().work()
        s = self.method
        counts = torch.stack([self.counts[i] for i in self.cohort])
        self.labels = labels = counts.sum(0)
        weights = counts / torch.where(labels > 0, labels, 1.0)
        weight, bias = (
            torch.stack([h[f"head.{n}"] for h in self.heads]) for n in ("weight", "bias")
        )
        self.maker.requires_grad_(True)

        def loss(step: int) -> Tensor:
            x, y = self.drawn(labels, self.draws("server", "generator", step))
            z = self.maker(x)
            logits = torch.einsum("kcd,bd->kbc", weight, z) + bias[:, None]
            wrong = -logits.log_softmax(-1)[:, torch.arange(len(z)), y]
            noise = x[:, CLASSES:]
            far = (z[:, None] - z).abs().mean(-1) * (noise[:, None] - noise).square().mean(-1)
            return (weights[:, y] * wrong).sum(0).mean() + s.diversity * torch.exp(-far.mean())

        descend([self.maker], map(loss, range(s.generator_steps)), self.for_maker)


@torch.no_grad()
def both(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and logits in evaluation mode."""
    module.eval()
    features = torch.cat([module.forward_features(some) for some in x.split(500)])  # type: ignore[operator]
    return features, module.forward_head(features)  # type: ignore[operator]


def means_of(sums: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return each client's mean of each class, and whether it has the class."""
    counts = torch.stack([n for _, n in sums])
    return torch.stack([s for s, _ in sums]) / counts.clamp(min=1)[..., None], counts > 0
