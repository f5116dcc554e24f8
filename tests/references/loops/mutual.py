"""Methods with a small common model, the mentee: FML, FedKD and FedMRL."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.algorithms.mutual import HIDDEN, MENTEE, PROJECTION
from tests.references.loops.base import (
    Loop,
    State,
    copied,
    divergence,
    floats,
    load,
    predicted,
)


class FML(Loop):
    """Each client's personal model and a shared one teach each other."""

    own_models = False

    def start(self) -> None:
        super().start()
        self.mentee = self.module(self.cards[0].models[MENTEE])
        self.shared = copied(floats(self.mentee))

    def server_models(self) -> dict[str, State]:
        return {MENTEE: self.shared}

    def work(self) -> None:
        total = sum(self.cards[i].num_rows for i in self.cohort)
        mean = {n: torch.zeros_like(t) for n, t in self.shared.items()}
        for i in self.cohort:
            load(self.mentee, self.shared)
            self.learn(i, self.models[i])
            with torch.no_grad():
                for name, tensor in self.sent().items():
                    mean[name].add_(tensor, alpha=self.cards[i].num_rows / total)
        self.shared = self.combined(mean)

    def learn(self, i: int, model: nn.Module) -> None:
        """Train a client."""
        a, b = self.method.alpha, self.method.beta

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            p, m = model(x), self.mentee(x)
            own = a * self.entropy(i, p, y) + (1 - a) * divergence(p, m)
            return own + b * self.entropy(i, m, y) + (1 - b) * divergence(m, p)

        self.train(i, model, loss, besides=[self.mentee])

    def sent(self) -> State:
        """Return the terms of the mean."""
        return floats(self.mentee)

    def combined(self, mean: State) -> State:
        """Return the next shared model."""
        return mean

    def evaluated(self, i: int) -> nn.Module:
        load(self.mentee, self.shared)
        return super().evaluated(i)

    def outputs(self, i: int, model: nn.Module, name: str) -> Tensor:
        return super().outputs(i, model if name == "test" else self.mentee, name)


class FedKD(FML):
    """FML with adaptive weights, feature distances and truncated updates."""

    def start(self) -> None:
        super().start()
        self.hidden = [self.module(c.models[HIDDEN]) for c in self.cards]
        # A matrix without bias.
        for hidden in self.hidden:
            bias = hidden.get_parameter("head.bias")
            nn.init.zeros_(bias)
            bias.requires_grad_(False)

    def learn(self, i: int, model: nn.Module) -> None:
        hidden = self.hidden[i]

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            own = model.forward_features(x)  # type: ignore[operator]
            shared = self.mentee.forward_features(x)  # type: ignore[operator]
            t, s = model.forward_head(own), self.mentee.forward_head(shared)  # type: ignore[operator]
            both = self.entropy(i, t, y) + self.entropy(i, s, y)
            apart = divergence(t, s) + divergence(s, t)
            features = F.mse_loss(own, hidden(shared))
            return both + (apart + self.method.hidden_weight * features) / both.detach()

        self.train(i, model, loss, besides=[self.mentee, hidden])

    def energy(self) -> float:
        """Return the share of an update's energy that is kept."""
        s, last = self.method, max(1, self.federation.num_rounds - 1)
        return float(s.energy_start + (s.energy_end - s.energy_start) * min(1, self.done / last))

    def sent(self) -> State:
        now = floats(self.mentee)
        return {n: truncated(now[n] - t, self.energy()) for n, t in self.shared.items()}

    def combined(self, mean: State) -> State:
        return {n: t + truncated(mean[n], self.energy()) for n, t in self.shared.items()}


def truncated(change: Tensor, energy: float) -> Tensor:
    """Return the fewest singular triples with that energy, or the whole if it is smaller."""
    if change.dim() < 2:
        return change
    flat = change.flatten(1)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum().clamp(min=1e-30)
    rank = int((share < energy).sum()) + 1
    if rank * sum(flat.shape) >= flat.numel():
        return change
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).view_as(change)


class FedMRL(FML):
    """A personal model, a small common one and a projection of both features."""

    own_models = True

    def start(self) -> None:
        super().start()
        self.projections = [self.module(c.models[PROJECTION]) for c in self.cards]

    def learn(self, i: int, model: nn.Module) -> None:
        projection, s = self.projections[i], self.method

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            g = self.mentee.forward_features(x)  # type: ignore[operator]
            r = projection(torch.cat([g, model.forward_features(x)], -1))  # type: ignore[operator]
            coarse = self.mentee.head(r[:, : g.shape[1]])  # type: ignore[operator]
            own = self.entropy(i, model.head(r), y)  # type: ignore[operator]
            return s.own_weight * own + s.mentee_weight * self.entropy(i, coarse, y)

        self.train(i, model, loss, besides=[self.mentee, projection])

    @torch.no_grad()
    def outputs(self, i: int, model: nn.Module, name: str) -> Tensor:
        x = self.data[i][name]["x"]
        g, f = predicted(self.mentee, x, "features"), predicted(model, x, "features")
        r = predicted(self.projections[i], torch.cat([g, f], 1))
        return model.head(r)  # type: ignore[operator,no-any-return]
