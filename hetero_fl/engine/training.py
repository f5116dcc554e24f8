"""The training loop on live modules, and the optimizers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.objectives import Batch, ModelView, ModelViews
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit, FitReport
from hetero_fl.engine.batches import Batches
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import DivergedError
from hetero_fl.engine.dropout import DropoutStreams
from hetero_fl.engine.templates import Template, Templates
from hetero_fl.utils.seeding import seed_torch, stream_key

# What the two training loops, live and stacked, have in common: optimizers, what is kept of them,
# what is trained.

TrainableTensors = dict[str, Tensor]  # "slot:name" -> what an optimizer moves
OptimizerSnapshot = dict[str, dict[str, Tensor]]  # "slot:name" -> an optimizer's state of it


def is_trained(fit: Fit, slot: str, name: str) -> bool:
    """Whether the fit moves this parameter of the slot."""
    if slot not in fit.train:
        return False
    part = fit.train[slot]
    return part is None or name.startswith(part)


def split_name(key: str) -> tuple[str, str]:
    """Slot and parameter of a key of `TrainableTensors`."""
    slot, name = key.rsplit(":", 1)
    return slot, name


def make_optimizer(
    config: OptimizerConfig, trainable: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """Return the torch optimizer of some tensors.

    Its fused form takes a third of the time of the others on CPUs.

    Args:
        config: Settings of the optimizer; heads may have their own learning rate.
        trainable: The tensors by slot and name.
    """
    heads = [key for key in trainable if config.head_lr and split_name(key)[1].startswith("head.")]
    groups: list[dict[str, Any]] = [
        {"params": [p for key, p in trainable.items() if key not in heads]},
        {"params": [trainable[key] for key in heads], "lr": config.head_lr},
    ]
    groups = [group for group in groups if group["params"]]
    fused = next(iter(trainable.values())).device.type in ("cpu", "cuda")
    common: dict[str, Any] = {"weight_decay": config.weight_decay, "fused": fused}
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, config.lr, config.momentum, nesterov=config.nesterov, **common
        )
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, config.lr, **common)


def scale_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every learning rate becomes so much of what it was at first."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("first_lr", group["lr"]) * factor


def snapshot_optimizer(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, Tensor], device: torch.device
) -> OptimizerSnapshot:
    """Return a copy of the optimizer's state on a device."""
    copy = {k: optimizer.state[p] for k, p in trainable.items() if p in optimizer.state}
    return {
        k: {
            n: torch.as_tensor(v)
            .detach()
            .to(device, copy=True, memory_format=torch.contiguous_format)
            for n, v in s.items()
            if v is not None
        }
        for k, s in copy.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    trainable: Mapping[str, Tensor],
    saved: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """The reverse of `snapshot_optimizer`."""
    for name, state in saved.items():
        p = trainable[name]
        # Fused optimizers want their step counter on the parameter's device, and in float32 whatever the parameter is; the
        # rest in the parameter's own layout.
        optimizer.state[p] = {
            n: t.to(p.device, copy=True) if n == "step" else torch.empty_like(p).copy_(t)
            for n, t in state.items()
        }


def move_to_device(memory: DeviceMemory, value: Any) -> Any:
    """Return a tree of tensors, detached, on the device; copies are kept as long as their originals."""
    if isinstance(value, Tensor):
        return memory.keep(value).detach().to(memory.device)
    return (
        {k: move_to_device(memory, v) for k, v in value.items()}
        if isinstance(value, Mapping)
        else value
    )


def divergence_message(fit: Fit, loss: float) -> DivergedError:
    """What is said of a fit that ended in something else than numbers; `loss` is the mean over its steps."""
    return DivergedError(f"'{fit.label}' is no longer finite (loss {loss:g})")


# The training loop on live modules, one participant at a time. There is one other, on stacked
# models (vectorized_training.py).


@dataclass
class FitState:
    """A fit on its way: its modules by slot, those of their parameters that move, and what its steps see."""

    fit: Fit
    modules: Mapping[str, Template]
    trainable: TrainableTensors
    nets: ModelViews
    context: Mapping[str, Any]
    batches: Batches
    dropout: DropoutStreams

    @property
    def uses_dropout(self) -> bool:
        """Whether a model has dropout."""
        return any(template.drops for template in self.modules.values())


class Gradients(Protocol):
    """How the batches of a fit are drawn and the gradients of a step made."""

    def batches(self, participant: Participant, fit: Fit, memory: DeviceMemory) -> Batches:
        """The steps of the fit."""

    def compute(self, state: FitState, step: int, dropout_key: int, batch: Batch) -> Tensor:
        """Set `grad` of what is trained, which is None before; the loss, as far as it may be told."""


def run_fit(
    participant: Participant, fit: Fit, templates: Templates, gradients: Gradients | None = None
) -> FitReport:
    """Train the fit's slots of the participant in place.

    Args:
        participant: Whose models are trained.
        fit: What to train, on which rows.
        templates: The live modules, on their device.
        gradients: Draws batches and computes gradients in place of the gradient of the mean loss.

    Returns:
        Steps, examples and the mean loss over the steps.

    Raises:
        DivergedError: If the loss or a trained tensor is no longer finite. The participant is then
            as it was.
    """
    live = {slot: templates(participant.arch[slot], slot) for slot in (*fit.train, *fit.frozen)}
    trainable = _prepare(participant, fit, live)
    nets = ModelViews(
        {slot: ModelView.from_module(template.module) for slot, template in live.items()}
    )
    optimizer = make_optimizer(fit.optimizer, trainable)
    if fit.keep:
        restore_optimizer(
            optimizer, trainable, participant.state.get("optimizers", {}).get(fit.keep, {})
        )
    given = move_to_device(templates.memory, fit.context)
    named = [(*split_name(n), p) for n, p in trainable.items()]
    drift = [
        (p, fit.drift[slot][name].to(p))
        for slot, name, p in named
        if name in fit.drift.get(slot, {})
    ]
    draw_batches = Batches if gradients is None else gradients.batches
    batches = draw_batches(participant, fit, templates.memory)
    state = FitState(fit, live, trainable, nets, given, batches, templates.dropout)
    uses_dropout = state.uses_dropout
    parameters = list(trainable.values())
    total = torch.zeros((), device=templates.device)
    with torch.random.fork_rng(devices=templates.forked):
        # Whatever a model draws besides nn.Dropout is keyed too.
        seed_torch(stream_key(*batches.stream, "torch"), templates.device)
        for i, (dropout_key, batch) in enumerate(batches):
            if fit.anneal:
                scale_learning_rates(optimizer, 0.5 * (1 + math.cos(math.pi * i / len(batches))))
            optimizer.zero_grad()
            if gradients is None:
                if uses_dropout:
                    templates.dropout.seed([dropout_key], fit.batch_size)
                loss = fit.objective.total_loss(nets, batch, given)
                loss.backward()
            else:
                loss = gradients.compute(state, i, dropout_key, batch)
            if fit.optimizer.clip_norm:
                nn.utils.clip_grad_norm_(parameters, fit.optimizer.clip_norm, foreach=True)
            optimizer.step()
            if drift:
                torch._foreach_add_(
                    [p.data for p, _ in drift], [d for _, d in drift], alpha=-fit.optimizer.lr
                )
            total += loss.detach()
    norms = torch._foreach_norm([p.detach() for p in parameters])
    # one wait for the device, not one for each tensor
    loss_sum, *magnitudes = torch.stack([total, *(n.to(total) for n in norms)]).tolist()
    if not all(map(math.isfinite, [loss_sum, *magnitudes])):
        raise divergence_message(fit, loss_sum / len(batches))
    # The participant changes last: a fit that runs out of memory is repeated.
    kept = None
    if fit.keep:
        kept = snapshot_optimizer(optimizer, trainable, templates.memory.storage_device)
    trained = {slot: live[slot].hand_over() for slot in fit.train}
    participant.models.update(trained)
    if kept is not None:
        participant.state.setdefault("optimizers", {})[fit.keep] = kept
    return FitReport(len(batches), batches.examples, loss_sum / len(batches))


def _prepare(participant: Participant, fit: Fit, state: Mapping[str, Template]) -> TrainableTensors:
    """Load tensors, set modes and gradients; returns what is to be trained."""
    trainable: TrainableTensors = {}
    for slot, template in state.items():
        template.load(participant.models[slot])
        template.set_mode(training=slot in fit.train)
        for name, parameter in template.parameters.items():
            parameter.grad = None
            parameter.requires_grad_(is_trained(fit, slot, name))
            if parameter.requires_grad:
                trainable[f"{slot}:{name}"] = parameter
    return trainable
