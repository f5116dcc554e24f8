"""Baselines: Local, Ensemble and Centralized; and DENSE, which also ends in one model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.references.loops.base import Loop, adam, descend, divergence, load, predicted


class Ensemble(Loop):
    """The mean softmax of all models, each evaluated once on the common sets."""

    def read(self) -> None:
        def predictions(x: Tensor) -> Tensor:
            return torch.stack(
                [predicted(model, x).log_softmax(-1) for model in self.models]
            ).logsumexp(0)

        self.read_of_one(predictions)


class Centralized(Loop):
    """One model on the rows of all clients."""

    def start(self) -> None:
        foremost = self.federation.client_infos[self.federation.client_infos.main_profile.first]
        self.pooled = self.federation.data.columns("server", "pooled", foremost.preprocess)
        self.model = self.module(foremost.arch)

    def work(self) -> None:
        x, y = self.pooled["x"], self.pooled["y"]
        first = min(kind.first for kind in self.federation.client_infos.profiles)
        batches = self.batches(len(y), first)
        descend(
            [self.model], (F.cross_entropy(self.model(x[rows]).logits, y[rows]) for rows in batches)
        )

    def read(self) -> None:
        self.read_of_one(partial(predicted, self.model))


class Dense(Loop):
    """A generator learns from all models, and a student from its examples."""

    def start(self) -> None:
        super().start()
        self.card = self.federation.client_infos[self.method.student]
        self.arch = self.method.generator(self.card.arch.input_shape)
        self.maker, self.student = self.module(self.arch), self.module(self.card.arch)
        self.apart: list[Tensor] = []
        for model in self.models:
            for layer in model.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.register_forward_pre_hook(self.compare)

    def compare(self, layer: Any, args: Any) -> None:
        """Return the distance of a batch from the layer's statistics."""
        if torch.is_grad_enabled() and not layer.training:
            (x,) = args
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            self.apart.append((mean - layer.running_mean).norm() + (var - layer.running_var).norm())

    def work(self) -> None:
        super().work()
        s, shape = self.method, self.card.arch.input_shape
        self.maker = load(self.maker, self.arch.initial_tensors(self.federation.seed))
        frozen = [self.student, *self.models]
        optimizers = adam([self.maker], s.generator_lr), adam([self.student])
        examples, logits = [], []
        for use in range(s.synthesis_epochs):
            draws = self.draws("server", "noise", use=use)
            noise = torch.randn(s.synthetic_batch, s.noise, generator=draws)
            y = torch.randint(10, (s.synthetic_batch,), generator=draws)
            for model in frozen:
                model.eval().requires_grad_(False)
            losses = (
                self.imagined(noise[o], y[o])
                for o in self.orders(len(y), s.generator_steps, "generator", use)
            )
            descend([self.maker], losses, optimizers[0])
            x = self.seen(predicted(self.maker, noise).unflatten(1, shape))
            examples.append(x)
            logits.append(torch.stack([predicted(model, x) for model in self.models]).mean(0))
            x, teacher = torch.cat(examples), torch.cat(logits)
            self.student.requires_grad_(True)
            orders = self.orders(len(x), s.student_steps, "student", use)
            losses = (
                divergence(self.student(x[o]).logits, teacher[o], s.temperature) for o in orders
            )
            descend([self.student], losses, optimizers[1])
        for model in self.models:
            model.requires_grad_(True)

    def orders(self, n: int, steps: int, label: str, use: int) -> list[Tensor]:
        """Generate permutations without end, cut into full batches."""
        size = self.method.synthetic_batch
        epochs = -(-steps * size // n)
        order = torch.cat(
            [
                torch.randperm(n, generator=self.draws("server", label, e, use=use))
                for e in range(epochs)
            ]
        )
        return list(order[: steps * size].split(size))

    def imagined(self, noise: Tensor, y: Tensor) -> Tensor:
        """Return the generator's loss."""
        x = self.seen(self.maker(noise).logits.unflatten(1, self.card.arch.input_shape))
        self.apart = []
        mean = torch.stack([model(x).logits for model in self.models]).mean(0)
        student = self.student(x).logits
        log_p, differ = mean.log_softmax(-1), (mean.argmax(-1) != student.argmax(-1)).float()
        kl = (log_p.exp() * (log_p - student.log_softmax(-1))).sum(-1)
        statistics = torch.stack(self.apart).sum() / len(self.models)
        s = self.method
        return (
            F.cross_entropy(mean, y)
            + s.statistics_weight * statistics
            - s.adversarial_weight * (differ * kl).mean()
        )

    def seen(self, x: Tensor) -> Tensor:
        """Return generated examples after preprocessing."""
        view = self.card.preprocess
        return x if view.mean is None else (x - x.new_tensor(view.mean)) / x.new_tensor(view.std)

    def read(self) -> None:
        self.read_of_one(partial(predicted, self.student))
        # The last round is the only one.
        self.done = 0
