"""What the two training loops, live and stacked, have in common: optimisers, what is kept of them, what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hetero_fl.config.optimizer import OptimizerConfig
from hetero_fl.plan import Fit
from hetero_fl.runtime.plans import Diverged

Named = dict[str, Tensor]  # "slot:name" -> what an optimiser moves
Kept = dict[str, dict[str, Tensor]]  # "slot:name" -> an optimiser's state of it


def is_trained(fit: Fit, slot: str, name: str) -> bool:
    """Whether the fit moves this parameter of the slot."""
    if slot not in fit.train:
        return False
    part = fit.train[slot]
    return part is None or name.startswith(part)


def split_name(key: str) -> tuple[str, str]:
    """Slot and parameter of a key of `Named`."""
    slot, name = key.rsplit(":", 1)
    return slot, name


def make_optimizer(config: OptimizerConfig, trainable: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """The torch optimiser; heads may have their own rate. Its fused form takes a third of the time of the others on CPUs."""
    heads = [p for key, p in trainable.items() if split_name(key)[1].startswith("head.")] if config.head_lr else []
    ids = set(map(id, heads))
    groups: list[dict[str, Any]] = [{"params": [p for p in trainable.values() if id(p) not in ids]}]
    if heads:
        groups.append({"params": heads, "lr": config.head_lr})
    groups = [g for g in groups if g["params"]]
    fused = next(iter(trainable.values())).device.type in ("cpu", "cuda")
    common: dict[str, Any] = {"weight_decay": config.weight_decay, "fused": fused}
    if config.name == "sgd":
        return torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.nesterov, **common)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, config.lr, **common)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every learning rate becomes so much of what it was at first."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("first_lr", group["lr"]) * factor


def snapshot(optimizer: torch.optim.Optimizer, trainable: Mapping[str, Tensor]) -> Kept:
    """The optimiser's state, in memory of its own."""
    copy = {k: optimizer.state[p] for k, p in trainable.items() if p in optimizer.state}
    return {
        k: {
            n: torch.as_tensor(v).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for n, v in s.items()
            if v is not None
        }
        for k, s in copy.items()
    }


def restore(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, Tensor], saved: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """The reverse of `snapshot`."""
    for name, state in saved.items():
        p = trainable[name]
        # Fused optimisers want their step counter on the parameter's device, and in float32 whatever the parameter is; the
        # rest in the parameter's own layout.
        optimizer.state[p] = {
            n: t.to(p.device, copy=True) if n == "step" else torch.empty_like(p).copy_(t) for n, t in state.items()
        }


def on_device(device: torch.device, value: Any) -> Any:
    """A tree of tensors, detached, on the device."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    return {k: on_device(device, v) for k, v in value.items()} if isinstance(value, Mapping) else value


def diverged(fit: Fit, loss: float) -> Diverged:
    """What is said of a fit that ended in something else than numbers; `loss` is the mean over its steps."""
    return Diverged(f"'{fit.label}' is no longer finite (loss {loss:g})")
