"""FD, FedProto, FML and FedKD as plain loops over lists of models and tensors.

They use the framework's batches; tests compare the losses. They omit encoding, transfer, validation
and isolation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.experiment import PreparedRun
from hetero_fl.utils.seeding import keyed_generator

# FedProto is unstable with a higher rate here.
LR, BATCH, CLASSES = 0.003, 32, 10


def module_of(prepared: PreparedRun, arch: Any) -> nn.Module:
    """Return a model with the framework's initial weights."""
    module: nn.Module = arch.build()
    module.load_state_dict(prepared.federation.initial_tensors(arch))
    return module


class Loop:
    """Local training of each client in turn, then its evaluation."""

    def __init__(self, prepared: PreparedRun) -> None:
        self.prepared, self.federation, self.method = prepared, prepared.federation, prepared.method
        self.cards = list(self.federation.client_infos.values())
        self.train = [self._rows(c, "train") for c in self.cards]
        self.tests = [[self._rows(c, "test"), self._rows(c, "common_test")] for c in self.cards]
        self.validation = [self._rows(c, "common_validation") for c in self.cards]
        self.models = [module_of(prepared, c.arch) for c in self.cards]
        # By round and client.
        self.losses: list[list[float]] = []
        self.done = 0

    def _rows(self, card: Any, name: str) -> dict[str, Tensor]:
        return self.federation.data.columns(card.client_id, name, card.preprocess)

    def batches(self, i: int) -> list[Tensor]:
        """Return one epoch; a single last row joins the previous batch for BatchNorm."""
        n = len(self.train[i]["y"])
        order = torch.randperm(
            n,
            generator=keyed_generator(
                self.federation.seed, self.done, self.cards[i].client_id, "train", 0, 0
            ),
        )
        cut = list(order.split(min(BATCH, n)))
        if len(cut) > 1 and len(cut[-1]) == 1:
            cut[-2:] = [torch.cat(cut[-2:])]
        return cut

    def fit(
        self, i: int, modules: list[nn.Module], loss_of: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Train an epoch on one client's rows."""
        parameters = [
            p for module in modules for p in module.train().parameters() if p.requires_grad
        ]
        optimizer = torch.optim.SGD(parameters, LR, fused=True)
        x, y = self.train[i]["x"], self.train[i]["y"]
        total, batches = torch.zeros(()), self.batches(i)
        for rows in batches:
            optimizer.zero_grad()
            loss = loss_of(x[rows], y[rows])
            loss.backward()
            optimizer.step()
            total += loss.detach()
        self.losses[-1].append(float(total) / len(batches))

    @torch.no_grad()
    def evaluate(self, predict: Callable[[int, Tensor, bool], Tensor]) -> list[tuple[float, float]]:
        """Record (accuracy, loss) of every client on its test, common and validation rows."""
        scores = []
        for i, tests in enumerate(self.tests):
            for k, rows in enumerate([*tests, self.validation[i]]):
                if len(rows["y"]):
                    logits = torch.cat([predict(i, x, k == 0) for x in rows["x"].split(500)])
                    right = (logits.argmax(1) == rows["y"]).double().mean()
                    scores.append((float(right), float(F.cross_entropy(logits, rows["y"]))))
        return scores

    @torch.no_grad()
    def class_sums(self, i: int, readout: str) -> tuple[Tensor, Tensor]:
        """Return sums and counts by class of the outputs on the training rows."""
        rows, module = self.train[i], self.models[i].eval()
        values = torch.cat([getattr(module(x), readout) for x in rows["x"].split(500)])
        sums = torch.zeros(CLASSES, values.shape[1]).index_add_(0, rows["y"], values)
        return sums, torch.bincount(rows["y"], minlength=CLASSES).float()


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(softmax(q) ‖ softmax(p)), averaged over the batch; q is the teacher."""
    return F.kl_div(
        F.log_softmax(p, -1), F.log_softmax(q.detach(), -1), reduction="batchmean", log_target=True
    )


class FD(Loop):
    """Jeong et al. 2018: toward the consensus logits of the example's class."""

    teacher: Tensor | None = None
    known = torch.zeros(CLASSES)

    def round(self) -> None:
        """Train, average by class and evaluate."""
        self.losses.append([])
        sums, counts = torch.zeros(CLASSES, CLASSES), torch.zeros(CLASSES)
        for i, model in enumerate(self.models):
            self.fit(i, [model], lambda x, y, m=model: self._loss(m(x).logits, y))  # type: ignore[misc]
            own, n = self.class_sums(i, "logits")
            sums, counts = sums + own, counts + n
        self.teacher, self.known = sums / counts.clamp(min=1)[:, None], (counts > 0).float()
        self.evaluate(lambda i, x, home: self.models[i].eval()(x).logits)
        self.done += 1

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, y)
        if self.teacher is None:
            return loss
        log_t = F.log_softmax(self.teacher[y], -1)
        divergence = (log_t.exp() * (log_t - F.log_softmax(logits, -1))).sum(-1)
        return loss + (divergence * self.known[y]).mean()


class FedProto(Loop):
    """Tan et al. 2022: features toward class prototypes; predict the nearest prototype."""

    prototypes: Tensor | None = None
    known = torch.zeros(CLASSES)

    def round(self) -> None:
        """Train, average features by class and evaluate."""
        self.losses.append([])
        sums, counts = torch.zeros(()), torch.zeros(CLASSES)
        for i, model in enumerate(self.models):
            self.fit(i, [model], lambda x, y, m=model: self._loss(m(x), y))  # type: ignore[misc]
            own, n = self.class_sums(i, "features")
            sums, counts = sums + own, counts + n
        mean, sent = sums / counts.clamp(min=1)[:, None], counts > 0
        self.prototypes = (
            mean if self.prototypes is None else torch.where(sent[:, None], mean, self.prototypes)
        )
        self.known = torch.maximum(self.known, sent.float())
        self.evaluate(lambda i, x, home: self._nearness(self.models[i].eval()(x).features))
        self.done += 1

    def _loss(self, outputs: Any, y: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs.logits, y)
        if self.prototypes is None:
            return loss
        divergence = (outputs.features - self.prototypes[y]).square().mean(-1)
        return loss + (divergence * self.known[y]).mean()

    def _nearness(self, features: Tensor) -> Tensor:
        assert self.prototypes is not None
        return (-torch.cdist(features, self.prototypes)).masked_fill(self.known == 0, -1e9)


class FML(Loop):
    """Shen et al. 2020: each client's personal model and a shared one teach each other."""

    def __init__(self, prepared: PreparedRun) -> None:
        super().__init__(prepared)
        self.arch = self.cards[0].models["mentee"]
        self.mentee = module_of(prepared, self.arch)
        self.shared = {n: t.clone() for n, t in self.mentee.state_dict().items()}

    def round(self) -> None:
        """Train both, average the shared ones, and evaluate both."""
        self.losses.append([])
        total = sum(len(rows["y"]) for rows in self.train)
        mean = {n: torch.zeros_like(t) for n, t in self.shared.items()}
        for i, model in enumerate(self.models):
            self.mentee.load_state_dict(self.shared)
            self.learn(i, model)
            with torch.no_grad():
                for name, change in self.sent(i).items():
                    mean[name].add_(change, alpha=len(self.train[i]["y"]) / total)
        self.shared = self.combined(mean)
        self.mentee.load_state_dict(self.shared)
        self.evaluate(lambda i, x, home: (self.models[i] if home else self.mentee).eval()(x).logits)
        self.done += 1

    def learn(self, i: int, model: nn.Module) -> None:
        """Train a client for an epoch."""
        self.fit(
            i,
            [model, self.mentee],
            lambda x, y: self._loss(model(x).logits, self.mentee(x).logits, y),
        )

    def _loss(self, p: Tensor, m: Tensor, y: Tensor) -> Tensor:
        own = 0.5 * F.cross_entropy(p, y) + 0.5 * kl(p, m)
        return own + 0.5 * F.cross_entropy(m, y) + 0.5 * kl(m, p)

    def sent(self, i: int) -> dict[str, Tensor]:
        """Return the terms of the mean."""
        return self.mentee.state_dict()

    def combined(self, mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the next shared model."""
        return mean


class FedKD(FML):
    """Wu et al. 2022: FML with adaptive weights, feature distances and truncated updates."""

    def __init__(self, prepared: PreparedRun) -> None:
        super().__init__(prepared)
        self.hidden = [module_of(prepared, c.models["hidden"]) for c in self.cards]
        # A matrix without bias.
        for hidden in self.hidden:
            for name, parameter in hidden.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                    parameter.requires_grad_(False)

    def learn(self, i: int, model: nn.Module) -> None:
        hidden = self.hidden[i]

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            t, s = model(x), self.mentee(x)
            mentor, mentee = F.cross_entropy(t.logits, y), F.cross_entropy(s.logits, y)
            divergence = kl(t.logits, s.logits) + kl(s.logits, t.logits)
            features = F.mse_loss(t.features, hidden(s.features).logits)
            return mentor + mentee + (divergence + features) / (mentor + mentee).detach()

        self.fit(i, [model, self.mentee, hidden], loss_of)

    def energy(self) -> float:
        """Return the share of an update's energy that is kept."""
        return 0.95 + 0.03 * min(1.0, self.done / max(1, self.federation.num_rounds - 1))

    def sent(self, i: int) -> dict[str, Tensor]:
        now = self.mentee.state_dict()
        return {n: truncated(now[n] - t, self.energy()) for n, t in self.shared.items()}

    def combined(self, mean: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t + truncated(mean[n], self.energy()) for n, t in self.shared.items()}


def truncated(change: Tensor, energy: float) -> Tensor:
    """Return the fewest first singular triples with that energy; vectors stay whole."""
    if change.dim() < 2:
        return change
    flat = change.flatten(1)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum().clamp(min=1e-30)
    rank = int((share < energy).sum()) + 1
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).view_as(change)


LOOPS: dict[str, type[Any]] = {"fd": FD, "fedproto": FedProto, "fml": FML, "fedkd": FedKD}
