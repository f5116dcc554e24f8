"""Methods that average parameters: FedAvg and its variants."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.references.loops.base import (
    Loop,
    Loss,
    State,
    copied,
    floats,
    load,
)

Weights = dict[str, dict[str, float]]


class FedAvg(Loop):
    """Average all parameters or a part within each architecture, with one module each."""

    own_models = False
    # Random stream of fine-tuning.
    tuning = "fine-tune"

    def start(self) -> None:
        archs = {c.arch.spec_id: c.arch for c in self.cards}
        self.modules = {group: self.module(arch) for group, arch in archs.items()}
        self.shared = {group: copied(floats(module)) for group, module in self.modules.items()}
        self.kept: list[State] = []
        for i in range(len(self.cards)):
            start = self.shared[self.group(i)]
            self.kept.append({n: t.clone() for n, t in start.items() if not self.takes(i, n)})

    def server_models(self) -> dict[str, State]:
        return self.shared

    def group(self, i: int) -> str:
        """Return the architecture of a client."""
        return str(self.cards[i].arch.spec_id)

    def sends(self, i: int, name: str) -> bool:
        """Return whether a client uploads a tensor."""
        shares = self.cards[i].settings.shares
        return "parameters" in shares or ("backbone" in shares and name.startswith("backbone."))

    def takes(self, i: int, name: str) -> bool:
        """Return whether a client replaces a tensor with the server's."""
        return self.sends(i, name)

    def weight(self, i: int) -> float:
        """Return the weight of a client in the mean."""
        return float(self.cards[i].num_rows) if self.method.weighting == "samples" else 1.0

    def received(self, i: int) -> nn.Module:
        """Return the client's module at the start of a round."""
        group = self.group(i)
        return load(self.modules[group], self.shared[group], self.kept[i])

    def work(self) -> None:
        total = self.total_weights()
        mean = {
            g: {n: torch.zeros_like(self.shared[g][n]) for n in weights}
            for g, weights in total.items()
        }
        for i in self.cohort:
            module, group = self.received(i), self.group(i)
            self.local(i, module)
            with torch.no_grad():
                for name, tensor in floats(module).items():
                    if self.sends(i, name):
                        share = self.weight(i) / total[group][name]
                        mean[group][name].add_(tensor, alpha=share)
                    if not self.takes(i, name):
                        self.kept[i][name] = tensor.clone()
        with torch.no_grad():
            self.combine(mean, total)

    def total_weights(self) -> Weights:
        """Return the total weight of each tensor that the cohort sends, by architecture."""
        total: Weights = {}
        for i in self.cohort:
            weights = total.setdefault(self.group(i), {})
            for name in self.shared[self.group(i)]:
                if self.sends(i, name):
                    weights[name] = weights.get(name, 0.0) + self.weight(i)
        return total

    def local(self, i: int, module: nn.Module) -> None:
        """Train one client."""
        self.train(i, module)

    def combine(self, mean: dict[str, State], total: Weights) -> None:
        """Compute the next shared models."""
        for group, means in mean.items():
            parameters = self.parameters(group)
            for name, new in means.items():
                rate = self.method.server_lr
                if self.method.weighting == "sum":
                    rate *= total[group][name]
                    # A variance never moves beyond the mean.
                    rate = rate if name in parameters else min(1.0, rate)
                elif name not in parameters:
                    rate = 1.0
                old = self.shared[group][name]
                self.shared[group][name] = new if rate == 1 else old + rate * (new - old)

    def parameters(self, group: str) -> set[str]:
        """Return the names of the parameters of an architecture; other tensors are statistics."""
        return {name for name, _ in self.modules[group].named_parameters()}

    def evaluated(self, i: int) -> nn.Module:
        return self.tuned(i, self.received(i))

    def like(self, i: int, name: str) -> Any:
        card = self.cards[i]
        is_own = name == "test" or self.kept[i] or card.settings.fine_tune_epochs
        return i if is_own else (self.group(i), card.preprocess)

    def tuned(self, i: int, module: nn.Module) -> nn.Module:
        """Return the model that is evaluated, after fine-tuning."""
        epochs = self.cards[i].settings.fine_tune_epochs
        if epochs:
            self.train(i, module, label=self.tuning, epochs=epochs)
        return module


class FedLC(FedAvg):
    """FedAvg with margins τ·n_c^(−1/4); classes without rows leave the softmax."""

    def local(self, i: int, module: nn.Module) -> None:
        counts = self.counts[i]
        margins = torch.where(counts > 0, self.method.tau * counts.pow(-0.25), torch.inf)

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            z = module(x) - margins
            true = z[torch.arange(len(y)), y]
            if self.method.denominator == "others":
                z = z.masked_fill(F.one_hot(y, z.shape[1]).bool(), -torch.inf)
            return (z.logsumexp(1) - true).mean()

        self.train(i, module, loss)


class FedProx(FedAvg):
    """FedAvg with a proximal term toward the start of the round."""

    def local(self, i: int, module: nn.Module) -> None:
        self.train(i, module, self.near(i, module, copied(floats(module)), self.method.mu))

    def near(self, i: int, module: nn.Module, anchor: State, mu: float) -> Loss:
        """Return the task loss plus (μ/2)‖θ − anchor‖²."""
        pairs = [(p, anchor[n]) for n, p in module.named_parameters()]

        def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
            distance = torch.stack([(p - a).square().sum() for p, a in pairs]).sum()
            return self.entropy(i, module(x), y) + mu / 2 * distance

        return loss


class FedNova(FedAvg):
    """Changes divided by their step counts; their mean is scaled by the mean step count."""

    def work(self) -> None:
        self.lengths: list[float] = [0.0] * len(self.cards)
        self.began = {g: copied(shared) for g, shared in self.shared.items()}
        super().work()

    def local(self, i: int, module: nn.Module) -> None:
        steps = self.train(i, module)
        optimizer = self.cards[i].settings.optimizer
        # The sum of the factors of all gradients (eq. 5).
        length = sum(
            (1 - optimizer.momentum ** (steps - k + optimizer.nesterov)) / (1 - optimizer.momentum)
            for k in range(steps)
        )
        self.lengths[i] = length
        start = self.began[self.group(i)]
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.sub_(start[name]).div_(length)

    def combine(self, mean: dict[str, State], total: Weights) -> None:
        for group, means in mean.items():
            members = [i for i in self.cohort if self.group(i) == group]
            weight = sum(self.weight(i) for i in members)
            length = sum(self.weight(i) * self.lengths[i] for i in members) / weight
            for name in self.parameters(group):
                change = self.method.server_lr * length * means[name]
                means[name] = self.began[group][name] + change
            self.shared[group].update(means)


class ServerOptimizer(FedAvg):
    """An optimizer at the server, whose gradient is the mean change of a parameter."""

    def start(self) -> None:
        super().start()
        self.first: State = {}
        self.second: State = {}

    def combine(self, mean: dict[str, State], total: Weights) -> None:
        for group, means in mean.items():
            for name in self.parameters(group):
                old = self.shared[group][name]
                means[name] = old + self.move(f"{group} {name}", means[name] - old)
            self.shared[group].update(means)

    def move(self, key: str, change: Tensor) -> Tensor:
        """Return the step of a parameter."""
        raise NotImplementedError


class FedAvgM(ServerOptimizer):
    """Momentum at the server."""

    def move(self, key: str, change: Tensor) -> Tensor:
        before = self.first.get(key, torch.zeros_like(change))
        self.first[key] = self.method.momentum * before + change
        return self.method.server_lr * self.first[key]


class FedAdam(ServerOptimizer):
    """Adam at the server, without bias correction."""

    def move(self, key: str, change: Tensor) -> Tensor:
        s = self.method
        m = self.first.get(key, torch.zeros_like(change))
        v = self.second.get(key, torch.full_like(change, s.tau**2))
        self.first[key] = s.beta1 * m + (1 - s.beta1) * change
        self.second[key] = self.squares(v, change.square())
        return s.server_lr * self.first[key] / (self.second[key].sqrt() + s.tau)

    def squares(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the next mean of squares."""
        return self.method.beta2 * v + (1 - self.method.beta2) * square


class FedYogi(FedAdam):
    """Yogi at the server."""

    def squares(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.method.beta2) * square * (v - square).sign()


class Scaffold(FedAvg):
    """Gradient steps corrected by control variates."""

    def start(self) -> None:
        super().start()
        self.control = {
            g: [torch.zeros_like(p.data) for p in m.parameters()] for g, m in self.modules.items()
        }
        self.mine = [
            [t.clone() for t in self.control[self.group(i)]] for i in range(len(self.cards))
        ]

    def work(self) -> None:
        self.moved = {g: [torch.zeros_like(t) for t in c] for g, c in self.control.items()}
        super().work()
        for g, moved in self.moved.items():
            torch._foreach_add_(self.control[g], moved)

    def local(self, i: int, module: nn.Module) -> None:
        group, lr = self.group(i), self.rate(self.cards[i].settings.optimizer)
        parameters = [p.data for p in module.parameters()]
        start, control, own = [p.clone() for p in parameters], self.control[group], self.mine[i]
        drift = torch._foreach_sub(control, own)

        def correct() -> None:
            torch._foreach_add_(parameters, drift, alpha=-lr)

        steps = self.train(i, module, after=correct)
        path = torch._foreach_div(torch._foreach_sub(start, parameters), steps * lr)
        change = torch._foreach_sub(path, control)
        torch._foreach_add_(own, change)
        everyone = [k for k in range(len(self.cards)) if self.group(k) == group]
        present = [k for k in everyone if k in self.cohort]
        share = self.weight(i) / sum(self.weight(k) for k in present)
        torch._foreach_add_(self.moved[group], change, alpha=share * len(present) / len(everyone))


class HeteroFL(FedAvg):
    """Clients train the leading channels of a wide model and keep BatchNorm statistics."""

    def start(self) -> None:
        super().start()
        self.arch = self.method.wide_model(self.cards[0].arch)
        self.wide = copied(floats(self.module(self.arch)))

    def server_models(self) -> dict[str, State]:
        return {self.arch.spec_id: {n: t for n, t in self.wide.items() if "running" not in n}}

    def sends(self, i: int, name: str) -> bool:
        return "running" not in name

    def received(self, i: int) -> nn.Module:
        module = self.modules[self.group(i)]
        own = {n: corner(self.wide[n], t) for n, t in floats(module).items()}
        return load(module, own, self.kept[i])

    def present(self, i: int) -> Tensor:
        """Return 1 for classes that count for a client."""
        hides = self.method.masked and "statistics" in self.cards[i].settings.shares
        return (self.counts[i] > 0).to(self.counts[i]) if hides else torch.ones_like(self.counts[i])

    def work(self) -> None:
        total = {n: torch.zeros_like(t) for n, t in self.wide.items()}
        owned = {n: torch.zeros_like(t) for n, t in self.wide.items()}
        for i in self.cohort:
            module, present = self.received(i), self.present(i)

            def loss(
                x: Tensor,
                y: Tensor,
                step: int,
                i: int = i,
                module: Any = module,
                has: Any = present,
            ) -> Tensor:
                return self.entropy(i, module(x) * has, y)

            self.train(i, module, loss if self.method.masked else None)
            with torch.no_grad():
                for name, tensor in floats(module).items():
                    if not self.sends(i, name):
                        self.kept[i][name] = tensor.clone()
                        continue
                    weight = torch.full_like(tensor, self.weight(i))
                    if name.startswith("head."):
                        weight *= present.view(-1, *[1] * (tensor.dim() - 1))
                    corner(total[name], tensor).add_(weight * tensor)
                    corner(owned[name], tensor).add_(weight)
        for name, now in self.wide.items():
            mean = total[name] / owned[name].clamp(min=1)
            self.wide[name] = torch.where(owned[name] > 0, mean, now)

    def score(self, i: int, name: str, logits: Tensor) -> None:
        super().score(i, name, logits * self.present(i) if name == "test" else logits)


def corner(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the leading slice with the shape of another tensor."""
    return tensor[tuple(slice(0, size) for size in like.shape)]
