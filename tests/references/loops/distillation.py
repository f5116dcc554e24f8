"""Methods that distill on proxy rows: FedMD, FedDF, DS-FL, KT-pFL and Hybrid."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.references.loops.averaging import FedAvg
from tests.references.loops.base import (
    BATCH,
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

TINY = 1e-12


class Public(Loop):
    """Personal models, and a teacher on the proxy rows."""

    teacher: Tensor | None = None

    def public(self, i: int) -> Tensor:
        """Return the proxy rows after a client's preprocessing."""
        return self.data[i]["proxy"]["x"]

    def digest(self, i: int, module: nn.Module, teacher: Tensor) -> None:
        """Train one epoch toward the teacher."""
        x, t = self.public(i), self.method.temperature
        orders = self.batches(
            len(x), self.cards[i].client_id, "digest", self.method.proxy_batch_size
        )
        descend([module], (divergence(module(x[o]).logits, teacher[o], t) for o in orders))


class FedMD(Public):
    """The mean of logits is digested before private training."""

    def work(self) -> None:
        predictions = []
        for i, model in enumerate(self.models):
            if self.teacher is not None:
                self.digest(i, model, self.teacher)
            self.train(i, model)
            predictions.append(predicted(model, self.public(i)))
        self.teacher = torch.stack(predictions).mean(0)


class DSFL(Public):
    """The sharpened mean of probabilities is digested before training and before evaluation."""

    def work(self) -> None:
        mean = torch.zeros(())
        for i, model in enumerate(self.models):
            if self.teacher is not None:
                self.digest(i, model, self.teacher)
            self.train(i, model)
            mean = mean + predicted(model, self.public(i)).softmax(-1) / len(self.models)
        self.teacher = mean / self.method.era_temperature

    def read(self) -> None:
        assert self.teacher is not None
        for i, model in enumerate(self.models):
            used = deepcopy(model)
            self.digest(i, used, self.teacher)
            for name in READ:
                self.score(i, name, predicted(used, self.data[i][name]["x"]))


class KTpFL(Public):
    """Each client digests a mixture of all predictions before training and before evaluation."""

    def start(self) -> None:
        super().start()
        self.weights = torch.full((len(self.cards),) * 2, 1 / len(self.cards))
        self.predictions: Tensor | None = None

    def work(self) -> None:
        predictions, t = [], self.method.temperature
        for i, model in enumerate(self.models):
            if self.predictions is not None:
                self.digest(i, model, self.mixture(i))
            self.train(i, model)
            predictions.append((predicted(model, self.public(i)) / t).softmax(-1))
        self.predictions = p = torch.stack(predictions)
        log_p, s, k = p.clamp(min=TINY).log(), self.method, len(p)
        for _ in range(s.coefficient_steps):
            c = self.weights.requires_grad_()
            mixed = torch.einsum("bk,kdc->bdc", c, p).clamp(min=TINY)
            distances = t**2 * (mixed * (mixed.log() - log_p)).sum(-1).mean(-1)
            loss = (distances + s.rho * (c - 1 / k).square().sum(-1)).mean()
            optimizer = torch.optim.SGD([c], s.coefficient_lr * k, fused=True)
            loss.backward()
            optimizer.step()
            self.weights = self.projected(c.detach())

    def mixture(self, i: int) -> Tensor:
        """Return a client's mixture."""
        assert self.predictions is not None
        return (
            self.method.temperature
            * torch.einsum("k,kdc->dc", self.weights[i], self.predictions).clamp(min=TINY).log()
        )

    def read(self) -> None:
        for i, model in enumerate(self.models):
            used = deepcopy(model)
            self.digest(i, used, self.mixture(i))
            for name in READ:
                self.score(i, name, predicted(used, self.data[i][name]["x"]))

    @staticmethod
    def projected(rows: Tensor) -> Tensor:
        """Return the nearest distribution to each row."""
        u = rows.sort(-1, descending=True).values
        excess = (u.cumsum(-1) - 1) / torch.arange(1, rows.shape[-1] + 1)
        return (rows - excess.gather(-1, (u > excess).sum(-1, keepdim=True) - 1)).clamp(min=0)


class FedDF(FedAvg):
    """Averaged models, each distilled from all clients."""

    def start(self) -> None:
        super().start()
        self.predictions: list[Tensor] = []

    def local(self, i: int, module: nn.Module) -> None:
        super().local(i, module)
        self.predictions.append(
            self.client_predictions(i, predicted(module, self.data[i]["proxy"]["x"]))
        )

    def client_predictions(self, i: int, logits: Tensor) -> Tensor:
        """Return a client's predictions."""
        return logits

    def combine(self, mean: dict[str, State]) -> None:
        self.teacher, self.predictions = self.consensus(), []
        for i, client_info in {
            c.arch.spec_id: (i, c) for i, c in reversed(list(enumerate(self.cards)))
        }.values():
            module = load(self.modules[client_info.arch.spec_id], mean[client_info.arch.spec_id])
            x, s = self.data[i]["proxy"]["x"], self.method
            label = f"distil {client_info.arch.spec_id}"  # style: ok (stream label)
            orders = self.batches(len(x), "server", label, s.proxy_batch_size, s.distill_epochs)
            with torch.enable_grad():
                self.distill(module, x, orders)
            self.shared[client_info.arch.spec_id] = {
                n: t.clone() for n, t in floats(module).items()
            }

    def distill(self, module: nn.Module, x: Tensor, orders: list[Tensor]) -> None:
        """Distill the teacher into one averaged model."""
        losses = (
            divergence(module(x[o]).logits, self.teacher[o], self.method.temperature)
            for o in orders
        )
        descend([module], losses, adam([module]))

    def consensus(self) -> Tensor:
        """Return the teacher."""
        return torch.stack(self.predictions).mean(0)


class Hybrid(FedDF):
    """FedDF with logit-adjusted training, proxy replay and a contrast-weighted teacher."""

    def start(self) -> None:
        super().start()
        self.teacher: Any = None
        self.priors = [((n + 1) / (n + 1).sum()).log() for n in self.counts]
        self.say = [n * (1 - n / n.sum()) + 0.1 for n in self.counts]

    def local(self, i: int, module: nn.Module) -> None:
        public, s, client_id = self.data[i]["proxy"]["x"], self.method, self.cards[i].client_id

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            own = F.cross_entropy(module(x).logits + self.priors[i], y)
            if self.teacher is None:
                return own
            some = torch.randint(
                len(public), (BATCH,), generator=self.draws(client_id, "train", "public", step)
            )
            distance = divergence(module(public[some]).logits, self.teacher[some], s.temperature)
            return own + s.replay_weight * distance

        self.train(i, module, loss)
        self.predictions.append(self.client_predictions(i, predicted(module, public)))

    def client_predictions(self, i: int, logits: Tensor) -> Tensor:
        return F.log_softmax(logits, -1).clamp(min=-8) * self.say[i]

    def consensus(self) -> Tensor:
        return torch.stack(self.predictions).sum(0) / torch.stack(self.say).sum(0)

    def score(self, i: int, name: str, logits: Tensor) -> None:
        super().score(i, name, logits + self.priors[i] if name == "test" else logits)
