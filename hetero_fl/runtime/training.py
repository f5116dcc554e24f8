"""The training loop: the only one in the project. It carries out a `Fit` on live modules."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hetero_fl.config.clients import OptimizerConfig
from hetero_fl.objectives import Net, Nets
from hetero_fl.plan import Fit, FitReport
from hetero_fl.runtime.batches import Batches
from hetero_fl.runtime.dropout import KeyedDropout
from hetero_fl.runtime.plans import Diverged
from hetero_fl.runtime.templates import Template, Templates
from hetero_fl.seeding import key
from hetero_fl.state import Participant

Named = dict[str, nn.Parameter]  # "slot:name" -> trainable parameter


def fit_on_live_modules(participant: Participant, fit: Fit, templates: Templates) -> FitReport:
    """Train the fit's slots of the participant in place. The loss reported is the mean over the steps.

    Raises Diverged, and leaves the participant as it was, if the loss or a trained tensor is no longer finite.
    """
    live = {slot: templates(participant.arch[slot], slot) for slot in (*fit.train, *fit.frozen)}
    trainable = _prepare(participant, fit, live)
    nets = Nets({slot: Net.live(template.module) for slot, template in live.items()})
    optimizer = make_optimizer(fit.optimizer, trainable)
    if fit.keep:
        _restore(optimizer, trainable, participant.state.get("optimizers", {}).get(fit.keep, {}))
    given = _on(templates.device, fit.given)
    drift = [(p, fit.drift[slot][name].to(p)) for slot, name, p in _split(trainable) if name in fit.drift.get(slot, {})]
    batches = Batches(participant, fit, templates.device)
    drops = any(t.drops for t in live.values())
    parameters = list(trainable.values())
    total = torch.zeros((), device=templates.device)
    with torch.random.fork_rng(devices=templates.forked):
        torch.manual_seed(key(*batches.stream, "torch"))  # whatever a model draws besides nn.Dropout is keyed too
        for i, (dropout_key, batch) in enumerate(batches):
            if fit.anneal:
                _set_rate(optimizer, 0.5 * (1 + math.cos(math.pi * i / len(batches))))
            optimizer.zero_grad()
            with KeyedDropout(dropout_key) if drops else contextlib.nullcontext():
                loss = fit.objective.total(nets, batch, given)
            loss.backward()
            if fit.optimizer.clip_norm:
                nn.utils.clip_grad_norm_(parameters, fit.optimizer.clip_norm, foreach=True)
            optimizer.step()
            if drift:
                torch._foreach_add_([p.data for p, _ in drift], [d for _, d in drift], alpha=-fit.optimizer.lr)
            total += loss.detach()
    if not all(
        map(math.isfinite, [float(total), *(float(n) for n in torch._foreach_norm([p.detach() for p in parameters]))])
    ):
        raise Diverged(f"'{fit.label}' is no longer finite (loss {float(total) / len(batches):g})")
    for slot in fit.train:
        participant.models[slot] = live[slot].copy_out()
    if fit.keep:
        participant.state.setdefault("optimizers", {})[fit.keep] = _snapshot(optimizer, trainable)
    return FitReport(len(batches), batches.examples, float(total) / len(batches))


def _prepare(participant: Participant, fit: Fit, live: Mapping[str, Template]) -> Named:
    """Load tensors, set modes and gradients; returns what is to be trained."""
    trainable: Named = {}
    for slot, template in live.items():
        template.load(participant.models[slot])
        training = slot in fit.train
        template.module.train(training)
        part = fit.train[slot] if training else ()
        for name, parameter in template.parameters.items():
            parameter.grad = None
            parameter.requires_grad_(training and (part is None or name.startswith(part)))
            if parameter.requires_grad:
                trainable[f"{slot}:{name}"] = parameter
    return trainable


def make_optimizer(config: OptimizerConfig, trainable: Named) -> torch.optim.Optimizer:
    """The torch optimiser; heads may have their own rate. Its fused form takes a third of the time of the others on CPUs."""
    heads = [p for _, name, p in _split(trainable) if name.startswith("head.")] if config.head_lr else []
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


def _split(trainable: Named) -> list[tuple[str, str, nn.Parameter]]:
    return [(*name.rsplit(":", 1), p) for name, p in trainable.items()]  # type: ignore[misc]


def _set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("first_lr", group["lr"]) * factor


def _snapshot(optimizer: torch.optim.Optimizer, trainable: Named) -> dict[str, dict[str, Tensor]]:
    copy = {k: optimizer.state[p] for k, p in trainable.items() if p in optimizer.state}
    return {
        k: {n: torch.as_tensor(v).detach().to("cpu", copy=True) for n, v in s.items() if v is not None}
        for k, s in copy.items()
    }


def _restore(optimizer: torch.optim.Optimizer, trainable: Named, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, state in saved.items():
        p = trainable[name]
        # Fused optimisers want their step counter on the parameter's device, and in float32 whatever the parameter is.
        optimizer.state[p] = {
            n: t.to(p.device, copy=True) if n == "step" else t.to(p, copy=True) for n, t in state.items()
        }


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device)
    return {k: _on(device, v) for k, v in value.items()} if isinstance(value, Mapping) else value
