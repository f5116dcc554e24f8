"""Training of one participant at a time: batches, optimizers and the training loop.

In this module, a step is an optimizer step of a `Fit`. Batches are equal on all machines and with
all backends, because they are drawn from streams: tuples of values that are hashed to seed random
generators (see `hetero_fl.utils.seeding`). Trained tensors are keyed by "slot:name", that is, the
slot of the model and the name of the parameter.

The module `vectorized_training` contains the training loop for several participants at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.image_transforms import augment
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import Batch, ModelView, ModelViews
from hetero_fl.core.participant import Columns, Participant
from hetero_fl.core.plan import Fit, FitReport, SampledBatches
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import DivergedError, translate_user_errors
from hetero_fl.engine.dropout import DropoutStreams
from hetero_fl.engine.templates import Template, Templates
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.registry import import_reference
from hetero_fl.utils.seeding import Key, keyed_generator, stream_key
from model_zoo.generators import keyed_generators

# A dropout key is the seed of the dropout masks of a step. Dropout keys have 32 bits.
MASK = 0xFFFFFFFF
# Difference between the dropout keys of two consecutive steps.
GOLDEN = 0x9E3779B9


def index_batches(n: int, fit: Fit, stream: tuple[Key, ...]) -> list[Tensor]:
    """Return the row indices of each step, shape `[B]` each.

    With `fit.epochs`, each epoch is a permutation of the rows, split into batches. A last batch of
    one example is merged with the batch before it, because BatchNorm needs at least two examples.
    With `fit.steps`, an endless sequence of permutations is split into full batches.

    Args:
        n: Number of rows.
        fit: The fit, which specifies the batch size and the number of epochs or steps.
        stream: Stream of the random permutations.
    """
    size = min(fit.batch_size, n)
    if fit.steps is None:
        full = _batches_per_epoch(n, size) - 1
        sizes = [*[size] * full, n - size * full] * fit.epochs
    else:
        sizes = [size] * step_count(n, fit)
    total = sum(sizes)
    orders = [
        torch.randperm(n, generator=keyed_generator(*stream, epoch))
        for epoch in range(-(-total // n))
    ]
    return list(torch.cat(orders)[:total].split(sizes))


def step_count(n: int, fit: Fit) -> int:
    """Return the number of batches that `index_batches` returns, without drawing batches.

    Args:
        n: Number of rows.
        fit: The fit, which specifies the batch size and the number of epochs or steps.
    """
    if fit.steps is not None:
        return max(1, fit.steps)
    return fit.epochs * _batches_per_epoch(n, min(fit.batch_size, n))


def _batches_per_epoch(n: int, size: int) -> int:
    # A client may claim any number of rows, so no list of their batches is created here.
    num_batches = -(-n // size)
    has_single_row = num_batches > 1 and n - (num_batches - 1) * size == 1
    return num_batches - has_single_row


class Batches:
    """Batches of a fit.

    Iterating over the batches yields the dropout key and the batch of each step.

    Args:
        participant: The participant that is trained.
        fit: The fit.
        memory: The device to which batches are moved.

    Attributes:
        count: Number of steps.
        examples: Total number of examples in all steps.
        source: The columns of all rows before they are moved to the device, keyed by name. Not set
            for `SampledBatches`.
        indices: Row indices of each step, shape `[B]` each. Not set for `SampledBatches`.
    """

    def __init__(self, participant: Participant, fit: Fit, memory: DeviceMemory) -> None:
        self.stream = participant.stream(fit.label, fit.stream_id)
        self._dropout_key = stream_key(*self.stream, "dropout")
        self.fit = fit
        self.memory = memory
        self.device = memory.device
        if isinstance(fit.data, SampledBatches):
            if fit.steps is None:
                raise ValueError("Fit.steps: required if data is SampledBatches, got None")
            self.count = step_count(fit.data.size, fit)
            self.examples = self.count * fit.data.size
            return
        self.source = fit.data.columns(participant)
        self.indices = self._draw_indices(len(next(iter(self.source.values()))))
        self.count = len(self.indices)
        self.examples = sum(map(len, self.indices))

    def _draw_indices(self, n: int) -> list[Tensor]:
        return index_batches(n, self.fit, self.stream)

    @cached_property
    def columns(self) -> Columns:
        """The columns of all rows, keyed by name. Large mapped ones are not on the device."""
        return {n: self.memory.keep_column(column) for n, column in self.source.items()}

    @cached_property
    def device_indices(self) -> Sequence[Tensor]:
        """The row indices of each step, on the device."""
        # All indices are copied to the device at once.
        lengths = [len(rows) for rows in self.indices]
        return torch.cat(self.indices).to(self.device).split(lengths)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        for step, columns in enumerate(self._main_batches()):
            batch = Batch(columns)
            if self.fit.augment is not None:
                batch["x"] = self.augment_batch(batch["x"], step)
            batch.update(self.extra_batch(step))
            yield self.dropout_key_at(step), batch

    def dropout_key_at(self, step: int) -> int:
        """Return the dropout key of a step."""
        return (self._dropout_key + step * GOLDEN) & MASK

    def _main_batches(self) -> Iterator[Tensors]:
        """Yield the batch of each step, without augmentation and extra batches."""
        if isinstance(self.fit.data, SampledBatches):
            for step in range(self.count):
                drawn = self.fit.data.draw(keyed_generator(*self.stream, step), self.fit.data.size)
                yield {n: t.to(self.device) for n, t in drawn.items()}
            return
        for rows in self.device_indices:
            yield {
                n: t.index_select(0, rows.to(t.device)).to(self.device)
                for n, t in self.columns.items()
            }

    def augment_batch(self, x: Tensor, step: int) -> Tensor:
        """Augment the images of a step at random.

        Args:
            x: Images, shape `[B, C, H, W]`.
            step: Index of the step, from 0.

        Returns:
            Augmented images, shape `[B, C, H, W]`.
        """
        assert self.fit.augment is not None
        return augment(x, self.fit.augment, keyed_generator(*self.stream, "augment", step))

    def extra_batch(self, step: int) -> Tensors:
        """Draw the extra batches of a step, with columns named `<extra batch>_<column>`."""
        columns: Tensors = {}
        for name, draws in self.fit.extra_batches.items():
            drawn = draws.draw(keyed_generator(*self.stream, name, step), draws.size)
            columns.update({f"{name}_{n}": t.to(self.device) for n, t in drawn.items()})
        return columns


# Trained tensors, keyed by "slot:name".
TrainableTensors = dict[str, Tensor]
# Optimizer state of each trained tensor, tensors and numbers, keyed by "slot:name".
OptimizerSnapshot = dict[str, dict[str, Any]]


def is_trained(fit: Fit, slot: str, name: str) -> bool:
    """Return whether a fit trains a parameter.

    Args:
        fit: The fit.
        slot: Slot of the model.
        name: Name of the parameter.
    """
    part = fit.train.get(slot, ())
    return part is None or name.startswith(part)


def split_name(key: str) -> tuple[str, str]:
    """Split a key of `TrainableTensors` into slot and parameter name."""
    slot, name = key.rsplit(":", 1)
    return slot, name


def make_optimizer(
    config: OptimizerConfig, trainable: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """Create the PyTorch optimizer that a configuration specifies.

    Args:
        config: Settings of the optimizer. If `head_lr` is set, heads have this learning rate.
        trainable: The tensors to optimize, keyed by "slot:name".

    Raises:
        UserError: If a user-defined optimizer cannot be created.
    """
    heads = [key for key in trainable if config.head_lr and split_name(key)[1].startswith("head.")]
    groups: list[dict[str, Any]] = [
        {"params": [p for key, p in trainable.items() if key not in heads]},
        {"params": [trainable[key] for key in heads], "lr": config.head_lr},
    ]
    groups = [group for group in groups if group["params"]]
    # On CPUs, the fused implementation takes a third of the time of the others.
    fused = all(tensor.device.type in ("cpu", "cuda") for tensor in trainable.values())
    common: dict[str, Any] = {"weight_decay": config.weight_decay, "fused": fused}
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, config.lr, config.momentum, nesterov=config.nesterov, **common
        )
    if config.name == "adam":
        return torch.optim.Adam(groups, config.lr, **common)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, config.lr, **common)
    return _make_custom_optimizer(config, groups)


def _make_custom_optimizer(
    config: OptimizerConfig, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """Return the optimizer that a user's function creates, with the configured learning rate."""
    create = import_reference(config.name, "optimizer.name", torch.optim.Optimizer, "parameters")
    # Read the learning rates first, because an optimizer adds its own rate to groups without one.
    head_rates = [group.get("lr") for group in groups]
    parameters = groups if config.head_lr else [p for group in groups for p in group["params"]]
    with translate_user_errors():
        optimizer = create_optimizer(create, parameters)
    if config.head_lr:
        if len(optimizer.param_groups) != len(groups):
            raise UserError(f"optimizer.head_lr: {config.name} must keep the parameter groups")
        for rate, group in zip(head_rates, optimizer.param_groups, strict=True):
            group["lr"] = rate or config.lr
        return optimizer
    first = optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups:
        # The ratios between the learning rates of groups that the function defines are preserved.
        group["lr"] = config.lr if group["lr"] == first else group["lr"] * config.lr / first
    return optimizer


def create_optimizer(
    create: Callable[[Any], Any], parameters: Sequence[Any]
) -> torch.optim.Optimizer:
    """Create the optimizer of a user's function.

    Args:
        create: Function of parameters.
        parameters: Parameters or parameter groups.

    Raises:
        TypeError: If the result is not an optimizer.
        ValueError: If the optimizer has no learning rate or updates other parameters.
    """
    given = [group["params"] if isinstance(group, dict) else [group] for group in parameters]
    optimizer = create(parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "expected a function that returns a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}"
        )
    if not all(group.get("lr") for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} needs a positive learning rate 'lr' in each parameter "
            "group, which schedules change"
        )
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not own <= {id(p) for group in given for p in group}:
        raise ValueError(
            f"{type(optimizer).__name__} must update the parameters that the function receives, "
            "not those of another model"
        )
    return optimizer


def try_optimizer(create: Callable[[list[nn.Parameter]], Any]) -> torch.optim.Optimizer:
    """Create an optimizer for a small linear layer, and make a step as local training does.

    Args:
        create: Function of parameters that returns an optimizer.

    Raises:
        TypeError: If the result is not an optimizer.
        ValueError: If the optimizer cannot be used (see `create_optimizer`) or needs a closure.
    """
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with keyed_generators(0):
        optimizer = create_optimizer(create, parameters)
    try:
        with keyed_generators(0):
            optimizer.step()
    # A user's optimizer may raise any exception.
    except Exception as error:
        raise ValueError(
            f"{type(optimizer).__name__}.step() fails without a closure, which local training does "
            f"not have: {one_line(error)}; choose an optimizer such as torch.optim.SGD"
        ) from error
    return optimizer


def anneal_learning_rates(optimizer: torch.optim.Optimizer, step: int, num_steps: int) -> None:
    """Decrease the learning rates from their initial values to 0, following a cosine.

    Args:
        optimizer: The optimizer.
        step: Index of the step, from 0.
        num_steps: Number of steps.
    """
    factor = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("first_lr", group["lr"]) * factor


def snapshot_optimizer(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, Tensor], device: torch.device
) -> OptimizerSnapshot:
    """Copy the state of an optimizer.

    Args:
        optimizer: The optimizer.
        trainable: The tensors that the optimizer updates, keyed by "slot:name".
        device: The device of the copy.
    """
    states = {k: optimizer.state[p] for k, p in trainable.items() if p in optimizer.state}
    return {
        k: {n: _copy_state(n, v, device) for n, v in state.items() if v is not None}
        for k, state in states.items()
    }


def _copy_state(name: str, value: Any, device: torch.device) -> Any:
    """Copy a tensor or a number of an optimizer's state."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, int | float):
        return value
    raise UserError(
        f"optimizer: the state '{name}' is a {type(value).__name__}, which cannot be kept between "
        "rounds; choose an optimizer whose state consists of tensors and numbers"
    )


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    trainable: Mapping[str, Tensor],
    saved: Mapping[str, Mapping[str, Any]],
) -> None:
    """Restore the state of an optimizer from `snapshot_optimizer`.

    Args:
        optimizer: The optimizer.
        trainable: The tensors that the optimizer updates, keyed by "slot:name".
        saved: The return value of `snapshot_optimizer`.
    """
    for name, state in saved.items():
        p = trainable[name]
        optimizer.state[p] = {n: _restore_state(v, p) for n, v in state.items()}


def _restore_state(value: Any, p: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape != p.shape or not p.ndim:
        return value.to(p.device, copy=True)
    # Fused optimizers expect state of the parameter's shape in its memory format.
    return torch.empty_like(p, dtype=value.dtype).copy_(value)


def move_to_device(memory: DeviceMemory, value: Any) -> Any:
    """Detach the tensors of a tree and move the tensors to the device.

    Args:
        memory: The device. Copies of tensors are cached.
        value: A tensor, or nested dictionaries of tensors and other values.

    Returns:
        The new tree. The original is not modified.
    """
    if isinstance(value, Tensor):
        return memory.keep(value).detach().to(memory.device)
    if isinstance(value, Mapping):
        return {k: move_to_device(memory, v) for k, v in value.items()}
    return value


def divergence_error(fit: Fit, loss: float) -> DivergedError:
    """Create the error for a fit that diverged.

    Args:
        fit: The fit.
        loss: Mean loss over the steps.
    """
    return DivergedError(f"loss or parameters of '{fit.label}' are not finite (mean loss {loss:g})")


@dataclass
class FitState:
    """The state of a fit in progress.

    Attributes:
        fit: The fit.
        modules: The modules, keyed by slot.
        trainable: The trained parameters, keyed by "slot:name".
        nets: The models as passed to the objective.
        context: The tensors that the objective reads, on the device.
        batches: The batches of the fit.
        dropout: The masks of the dropout layers.
    """

    fit: Fit
    modules: Mapping[str, Template]
    trainable: TrainableTensors
    nets: ModelViews
    context: Mapping[str, Any]
    batches: Batches
    dropout: DropoutStreams

    @property
    def has_dropout(self) -> bool:
        """Whether any model has dropout layers with a positive probability."""
        return any(template.has_dropout for template in self.modules.values())


class Gradients(Protocol):
    """Interface for custom gradients, such as the gradients of DP-SGD.

    An implementation draws the batches of a fit and computes the gradients of each step.
    """

    def batches(self, participant: Participant, fit: Fit, memory: DeviceMemory) -> Batches:
        """Return the batches of a fit.

        Args:
            participant: The participant that is trained.
            fit: The fit.
            memory: The device to which batches are moved.
        """

    def compute(self, state: FitState, step: int, dropout_key: int, batch: Batch) -> Tensor:
        """Compute the gradients of one step and assign them to the trained parameters.

        Args:
            state: State of the fit, in which all gradients are None.
            step: Index of the step, from 0.
            dropout_key: Seed of the dropout masks.
            batch: The examples.

        Returns:
            The loss, a scalar. If the loss must not be revealed, a substitute is returned.
        """


def run_fit(
    participant: Participant, fit: Fit, templates: Templates, gradients: Gradients | None = None
) -> FitReport:
    """Train models of a participant in place.

    Args:
        participant: The participant.
        fit: The fit, which specifies the models to train.
        templates: The modules, keyed by architecture and slot.
        gradients: Source of batches and gradients. If None, the gradient of the mean loss is used.

    Returns:
        The number of steps, the number of examples, and the mean loss over the steps.

    Raises:
        DivergedError: If the loss or a trained tensor is no longer finite. In this case, the
            participant's models and state are not changed.
    """
    modules = {slot: templates(participant.arch[slot], slot) for slot in (*fit.train, *fit.frozen)}
    trainable = _prepare(participant, fit, modules)
    nets = ModelViews(
        {slot: ModelView.from_module(template.module) for slot, template in modules.items()}
    )
    optimizer = make_optimizer(fit.optimizer, trainable)
    if fit.keep:
        restore_optimizer(
            optimizer, trainable, participant.state.get("optimizers", {}).get(fit.keep, {})
        )
    context = move_to_device(templates.memory, fit.context)
    drift = _trained_drift(fit, trainable)
    draw_batches = Batches if gradients is None else gradients.batches
    batches = draw_batches(participant, fit, templates.memory)
    state = FitState(fit, modules, trainable, nets, context, batches, templates.dropout)
    has_dropout = state.has_dropout
    parameters = list(trainable.values())
    total = torch.zeros((), device=templates.device)
    # Random operations of a model other than nn.Dropout use the global generators.
    key = stream_key(*batches.stream, "torch")
    with keyed_generators(key, templates.device, brief=True):
        for i, (dropout_key, batch) in enumerate(batches):
            if fit.anneal:
                anneal_learning_rates(optimizer, i, batches.count)
            optimizer.zero_grad()
            if gradients is None:
                if has_dropout:
                    templates.dropout.seed([dropout_key], fit.batch_size)
                loss = fit.objective.total_loss(nets, batch, context)
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
    mean_loss = _finite_mean_loss(fit, total, parameters, batches.count)
    # The participant is changed last, because a fit that runs out of memory is repeated.
    snapshot = None
    if fit.keep:
        snapshot = snapshot_optimizer(optimizer, trainable, templates.memory.storage_device)
    trained = {
        slot: modules[slot].release_tensors(
            {name for name in modules[slot].parameters if f"{slot}:{name}" in trainable}
        )
        for slot in fit.train
    }
    participant.models.update(trained)
    if snapshot is not None:
        participant.state.setdefault("optimizers", {})[fit.keep] = snapshot
    return FitReport(batches.count, batches.examples, mean_loss)


def _trained_drift(fit: Fit, trainable: TrainableTensors) -> list[tuple[Tensor, Tensor]]:
    """Return the trained parameters that have a correction in `Fit.drift`, with this correction."""
    named = [(*split_name(key), p) for key, p in trainable.items()]
    return [
        (p, fit.drift[slot][name].to(p))
        for slot, name, p in named
        if name in fit.drift.get(slot, {})
    ]


def _finite_mean_loss(
    fit: Fit, total: Tensor, parameters: Sequence[Tensor], num_steps: int
) -> float:
    """Return the mean loss, or raise DivergedError if the loss or a parameter is not finite."""
    norms = torch._foreach_norm([p.detach() for p in parameters])
    # Synchronize with the device once, not for each tensor.
    loss_sum, *magnitudes = torch.stack([total, *(n.to(total) for n in norms)]).tolist()
    if not all(map(math.isfinite, [loss_sum, *magnitudes])):
        raise divergence_error(fit, loss_sum / num_steps)
    return float(loss_sum / num_steps)


def _prepare(
    participant: Participant, fit: Fit, modules: Mapping[str, Template]
) -> TrainableTensors:
    """Load the models, set their modes and `requires_grad`, and return the trained parameters."""
    trainable: TrainableTensors = {}
    for slot, template in modules.items():
        template.load(participant.models[slot])
        template.set_mode(training=slot in fit.train)
        for name, parameter in template.parameters.items():
            parameter.grad = None
            parameter.requires_grad_(is_trained(fit, slot, name))
            if parameter.requires_grad:
                trainable[f"{slot}:{name}"] = parameter
    if not trainable:
        raise UserError(f"'{fit.label}': all parameters of the trained part are frozen")
    return trainable
