"""The training loop on live modules, one participant at a time. There is one other, on stacked models (stacked.py)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hetero_fl.nets import Batch, Net, Nets
from hetero_fl.plan import Fit, FitReport
from hetero_fl.runtime.batches import Batches
from hetero_fl.runtime.dropout import KeyedDropout
from hetero_fl.runtime.fitting import (
    Named,
    diverged,
    is_trained,
    make_optimizer,
    on_device,
    restore,
    set_rate,
    snapshot,
    split_name,
)
from hetero_fl.runtime.templates import Template, Templates
from hetero_fl.seeding import key, seed_torch
from hetero_fl.state import Participant


@dataclass
class Live:
    """A fit on its way: its modules by slot, those of their parameters that move, and what its steps see."""

    fit: Fit
    modules: Mapping[str, Template]
    trainable: Named
    nets: Nets
    given: Mapping[str, Any]
    batches: Batches

    @property
    def drops(self) -> bool:
        """Whether a model has dropout."""
        return any(template.drops for template in self.modules.values())


class Gradients(Protocol):
    """How the batches of a fit are drawn and the gradients of a step made."""

    def batches(self, participant: Participant, fit: Fit, device: torch.device) -> Batches:
        """The steps of the fit."""
        ...

    def set(self, live: Live, step: int, dropout_key: int, batch: Batch) -> Tensor:
        """Set `grad` of what is trained, which is None before; the loss, as far as it may be told."""
        ...


class Ordinary:
    """The gradient of the mean loss on a batch, and of the penalty."""

    def batches(self, participant: Participant, fit: Fit, device: torch.device) -> Batches:
        return Batches(participant, fit, device)

    def set(self, live: Live, step: int, dropout_key: int, batch: Batch) -> Tensor:
        with KeyedDropout(dropout_key) if live.drops else contextlib.nullcontext():
            loss = live.fit.objective.total(live.nets, batch, live.given)
        loss.backward()
        return loss.detach()


ORDINARY = Ordinary()


def fit_on_live_modules(
    participant: Participant, fit: Fit, templates: Templates, gradients: Gradients = ORDINARY
) -> FitReport:
    """Train the fit's slots of the participant in place. The loss reported is the mean over the steps.

    Raises Diverged, and leaves the participant as it was, if the loss or a trained tensor is no longer finite.
    """
    live = {slot: templates(participant.arch[slot], slot) for slot in (*fit.train, *fit.frozen)}
    trainable = _prepare(participant, fit, live)
    nets = Nets({slot: Net.live(template.module) for slot, template in live.items()})
    optimizer = make_optimizer(fit.optimizer, trainable)
    if fit.keep:
        restore(optimizer, trainable, participant.state.get("optimizers", {}).get(fit.keep, {}))
    given = on_device(templates.device, fit.given)
    named = [(*split_name(n), p) for n, p in trainable.items()]
    drift = [(p, fit.drift[slot][name].to(p)) for slot, name, p in named if name in fit.drift.get(slot, {})]
    batches = gradients.batches(participant, fit, templates.device)
    going = Live(fit, live, trainable, nets, given, batches)
    parameters = list(trainable.values())
    total = torch.zeros((), device=templates.device)
    with torch.random.fork_rng(devices=templates.forked):
        # Whatever a model draws besides nn.Dropout is keyed too.
        seed_torch(key(*batches.stream, "torch"), templates.device)
        for i, (dropout_key, batch) in enumerate(batches):
            if fit.anneal:
                set_rate(optimizer, 0.5 * (1 + math.cos(math.pi * i / len(batches))))
            optimizer.zero_grad()
            loss = gradients.set(going, i, dropout_key, batch)
            if fit.optimizer.clip_norm:
                nn.utils.clip_grad_norm_(parameters, fit.optimizer.clip_norm, foreach=True)
            optimizer.step()
            if drift:
                torch._foreach_add_([p.data for p, _ in drift], [d for _, d in drift], alpha=-fit.optimizer.lr)
            total += loss
    if not all(
        map(math.isfinite, [float(total), *(float(n) for n in torch._foreach_norm([p.detach() for p in parameters]))])
    ):
        raise diverged(fit, float(total) / len(batches))
    for slot in fit.train:
        participant.models[slot] = live[slot].copy_out()
    if fit.keep:
        participant.state.setdefault("optimizers", {})[fit.keep] = snapshot(optimizer, trainable)
    return FitReport(len(batches), batches.examples, float(total) / len(batches))


def _prepare(participant: Participant, fit: Fit, live: Mapping[str, Template]) -> Named:
    """Load tensors, set modes and gradients; returns what is to be trained."""
    trainable: Named = {}
    for slot, template in live.items():
        template.load(participant.models[slot])
        template.set_mode(training=slot in fit.train)
        for name, parameter in template.parameters.items():
            parameter.grad = None
            parameter.requires_grad_(is_trained(fit, slot, name))
            if parameter.requires_grad:
                trainable[f"{slot}:{name}"] = parameter
    return trainable
