"""Methods that average parameters: FedAvg and its variants."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.utils.seeding import Key, keyed_generator
from tests.references.loops.base import LR, READ, Loop, State, floats, load, predicted


class FedAvg(Loop):
    """Average all parameters or a part within each architecture, with one module each."""

    def start(self) -> None:
        archs = {c.arch.spec_id: c.arch for c in self.cards}
        self.modules = {group: self.module(arch) for group, arch in archs.items()}
        self.shared = {group: copied(floats(module)) for group, module in self.modules.items()}
        self.kept: list[State] = [{} for _ in self.cards]
        self.total = {
            g: sum(float(c.num_rows) for c in self.cards if c.arch.spec_id == g) for g in archs
        }

    def is_local(self, arch: Any, name: str) -> bool:
        """Return whether a tensor stays with its client."""
        return False

    def received(self, i: int) -> nn.Module:
        """Return the client's module at the start of a round."""
        group = self.cards[i].arch.spec_id
        return load(self.modules[group], self.shared[group], self.kept[i])

    def work(self) -> None:
        mean = {
            g: {n: torch.zeros_like(t) for n, t in shared.items()}
            for g, shared in self.shared.items()
        }
        for i, client_info in enumerate(self.cards):
            module = self.received(i)
            self.local(i, module)
            share = client_info.num_rows / self.total[client_info.arch.spec_id]
            with torch.no_grad():
                for name, tensor in floats(module).items():
                    if self.is_local(client_info.arch, name):
                        self.kept[i][name] = tensor.clone()
                    else:
                        mean[client_info.arch.spec_id][name].add_(tensor, alpha=share)
        with torch.no_grad():
            self.combine(mean)

    def local(self, i: int, module: nn.Module) -> None:
        """Train one client."""
        self.train(i, module)

    def combine(self, mean: dict[str, State]) -> None:
        """Return the next shared models."""
        self.shared = mean

    def read(self) -> None:
        predictions: dict[Any, Tensor] = {}
        for i, client_info in enumerate(self.cards):
            module = self.tuned(i, self.received(i))
            for name in READ:
                key = (client_info.arch.spec_id, name)
                # Equal models have equal outputs.
                if name == "test" or self.kept[i] or key not in predictions:
                    predictions[key] = predicted(module, self.data[i][name]["x"])
                self.score(i, name, predictions[key])

    def tuned(self, i: int, module: nn.Module) -> nn.Module:
        """Return the model that is evaluated."""
        return module


class FedProx(FedAvg):
    """FedAvg with a proximal term toward the start of the round."""

    def local(self, i: int, module: nn.Module) -> None:
        self.train(i, module, near(module, copied(floats(module)), self.method.mu))


class FedAsync(FedAvg):
    """Asynchronous updates of tasks that start and end together: staleness increases by one."""

    def start(self) -> None:
        super().start()
        self.version = 0

    def draws(self, who: str, label: str, *more: Key, use: int = 0) -> torch.Generator:
        return keyed_generator(self.federation.seed, self.version, who, label, use, *more)

    def work(self) -> None:
        sent = []
        for i in range(len(self.cards)):
            module = self.received(i)
            self.local(i, module)
            sent.append(copied(floats(module)))
        with torch.no_grad():
            self.version += self.take(sent)

    def take(self, sent: list[State]) -> int:
        """Return how many versions follow from the uploads."""
        for stale, (client_info, end) in enumerate(zip(self.cards, sent, strict=True)):
            rate = self.method.alpha * (1 + stale) ** -0.5
            for name, tensor in self.shared[client_info.arch.spec_id].items():
                tensor.lerp_(end[name], rate)
        return len(sent)


class FedBuff(FedAsync):
    """Asynchronous averages of changes in buffers of size K."""

    def take(self, sent: list[State]) -> int:
        began, size = {g: copied(shared) for g, shared in self.shared.items()}, self.method.buffer
        for stale in range(len(sent) // size):
            now = range(stale * size, (stale + 1) * size)
            for group, shared in self.shared.items():
                parameters = dict(self.modules[group].named_parameters())
                ends = [sent[i] for i in now if self.cards[i].arch.spec_id == group]
                for name, tensor in shared.items() if ends else ():
                    mean, s = torch.stack([end[name] for end in ends]).mean(0), (1 + stale) ** -0.5
                    change = mean - (began[group][name] if name in parameters else tensor)
                    tensor.add_(
                        change, alpha=s * self.method.server_lr if name in parameters else s
                    )
        return len(sent) // size


class FedOpt(FedAvg):
    """FedAvgM, FedAdam and FedYogi: an optimizer at the server."""

    def start(self) -> None:
        super().start()
        self.first: State = {}
        self.second: State = {}

    def combine(self, mean: dict[str, State]) -> None:
        for group, shared in self.shared.items():
            parameters = dict(self.modules[group].named_parameters())
            for name, tensor in mean[group].items():
                if name in parameters:
                    shared[name] = shared[name] + self.move(
                        f"{group} {name}", tensor - shared[name]
                    )
                else:
                    shared[name] = tensor

    def move(self, key: str, change: Tensor) -> Tensor:
        """Return the change of a parameter."""
        s = self.method
        if self.name == "fedavgm":
            self.first[key] = s.momentum * self.first[key] + change if key in self.first else change
            return s.server_lr * self.first[key]
        m, v = (
            self.first.get(key, torch.zeros_like(change)),
            self.second.get(key, torch.full_like(change, s.tau**2)),
        )
        square = change.square()
        m = s.beta1 * m + (1 - s.beta1) * change
        v = (
            v - (1 - s.beta2) * square * (v - square).sign()
            if self.name == "fedyogi"
            else s.beta2 * v + (1 - s.beta2) * square
        )
        self.first[key], self.second[key] = m, v
        return s.server_lr * m / (v.sqrt() + s.tau)


class Scaffold(FedAvg):
    """Gradient steps corrected by control variates."""

    def start(self) -> None:
        super().start()
        names = {g: [n for n, _ in m.named_parameters()] for g, m in self.modules.items()}
        self.control = {
            g: [torch.zeros_like(self.shared[g][n]) for n in some] for g, some in names.items()
        }
        self.mine = [[t.clone() for t in self.control[c.arch.spec_id]] for c in self.cards]

    def work(self) -> None:
        self.moved = {
            g: [torch.zeros_like(t) for t in control] for g, control in self.control.items()
        }
        super().work()
        for g, moved in self.moved.items():
            torch._foreach_add_(self.control[g], moved)

    def local(self, i: int, module: nn.Module) -> None:
        group, steps = self.cards[i].arch.spec_id, 0
        parameters = [p.data for p in module.parameters()]
        start, control, own = [p.clone() for p in parameters], self.control[group], self.mine[i]
        drift = torch._foreach_sub(control, own)

        def correct() -> None:
            nonlocal steps
            torch._foreach_add_(parameters, drift, alpha=-LR)
            steps += 1

        self.train(i, module, after=correct)
        path = torch._foreach_div(torch._foreach_sub(start, parameters), steps * LR)
        change = torch._foreach_sub(path, control)
        torch._foreach_add_(own, change)
        torch._foreach_add_(
            self.moved[group], change, alpha=self.cards[i].num_rows / self.total[group]
        )


class HeteroFL(FedAvg):
    """Clients train the leading channels of a wide model and keep BatchNorm statistics."""

    def start(self) -> None:
        super().start()
        self.wide = copied(floats(self.module(self.method.wide_model(self.cards[0].arch))))

    def is_local(self, arch: Any, name: str) -> bool:
        return "running" in name

    def received(self, i: int) -> nn.Module:
        module = self.modules[self.cards[i].arch.spec_id]
        own = {n: corner(self.wide[n], t) for n, t in floats(module).items()}
        return load(module, own, self.kept[i])

    def work(self) -> None:
        total = {n: torch.zeros_like(t) for n, t in self.wide.items()}
        owned = {n: torch.zeros_like(t) for n, t in self.wide.items()}
        for i, client_info in enumerate(self.cards):
            module = self.received(i)
            self.train(i, module)
            with torch.no_grad():
                for name, tensor in floats(module).items():
                    if self.is_local(client_info.arch, name):
                        self.kept[i][name] = tensor.clone()
                    else:
                        corner(total[name], tensor).add_(tensor)
                        corner(owned[name], tensor).add_(1)
        for name, now in self.wide.items():
            self.wide[name] = torch.where(
                owned[name] > 0, total[name] / owned[name].clamp(min=1), now
            )


def corner(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the leading slice with the shape of another tensor."""
    return tensor[tuple(slice(0, size) for size in like.shape)]


def copied(state: State) -> State:
    """Return a deep copy."""
    return {n: t.clone() for n, t in state.items()}


def near(module: nn.Module, anchor: State, mu: float) -> Any:
    """Return the task loss plus (μ/2)‖θ − anchor‖²."""
    pairs = [(p, anchor[n]) for n, p in module.named_parameters()]

    def loss(x: Tensor, y: Tensor, step: int) -> Tensor:
        divergence = torch.stack([(p - a).square().sum() for p, a in pairs]).sum()
        return F.cross_entropy(module(x).logits, y) + mu / 2 * divergence

    return loss
