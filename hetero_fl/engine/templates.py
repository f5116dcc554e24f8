"""Modules into which the tensors of participants are loaded, and estimates of operations.

A `Template` wraps such a module, which is built once per architecture and slot instead of once per
participant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hetero_fl.core.given_models import forgets_models
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.objectives import ModelView
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.plan import ClassSums, Predict, Recalibrate
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.dropout import DropoutStreams, use_keyed_dropout
from hetero_fl.utils.errors import UserError
from model_zoo import ModelDescription, SplitModel, describe, is_batch_norm
from model_zoo.heads import mixes_examples
from model_zoo.module_state import ModuleSnapshot, named_state, state_tensors

# Minimum number of floating-point operations per parameter and example for which a convolutional
# model uses the channels-last memory format.
MIN_FLOPS_PER_PARAMETER = 10


@forgets_models
@cache
def describe_model(arch: ModelSpec) -> ModelDescription:
    """Return the description of a model, with the numbers of parameters and operations."""
    return describe(
        arch.model, *arch.size_arguments, vocabulary=arch.vocabulary, **dict(arch.options)
    )


def prefers_channels_last(arch: ModelSpec) -> bool:
    """Return whether a model is likely to be faster in the channels-last memory format.

    On CPUs, the format reduces the time of convolutions that use each weight at many positions to
    70–90%. The format increases the time of wide convolutions on images of a few pixels, such as
    the last blocks of ResNet-18 at 28x28, to 120–140%. User-defined models use the default format,
    because a `view` in the user's code may depend on the memory format.
    """
    if arch.is_user_defined:
        return False
    model = describe_model(arch)
    is_convolutional = 2 * model.convolution_flops >= model.forward_flops > 0
    is_intense = model.forward_flops >= MIN_FLOPS_PER_PARAMETER * model.parameters
    return is_convolutional and is_intense and not _has_narrow_shortcut(arch)


@cache
def _has_narrow_shortcut(arch: ModelSpec) -> bool:
    """Return whether a model has a strided 1x1 convolution of at most four channels.

    In the channels-last format, its backward pass does not end or crashes on CPUs (torch 2.14).
    """
    return any(
        isinstance(m, nn.Conv2d)
        and math.prod(m.kernel_size) == 1
        and math.prod(m.stride) > 1
        and m.in_channels <= 4
        for m in arch.build().modules()
    )


@forgets_models
@cache
def is_recurrent(arch: ModelSpec) -> bool:
    """Return whether a model has recurrent layers, which cannot be vectorized over clients."""
    return any(isinstance(m, nn.RNNBase) for m in arch.build().modules())


@forgets_models
@cache
def has_batch_norm(arch: ModelSpec) -> bool:
    """Return whether a model has BatchNorm layers."""
    return any(is_batch_norm(m) for m in arch.build().modules())


@forgets_models
@cache
def mixes_rows(arch: ModelSpec, training: bool) -> bool:
    """Return whether the outputs for a row depend on the other rows of the batch.

    In training mode, BatchNorm layers use statistics of the batch. User-defined models, which may
    compute other statistics or keep them for later passes, are tried.
    """
    if not arch.is_user_defined:
        return training and has_batch_norm(arch)
    keeps_state = training and bool(arch.written_names | arch.local_names)
    return keeps_state or mixes_examples(arch.build(), arch.shape, training)


def training_flops(client_info: ClientInfo) -> float:
    """Estimate the number of floating-point operations of training a client's model in one round.

    Other models that a method trains at the client, such as a mentee, are not counted.
    """
    settings = client_info.settings
    if settings.steps is None:
        examples = client_info.num_rows * settings.epochs
    else:
        examples = settings.steps * settings.batch_size
    return float(examples * example_flops(client_info.arch))


def forward_flops(arch: ModelSpec) -> int:
    """Estimate the floating-point operations of the forward pass of one example."""
    model = describe_model(arch)
    return max(model.forward_flops, 2 * model.parameters)


def example_flops(arch: ModelSpec) -> int:
    """Estimate the floating-point operations of training on one example."""
    # The backward pass takes about twice the operations of the forward pass.
    return 3 * forward_flops(arch)


class Template:
    """A module into which the tensors of participants are loaded in turn.

    Args:
        arch: The architecture.
        memory: The device and its cached tensors.
        precision: "float32" or "bfloat16".
        dropout: The masks of the dropout layers.

    Attributes:
        module: The module.
        has_dropout: Whether the module has dropout layers with a positive probability.
        tensors: The module's parameters and buffers, keyed by name. A tensor with several names
            (tied weights) is listed once.
        parameters: The module's trainable parameters, keyed by name. Parameters that the model
            itself has frozen are left out.
    """

    def __init__(
        self,
        arch: ModelSpec,
        memory: DeviceMemory,
        precision: str = "float32",
        dropout: DropoutStreams | None = None,
    ) -> None:
        self.memory = memory
        device = memory.device
        self.module = arch.build().to(device)
        self.has_dropout = use_keyed_dropout(self.module, dropout or DropoutStreams(device))
        for layer in self.module.modules():
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
                # Fused optimizers need dense gradients, whose steps are the same.
                layer.sparse = False
        if precision == "bfloat16":
            _use_bfloat16(self.module, device)
        if prefers_channels_last(arch):
            self.module.to(memory_format=torch.channels_last)
        self.arch = arch
        # A model may freeze parameters in its method `train`.
        self.module.train()
        self.tensors: Mapping[str, Tensor] = state_tensors(self.module)
        first = {id(tensor): name for name, tensor in self.tensors.items()}
        # Names in `tensors` of all names of the module, of the backbone and of the head.
        self._names, self._backbone_names, self._head_names = (
            {t.name: first[id(t.tensor)] for t in named_state(part)}
            for part in (self.module, self.module.backbone, self.module.head)
        )
        # The dictionary that contains each tensor, because a forward pass may replace buffers.
        self._places: dict[str, tuple[dict[str, Any], str]] = {
            t.name: (t.part._parameters if t.key in t.part._parameters else t.part._buffers, t.key)
            for t in named_state(self.module)
        }
        # Models of libraries do not write attributes.
        is_known = not arch.is_user_defined
        self._attributes = None if is_known else ModuleSnapshot(self.module, tensors=False)
        self._released: set[str] = set()
        # cuDNN expects the weights of a recurrent layer in one block of memory, so
        # `release_tensors` returns copies of the module's tensors.
        self._keeps_memory = device.type == "cuda" and any(
            isinstance(m, nn.RNNBase) for m in self.module.modules()
        )
        self.parameters: Mapping[str, nn.Parameter] = {
            name: p for name, p in self.module.named_parameters() if p.requires_grad
        }
        # None before the first call of `set_mode`. `module.training` is not sufficient, because the
        # `train` method of a model may do more than set this attribute.
        self._mode: bool | None = None

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> SplitModel:
        """Copy tensors into the module and return the module.

        A tensor that is the module's own tensor is not copied. What a forward pass wrote to
        attributes for another participant is removed, and the next `set_mode` sets the modes of all
        layers.

        Raises:
            KeyError: If a tensor of the module is missing.
        """
        if self._attributes is not None:
            self._attributes.restore(self._attributes.changes())
            # These are not stored, so a pass that reads one first is an error.
            self._attributes.remove(self.arch.overwritten_names)
            # A user's `train` may write attributes, and the forward pass may set modes of layers.
            self._mode = None
        for name, (owner, key) in self._places.items():
            owner[key] = self.tensors[self._names[name]]
        for name, mine in self.tensors.items():
            if tensors[name] is mine:
                continue
            if name in self._released:
                mine.data = torch.empty_like(mine)
                self._released.discard(name)
            mine.copy_(self.memory.keep(tensors[name]))
        return self.module

    def set_mode(self, training: bool) -> None:
        """Set the module to training or evaluation mode, unless it already has this mode."""
        # A call of `train` takes half a millisecond, because it visits every layer.
        if self._mode is not training or self.module.training is not training:
            self.module.train(training)
            self._mode = training

    def release_tensors(self, trained: Collection[str]) -> Tensors:
        """Return the module's tensors, keyed by name, contiguous and on the storage device.

        The tensors are copied only if necessary. For tensors that are not copied, the next `load`
        allocates new memory in the module.

        Args:
            trained: Names of the parameters that have been trained.

        Raises:
            UserError: If the forward pass has written state that the tensors do not contain.
        """
        tensors: Tensors = {}
        storages: set[int] = set()
        for name, written in self._written_tensors(trained).items():
            # Unlike `detach()`, `data` does not share its version counter with the module's tensor.
            tensor = written.data.to(
                self.memory.storage_device,
                copy=self._keeps_memory,
                memory_format=torch.contiguous_format,
            )
            # A forward pass may assign one tensor to several buffers.
            tensors[name] = tensor.clone() if _storage(tensor) in storages else tensor
            storages.add(_storage(tensors[name]))
        self._released = {n for n, mine in self.tensors.items() if _storage(mine) in storages}
        return tensors

    def _written_tensors(self, trained: Collection[str]) -> Mapping[str, Tensor]:
        """Return the module's tensors after its forward pass may have replaced buffers."""
        tensors: Tensors = {}
        for name, (owner, key) in self._places.items():
            tensor: Any = owner.get(key)
            mine = self.tensors[self._names[name]]
            is_parameter = isinstance(mine, nn.Parameter)
            if tensor is not tensors.setdefault(self._names[name], tensor) or (
                is_parameter and tensor is not mine
            ):
                what = "a parameter" if is_parameter else "a buffer of several names"
                raise UserError(
                    f"{self._describe(name)} is {what}, but replaced in training; change it in "
                    "place"
                )
            if tensor is None or (tensor.shape, tensor.dtype) != (mine.shape, mine.dtype):
                raise UserError(
                    f"{self._describe(name)} changes its shape or type in training; a buffer must "
                    f"stay a tensor of shape {tuple(mine.shape)} and type {mine.dtype}"
                )
            if is_parameter and mine.requires_grad is not (self._names[name] in trained):
                raise UserError(
                    f"{self._describe(name)} changes its requires_grad in training; freeze "
                    "parameters in __init__ or in train()"
                )
        if unexpected := self.written_attributes():
            raise UserError(
                f"{self._describe(min(unexpected))} changes in training and would be lost; keep it "
                "as a tensor in a buffer: self.register_buffer(name, tensor)"
            )
        return tensors

    def _describe(self, name: str) -> str:
        return f"model {self.arch.display_name}: '{name}'"

    def written_attributes(self) -> set[str]:
        """Return the names of the attributes, except caches, that differ from a new module's."""
        if self._attributes is None:
            return set()
        return self._attributes.changes() - self.arch.cached_names

    def stack(self, models: Sequence[Mapping[str, Tensor]]) -> Tensors:
        """Stack the tensors of models on the device, shape `[K, ...]` each, keyed by name."""
        return {
            n: self.memory.stack([m[n] for m in models]).to(mine)
            for n, mine in self.tensors.items()
        }

    def view_of(self, tensors: Mapping[str, Tensor]) -> ModelView:
        """Return a view of the module that uses other tensors, without changing the module.

        Args:
            tensors: Parameters and buffers, keyed by name.

        Raises:
            RuntimeError: When the view is called, if the forward pass replaces a buffer.
        """

        def call(part: nn.Module, names: Mapping[str, str], x: Tensor) -> Tensor:
            used = {name: tensors[first] for name, first in names.items()}
            # `functional_call` finds tied weights by itself, but not those of shared submodules.
            outputs: Tensor = functional_call(part, used, (x,), tie_weights=False)
            for name, first in names.items():
                if used[name] is not tensors[first]:
                    raise RuntimeError(f"its forward pass assigns the buffer '{name}'")
            return outputs

        return ModelView(
            partial(call, self.module, self._names),
            partial(call, self.module.backbone, self._backbone_names),
            partial(call, self.module.head, self._head_names),
            {n: tensors[n] for n in self.parameters},
        )


def _storage(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor is part of."""
    return tensor.untyped_storage().data_ptr()


class Templates:
    """The templates of a process, keyed by architecture and slot and created on first use.

    Models in different slots have different modules, even if their architectures are equal.

    Args:
        memory: The device and its cached tensors.
        precision: "float32" or "bfloat16".

    Attributes:
        device: The device of the modules.
        dropout: The masks of all dropout layers.
    """

    def __init__(self, memory: DeviceMemory, precision: str = "float32") -> None:
        self.memory = memory
        self.device = memory.device
        self.precision = precision
        self.dropout = DropoutStreams(self.device)
        self._templates: dict[tuple[ModelSpec, str], Template] = {}

    def __call__(self, arch: ModelSpec, slot: str = "") -> Template:
        """Return the template of an architecture and slot, which is created on the first call."""
        if (arch, slot) not in self._templates:
            self._templates[arch, slot] = Template(arch, self.memory, self.precision, self.dropout)
        return self._templates[arch, slot]


def _use_bfloat16(module: SplitModel, device: torch.device) -> None:
    """Make a module compute backbone and head in bfloat16 and return their outputs in float32."""

    def in_bfloat16(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return forward(x).float()

    for part in (module.backbone, module.head):
        part.forward = partial(in_bfloat16, part.forward)


OutputStep = Predict | ClassSums


def with_integers(participant: Participant, step: OutputStep | Recalibrate) -> Mapping[str, Tensor]:
    """Return the tensors of the model that a step uses, including integers.

    Integers are not transmitted, so a received model has those of the participant's initial model.
    """
    tensors = step_tensors(participant, step)
    arch = step_model_spec(participant, step)
    if tensors.keys() == arch.shapes.keys():
        return tensors
    return {**arch.initial_tensors(participant.round_context.seed), **tensors}


def step_model_spec(participant: Participant, step: OutputStep | Recalibrate) -> ModelSpec:
    """Return the architecture of the model that a step uses.

    If the step contains no architecture, this is the architecture of the participant's own model.
    """
    return getattr(step, "arch", None) or participant.arch[step.slot]


def step_tensors(participant: Participant, step: OutputStep | Recalibrate) -> Mapping[str, Tensor]:
    """Return the tensors of the model that a step uses.

    If the step contains no tensors, these are the tensors of the participant's own model.
    """
    received: Mapping[str, Tensor] | None = getattr(step, "tensors", None)
    return participant.models[step.slot] if received is None else received
