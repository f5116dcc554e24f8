"""Which network a slot holds: a hashable description from which every process builds the same module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from hetero_fl.utils.seeding import stream_key
from model_zoo import ModelError, SplitModel, create_model, is_batch_norm

Tensors = dict[str, Tensor]


def freeze_lists(value: Any) -> Any:
    """A value of which every list, however deep, is a tuple."""
    return tuple(map(freeze_lists, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class ModelSpec:
    """A model of the zoo with everything that decides its shapes. Equal architectures have equal tensors.

    `input_shape` is (channels, *size) as `model_zoo.create_model` takes it; with a `vocabulary` (its size) examples are
    tokens, and it is (length,). `label` and `group` say of a slice of another model what tables call it and with whose
    tensors its own are averaged; they do not tell architectures apart and are not stored with tensors.
    """

    name: str
    outputs: int
    input_shape: tuple[int, ...]
    feature_dim: int | None = None
    options: tuple[tuple[str, Any], ...] = field(default=())
    pretrained: bool = False
    vocabulary: int | None = None
    label: str = field(default="", compare=False)
    group: str = field(default="", compare=False)

    @classmethod
    def from_config(
        cls,
        name: str,
        outputs: int,
        input_shape: tuple[int, ...],
        feature_dim: int | None = None,
        options: Mapping[str, Any] | None = None,
        pretrained: bool = False,
        vocabulary: int | None = None,
    ) -> ModelSpec:
        """An architecture from a configuration's plain values (lists become tuples, so that it can be hashed)."""
        settled = tuple(sorted((k, freeze_lists(v)) for k, v in (options or {}).items()))
        return cls(name, outputs, tuple(input_shape), feature_dim, settled, pretrained, vocabulary)

    @property
    def size_arguments(self) -> tuple[int, int, tuple[int, ...], int | None]:
        """Outputs, channels, size and feature width, as `model_zoo.create_model` takes them."""
        channels, *size = self.input_shape if self.vocabulary is None else (1, *self.input_shape)
        return self.outputs, channels, tuple(size), self.feature_dim

    def build(self, pretrained: bool = False) -> SplitModel:
        """A new module, with weights from the global generator: call it inside `torch.random.fork_rng`.

        `pretrained`: with the published weights, for a first start only; everybody else loads tensors into it. Raises
        `model_zoo.ModelError` where the model can not be made for this input.
        """
        options = dict(self.options)
        return create_model(
            self.name,
            *self.size_arguments,
            pretrained=pretrained,
            vocabulary=self.vocabulary,
            **options,
        )

    def initial_tensors(self, seed: int) -> Tensors:
        """The tensors that every participant with this architecture starts from. Do not change them in place."""
        return dict(_initial_tensors(self, seed, torch.get_default_dtype()))

    @cached_property
    def spec_id(self) -> str:
        """One line that names the architecture: the name of its group at the server."""
        detail = [f"{'x'.join(map(str, self.input_shape))}->{self.outputs}"]
        detail += [f"vocabulary={self.vocabulary}"] if self.vocabulary else []
        detail += [f"feature_dim={self.feature_dim}"] if self.feature_dim else []
        detail += [f"{k}={v}" for k, v in self.options] + (
            ["pretrained"] if self.pretrained else []
        )
        return f"{self.name}({', '.join(detail)})"

    @property
    def display_name(self) -> str:
        """The name for tables and reports."""
        return self.label or self.name

    @cached_property
    def group_id(self) -> str:
        """The server's slot of the model that this one is averaged into."""
        return self.group or self.spec_id

    @cached_property
    def parameter_names(self) -> frozenset[str]:
        """Names of trainable tensors; the others are buffers (BatchNorm statistics and counters)."""
        return _measure(self).parameters

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor by name. Raises ModelError where the model cannot be made."""
        return _measure(self).shapes

    @property
    def batch_norm_names(self) -> frozenset[str]:
        """Names of all that BatchNorm layers hold, parameters and statistics; found by type, as names differ."""
        return _measure(self).batch_norm

    @property
    def feature_width(self) -> int:
        """Width of the features. Raises ModelError where the model cannot be made."""
        return _measure(self).width

    def to_json(self) -> str:
        """Return the description that is stored with saved tensors."""
        stored = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return json.dumps(stored, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """The reverse of `to_json`. Raises ValueError on anything else."""
        try:
            raw = json.loads(text)
            return cls.from_config(
                str(raw["name"]),
                int(raw["outputs"]),
                tuple(raw["input_shape"]),
                raw["feature_dim"],
                dict(raw["options"]),
                bool(raw["pretrained"]),
                raw.get("vocabulary"),  # older files have none
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a description of an architecture: {error}") from None

    def check(self) -> None:
        """Build it once. Raises ModelError in one line for whatever is wrong with it."""
        try:
            with torch.random.fork_rng(devices=[]):
                self.build()
        except ModelError:
            raise
        except (
            Exception
        ) as error:  # a wrong option value fails somewhere inside torch: one line for the user
            raise ModelError(
                f"{self.name} cannot be built with {dict(self.options)}: {error}"
            ) from None


@dataclass(frozen=True)
class _ModelFacts:
    """What is known of a model without its values."""

    parameters: frozenset[str]
    width: int
    shapes: Mapping[str, tuple[int, ...]]
    batch_norm: frozenset[str]


@lru_cache(maxsize=256)
def _measure(arch: ModelSpec) -> _ModelFacts:
    """Equal architectures are built once: methods derive them anew each round."""
    with torch.random.fork_rng(devices=[]):
        module = arch.build()
    layers = [(path, m) for path, m in module.named_modules() if is_batch_norm(m)]
    return _ModelFacts(
        frozenset(n for n, _ in module.named_parameters()),
        int(module.feature_dim),
        {n: tuple(t.shape) for n, t in module.state_dict().items()},
        frozenset(f"{path}.{n}" for path, m in layers for n in m.state_dict()),
    )


@lru_cache(maxsize=16)
def _initial_tensors(arch: ModelSpec, seed: int, dtype: torch.dtype) -> Tensors:
    """`dtype` is torch's default one, which decides the result."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(seed, "init", arch.spec_id))
        return {n: t.detach().clone() for n, t in arch.build(arch.pretrained).state_dict().items()}


Owner = tuple[str, tuple[int, ...], str]  # (tensor name, shape, group or "" for common ones)


def owners_of(
    tensors: Mapping[str, Tensor], group: str, common: tuple[str, ...]
) -> dict[str, Owner]:
    """Return with which tensors each tensor of a model is averaged.

    Args:
        tensors: Tensors of the model, by name.
        group: The group of the client that holds it.
        common: Prefixes of tensors that are averaged across groups.
    """
    return {
        name: (name, tuple(tensor.shape), "" if name.startswith(common) else group)
        for name, tensor in tensors.items()
    }
