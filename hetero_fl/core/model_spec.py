"""Hashable specifications of models, from which every process builds the same module.

An architecture group is the set of models with one `ModelSpec.spec_id`, which the server averages.
A family is the set of models for which the server has one model, such as a wide model and its
slices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from hetero_fl.core.forward_writes import (
    ForwardWrites,
    carry_state,
    non_persistent_names,
    observe_forward,
    release_state,
)
from hetero_fl.core.given_models import GivenModel, forgets_models
from hetero_fl.utils.objects import OBJECT_PREFIX, get_object, resolve_object
from hetero_fl.utils.seeding import stream_key
from model_zoo import ModelError, SplitModel, create_model, is_batch_norm
from model_zoo.generators import keyed_generators
from model_zoo.heads import check_training
from model_zoo.module_state import first_names, state_tensors
from model_zoo.registry import MODELS, ModelName, is_user_defined
from model_zoo.shapes import Shape, make_shape

Tensors = dict[str, Tensor]


def freeze_lists(value: Any) -> Any:
    """Return a value after converting all nested lists to tuples."""
    return tuple(map(freeze_lists, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class ModelSpec:
    """The specification of a model: the name, and all arguments that determine tensor shapes.

    Models with equal specifications have tensors with equal names and shapes.

    Args:
        name: Name of the model, as accepted by `model_zoo.create_model`.
        outputs: Number of outputs.
        input_shape: Shape of an example, `(channels, *size)`, or `(length,)` for tokens.
        feature_dim: Width of the features. If None, the model's own width is used.
        options: Further arguments of the model, as sorted pairs of name and value.
        pretrained: Whether training starts from published weights.
        vocabulary: Number of different tokens, or None for numeric examples.
        label: Name in tables and reports. If empty, `name` is used. The label is neither compared
            nor stored.
        family: Name of the family to which the model belongs. If empty, `spec_id` is used. The
            family is neither compared nor stored.
        shares_trained_only: Whether all tensors except trained parameters stay at the clients,
            because noise protects trained parameters only. It is neither compared nor stored.

    Example:
        >>> from hetero_fl.core.model_spec import ModelSpec
        >>> arch = ModelSpec.from_config("cnn", 10, (1, 28, 28), options={"width": 8})
        >>> arch.spec_id
        'cnn(1x28x28->10, width=8)'
        >>> arch.feature_width
        32
        >>> arch.build().head
        Linear(in_features=32, out_features=10, bias=True)
    """

    name: str
    outputs: int
    input_shape: tuple[int, ...]
    feature_dim: int | None = None
    options: tuple[tuple[str, Any], ...] = field(default=())
    pretrained: bool = False
    vocabulary: int | None = None
    label: str = field(default="", compare=False)
    family: str = field(default="", compare=False)
    shares_trained_only: bool = field(default=False, compare=False)

    @classmethod
    def from_config(
        cls,
        name: str,
        outputs: int,
        input_shape: tuple[int, ...],
        feature_dim: int | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        pretrained: bool = False,
        vocabulary: int | None = None,
    ) -> ModelSpec:
        """Create a specification from the plain values of a configuration.

        Args:
            name: Name of the model.
            outputs: Number of outputs.
            input_shape: Shape of an example.
            feature_dim: Width of the features. If None, the model's own width is used.
            options: Further arguments of the model, keyed by name. Lists are converted to tuples.
            pretrained: Whether training starts from published weights.
            vocabulary: Number of different tokens, or None for numeric examples.
        """
        pairs = tuple(sorted((k, freeze_lists(v)) for k, v in (options or {}).items()))
        return cls(name, outputs, tuple(input_shape), feature_dim, pairs, pretrained, vocabulary)

    @property
    def size_arguments(self) -> tuple[int, int, tuple[int, ...], int | None]:
        """Number of outputs, channels, size and feature width, as passed to `create_model`."""
        channels, *size = self.input_shape if self.vocabulary is None else (1, *self.input_shape)
        return self.outputs, channels, tuple(size), self.feature_dim

    @property
    def model(self) -> ModelName:
        """The name, or the object that it denotes, as passed to functions of `model_zoo`.

        Raises:
            UserError: If this program does not have the object.
        """
        model: ModelName = resolve_object(self.name, "model")
        return model

    @property
    def is_user_defined(self) -> bool:
        """Whether the model is neither built in nor from timm or torchvision."""
        return self.name.startswith(OBJECT_PREFIX) or is_user_defined(self.name)

    @property
    def shape(self) -> Shape:
        """Shape of an example, as models see it."""
        _, channels, size, _ = self.size_arguments
        return make_shape(channels, size, self.vocabulary)

    def build(self, pretrained: bool = False, seed: int = 0) -> SplitModel:
        """Build a module, whose constructor draws equal random numbers in each call.

        Args:
            pretrained: Whether to load published weights instead of drawing initial weights.
            seed: Seed of the random numbers.

        Raises:
            ModelError: If the model cannot be created.
        """
        module = _create(self, pretrained, seed)
        if self.is_user_defined:
            carry_state(module, _observe(self).attributes)
        return module

    def source_module(self, model: SplitModel) -> nn.Module:
        """Return the module from which a model of this architecture was made, as its class has it.

        Buffers that the class does not save in `state_dict`, and attributes, are not saved there.

        Args:
            model: The model, which must not be used afterwards.
        """
        if self.is_user_defined:
            non_persistent = non_persistent_names(_create(self))
            release_state(model, non_persistent, _observe(self).attributes)
        return model.source_module()

    def build_given(self, given: GivenModel) -> Tensors:
        """Return the tensors of a user's module that has this architecture.

        Raises:
            ModelError: If the module has another architecture.
        """
        model = given.build(self.shape)
        carry_state(model, _observe(self).attributes)
        return {n: t.detach() for n, t in state_tensors(model).items()}

    def without_caches(self) -> ModelSpec:
        """Return the specification that all modules get which differ only in what no pass reads."""
        given = get_object(self.name)
        return replace(self, name=given.without_caches(self.shape).name) if given else self

    def initial_tensors(self, seed: int) -> Tensors:
        """Return the initial tensors for a seed, keyed by name.

        The tensors are cached and must not be modified in place.
        """
        return dict(_initial_tensors(self, seed, torch.get_default_dtype()))

    @cached_property
    def spec_id(self) -> str:
        """Text that identifies the architecture, such as `cnn(1x28x28->10, width=8)`."""
        detail = [f"{'x'.join(map(str, self.input_shape))}->{self.outputs}"]
        detail += [f"vocabulary={self.vocabulary}"] if self.vocabulary else []
        detail += [f"feature_dim={self.feature_dim}"] if self.feature_dim else []
        detail += [f"{k}={v}" for k, v in self.options] + (
            ["pretrained"] if self.pretrained else []
        )
        return f"{self.name}({', '.join(detail)})"

    @property
    def display_name(self) -> str:
        """Name in tables and reports: the label, or the name of the model if there is no label."""
        return self.label or self.name.removeprefix(OBJECT_PREFIX)

    @cached_property
    def family_id(self) -> str:
        """Name of the family to which the model belongs, and slot of the server's model."""
        return self.family or self.spec_id

    @cached_property
    def parameter_names(self) -> frozenset[str]:
        """Names of the parameters. All other tensors are buffers."""
        return _measure(self).parameters

    @property
    def trained_names(self) -> frozenset[str]:
        """Names of the parameters that the model has not frozen."""
        return _measure(self).trained

    @property
    def written_names(self) -> frozenset[str]:
        """Names of the tensors that the forward pass writes."""
        return _observe(self).tensors

    @cached_property
    def local_names(self) -> frozenset[str]:
        """Names of the tensors that clients do not share.

        Of a user's model, these are attributes that the forward pass writes, buffers that are not
        persistent, and integers, which an average of `state_dict` leaves out. Counters of BatchNorm
        layers that use a momentum are not listed, because nothing depends on them. With
        `shares_trained_only`, these are all tensors except trained parameters.
        """
        if self.shares_trained_only:
            return frozenset(self.shapes) - self.trained_names
        return _measure(self).local

    @property
    def cached_names(self) -> frozenset[str]:
        """Names of attributes that the forward pass writes and no later pass depends on."""
        return _observe(self).caches

    @property
    def overwritten_names(self) -> frozenset[str]:
        """Names of cached tensors that each pass writes before it reads them."""
        return _observe(self).overwritten

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all tensors, keyed by tensor name."""
        return _measure(self).shapes

    @property
    def batch_norm_names(self) -> frozenset[str]:
        """Names of all parameters and buffers of BatchNorm layers."""
        return _measure(self).batch_norm

    @property
    def feature_width(self) -> int:
        """Width of the features."""
        return _measure(self).width

    @property
    def head_path(self) -> str:
        """Path of the head: `head`, or the path in the user's module, such as `fc`."""
        return _measure(self).head_path

    @property
    def converted_type(self) -> torch.dtype | None:
        """Type of the tensors before they were converted to torch's default type, or None."""
        return _measure(self).converted_type

    def to_json(self) -> str:
        """Return the specification as JSON, without the label and the family."""
        stored = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return json.dumps(stored, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Create a specification from the JSON text that `to_json` returned.

        Raises:
            ValueError: If the text is not a specification.
        """
        try:
            raw = json.loads(text)
            return cls.from_config(
                str(raw["name"]),
                int(raw["outputs"]),
                tuple(raw["input_shape"]),
                raw["feature_dim"],
                dict(raw["options"]),
                pretrained=bool(raw["pretrained"]),
                # Files of older versions have no vocabulary.
                vocabulary=raw.get("vocabulary"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a model specification: {error}") from None

    def check(self) -> None:
        """Check that the model can be built, and returns logits in training mode, too.

        Raises:
            ModelError: If the model cannot be built or trained.
        """
        try:
            _check_training(self)
        except ModelError as error:
            if str(error).startswith("model "):
                raise
            raise ModelError(f"model {self.display_name}: {error}") from error
        # An invalid option may cause any error inside PyTorch.
        except Exception as error:
            options = f" with {dict(self.options)}" if self.options else ""
            raise ModelError(
                f"model {self.display_name}: cannot be built{options}: {error}"
            ) from None


@dataclass(frozen=True)
class _ModelProperties:
    """Properties of a model that do not depend on the values of its tensors."""

    parameters: frozenset[str]
    trained: frozenset[str]
    width: int
    head_path: str
    shapes: Mapping[str, tuple[int, ...]]
    batch_norm: frozenset[str]
    local: frozenset[str]
    converted_type: torch.dtype | None


@forgets_models
@lru_cache(maxsize=256)
def _measure(arch: ModelSpec) -> _ModelProperties:
    # Cached because methods create equal specifications in each round.
    # A model may freeze parameters in its method `train`.
    module = arch.build().train()
    tensors = state_tensors(module)
    layers = [(path, m) for path, m in module.named_modules() if is_batch_norm(m)]
    counters = {f"{path}.num_batches_tracked" for path, m in layers if m.momentum is not None}
    local: set[str] = set()
    # Models of libraries keep all state in `state_dict`.
    if arch.is_user_defined:
        first = first_names(module)
        local = {first[n] for n in non_persistent_names(_create(arch)) | _observe(arch).attributes}
        local |= {n for n, tensor in tensors.items() if not tensor.is_floating_point()}
    return _ModelProperties(
        frozenset(n for n, t in tensors.items() if isinstance(t, nn.Parameter)),
        frozenset(n for n, t in tensors.items() if t.requires_grad),
        int(module.num_features),
        module.head_path,
        {n: tuple(t.shape) for n, t in tensors.items()},
        frozenset(f"{path}.{n}" for path, m in layers for n in m.state_dict()),
        frozenset(local - counters),
        module.converted_type,
    )


def _create(arch: ModelSpec, pretrained: bool = False, seed: int = 0) -> SplitModel:
    with keyed_generators(stream_key(seed, "init", arch.spec_id)):
        return create_model(
            arch.model,
            *arch.size_arguments,
            pretrained=pretrained,
            vocabulary=arch.vocabulary,
            **dict(arch.options),
        )


@forgets_models
@lru_cache(maxsize=256)
def _observe(arch: ModelSpec) -> ForwardWrites:
    module = _create(arch)
    carry_state(module, ())
    return observe_forward(module, arch.shape)


@forgets_models
@lru_cache(maxsize=16)
def _initial_tensors(arch: ModelSpec, seed: int, _dtype: torch.dtype) -> Tensors:
    # The result depends on torch's default dtype, which is therefore part of the cache key.
    module = arch.build(arch.pretrained, seed)
    return {n: t.detach().clone() for n, t in state_tensors(module).items()}


@forgets_models
@lru_cache(maxsize=256)
def _check_training(arch: ModelSpec) -> None:
    # Cached because many clients may have equal models.
    model = arch.build()
    if arch.name not in MODELS:
        check_training(model, arch.build().source_module(), arch.shape)
