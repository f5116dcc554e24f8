"""Ensemble and Centralized; and DENSE, which also ends in one model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.references.loops.base import (
    CLASSES,
    Loop,
    copied,
    descend,
    divergence,
    floats,
    load,
    log_frequencies,
    predicted,
)


class Ensemble(Loop):
    """The mean softmax of all models, each with its own preprocessing."""

    own_models = False

    def outputs(self, i: int, model: nn.Module, name: str) -> Tensor:
        outputs = []
        for k, (card, each) in enumerate(zip(self.cards, self.models, strict=True)):
            x = self.federation.data.columns(self.cards[i].client_id, name, card.preprocess)["x"]
            z = self.corrected(k, predicted(each, x))
            outputs.append(z.log_softmax(-1))
        return torch.stack(outputs).logsumexp(0)

    def like(self, i: int, name: str) -> Any:
        return i if name == "test" else "all"


class Centralized(Loop):
    """One model on the rows of all clients, or one of each architecture."""

    own_models = False

    def start(self) -> None:
        specs = [c.arch.spec_id for c in self.cards]
        most = Counter(specs).most_common(1)[0][0]
        # The client whose model, settings and preprocessing a client has.
        self.pattern = [
            specs.index(spec if self.method.each_architecture else most) for spec in specs
        ]
        self.pooled = {k: self.module(self.cards[k].arch) for k in dict.fromkeys(self.pattern)}

    def server_models(self) -> dict[str, dict[str, Tensor]]:
        return {self.cards[k].arch.spec_id: floats(model) for k, model in self.pooled.items()}

    def work(self) -> None:
        for use, (k, model) in enumerate(self.pooled.items()):
            self.fit(k, model, use)

    def fit(self, k: int, model: nn.Module, use: int) -> None:
        """Train a pooled model."""
        card = self.cards[k]
        rows = self.federation.data.columns("server", "pooled", card.preprocess)
        x, y, settings = rows["x"], rows["y"], card.settings
        counts = torch.bincount(y, minlength=CLASSES)
        prior = log_frequencies(counts) if settings.logit_adjustment else torch.zeros(CLASSES)
        users = [c.client_id for c, p in zip(self.cards, self.pattern, strict=True) if p == k]
        orders = self.batches(
            len(y), min(users), "train", settings.batch_size, settings.epochs, use
        )
        losses = (F.cross_entropy(model(x[o]) + prior, y[o]) for o in orders)
        descend([model], losses, self.own_optimizer(k, [model]))

    def evaluated(self, i: int) -> nn.Module:
        return self.pooled[self.pattern[i]]

    def outputs(self, i: int, model: nn.Module, name: str) -> Tensor:
        view = self.cards[self.pattern[i]].preprocess
        x = self.federation.data.columns(self.cards[i].client_id, name, view)["x"]
        return predicted(model, x)

    def like(self, i: int, name: str) -> Any:
        return i if name == "test" else self.pattern[i]


class Dense(Loop):
    """In the last round, a generator learns from all models, and a student from its examples."""

    own_models = False

    def start(self) -> None:
        super().start()
        self.card = self.federation.client_infos[self.method.student]
        self.arch = type(self.card.arch).from_config(
            "python:hetero_fl.core.generative_objectives:Generator",
            torch.Size(self.card.arch.input_shape).numel(),
            (self.method.noise,),
            options={"shape": self.card.arch.input_shape},
        )
        self.maker, self.student = self.module(self.arch), self.module(self.card.arch)
        self.is_distilled = False
        self.apart: list[Tensor] = []
        for model in self.models:
            for layer in model.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.register_forward_pre_hook(self.compare)

    def server_models(self) -> dict[str, dict[str, Tensor]]:
        return {self.card.arch.spec_id: copied(floats(self.student))}

    def compare(self, layer: Any, args: Any) -> None:
        """Record the distance of a batch from the layer's statistics."""
        if torch.is_grad_enabled() and not layer.training:
            (x,) = args
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            self.apart.append((mean - layer.running_mean).norm() + (var - layer.running_var).norm())

    def work(self) -> None:
        super().work()
        # The benchmark repeats the last round.
        if self.done >= self.federation.num_rounds - 1:
            self.is_distilled = True
            self.distill()

    def distill(self) -> None:
        """Train the generator and the student in turns."""
        s, shape = self.method, self.card.arch.input_shape
        load(self.maker, self.arch.initial_tensors(self.federation.seed))
        frozen = [self.student, *self.models]
        for_maker = torch.optim.Adam(self.maker.parameters(), s.generator_lr, fused=True)
        for_student = self.optimizer(self.config.server.optimizer, [self.student])
        examples, logits = [], []
        for use in range(s.synthesis_epochs):
            draws = self.draws("server", "noise", use=use)
            noise = torch.randn(s.synthetic_batch, s.noise, generator=draws)
            y = torch.randint(CLASSES, (s.synthetic_batch,), generator=draws)
            for model in frozen:
                model.eval().requires_grad_(False)
            orders = self.orders(len(y), s.generator_steps, "generator", use)
            descend([self.maker], (self.imagined(noise[o], y[o]) for o in orders), for_maker)
            raw = predicted(self.maker, noise).unflatten(1, shape)
            examples.append(seen(self.card, raw))
            with torch.no_grad():
                logits.append(torch.stack(self.predictions(raw)).mean(0))
            x, teacher = torch.cat(examples), torch.cat(logits)
            self.student.requires_grad_(True)
            orders = self.orders(len(x), s.student_steps, "student", use)
            losses = (divergence(self.student(x[o]), teacher[o], s.temperature) for o in orders)
            descend([self.student], losses, for_student)
        for model in self.models:
            model.requires_grad_(True)

    def orders(self, n: int, steps: int, label: str, use: int) -> list[Tensor]:
        """Return batches of a step of the server."""
        return self.full_batches(n, "server", label, self.method.synthetic_batch, steps, use)

    def predictions(self, raw: Tensor) -> list[Tensor]:
        """Return the logits of each client's model for generated examples."""
        pairs = zip(self.cards, self.models, strict=True)
        return [model(seen(card, raw)) for card, model in pairs]

    def imagined(self, noise: Tensor, y: Tensor) -> Tensor:
        """Return the generator's loss."""
        raw = self.maker(noise).unflatten(1, self.card.arch.input_shape)
        self.apart = [torch.zeros(())]
        mean = torch.stack(self.predictions(raw)).mean(0)
        statistics = torch.stack(self.apart).sum() / len(self.models)
        student = self.student(seen(self.card, raw))
        log_p, differ = mean.log_softmax(-1), mean.argmax(-1) != student.argmax(-1)
        kl = (log_p.exp() * (log_p - student.log_softmax(-1))).sum(-1)
        s = self.method
        return (
            F.cross_entropy(mean, y)
            + s.statistics_weight * statistics
            - s.adversarial_weight * (differ * kl).mean()
        )

    def evaluated(self, i: int) -> nn.Module:
        return self.student if self.is_distilled else super().evaluated(i)

    def outputs(self, i: int, model: nn.Module, name: str) -> Tensor:
        if not self.is_distilled:
            return super().outputs(i, model, name)
        view = self.card.preprocess
        x = self.federation.data.columns(self.cards[i].client_id, name, view)["x"]
        return predicted(model, x)

    def like(self, i: int, name: str) -> Any:
        return "student" if self.is_distilled and name != "test" else i


def seen(card: Any, raw: Tensor) -> Tensor:
    """Return generated examples after a client's normalization."""
    view = card.preprocess
    if view.mean is None:
        return raw
    return (raw - raw.new_tensor(view.mean)) / raw.new_tensor(view.std)
