"""Which network a slot holds: a hashable description from which every process builds the same module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hetero_fl.seeding import key
from model_zoo import ModelError, SplitModel, create_model, is_batch_norm

Tensors = dict[str, Tensor]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Architecture:
    """A model of the zoo with everything that decides its shapes. Equal architectures have equal tensors.

    `input_shape` is (channels, *size) as `model_zoo.create_model` takes it.
    """

    name: str
    outputs: int
    input_shape: tuple[int, ...]
    feature_dim: int | None = None
    options: tuple[tuple[str, Any], ...] = field(default=())
    pretrained: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        outputs: int,
        input_shape: tuple[int, ...],
        feature_dim: int | None = None,
        options: Mapping[str, Any] | None = None,
        pretrained: bool = False,
    ) -> Architecture:
        """An architecture from a configuration's plain values (lists become tuples, so that it can be hashed)."""
        frozen = tuple(sorted((k, _frozen(v)) for k, v in (options or {}).items()))
        return cls(name, outputs, tuple(input_shape), feature_dim, frozen, pretrained)

    def build(self, pretrained: bool = False) -> SplitModel:
        """A new module, with weights from the global generator: call it inside `torch.random.fork_rng`.

        `pretrained`: with the published weights, for a first start only; everybody else loads tensors into it. Raises
        `model_zoo.ModelError` where the model can not be made for this input.
        """
        channels, *size = self.input_shape
        options = dict(self.options)
        return create_model(
            self.name, self.outputs, channels, tuple(size), self.feature_dim, pretrained=pretrained, **options
        )

    def initial(self, seed: int) -> Tensors:
        """The tensors that every participant with this architecture starts from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "init", self.id))
            return {n: t.detach().clone() for n, t in self.build(self.pretrained).state_dict().items()}

    @cached_property
    def id(self) -> str:
        """One line that names the architecture: the name of its group at the server."""
        detail = [f"{'x'.join(map(str, self.input_shape))}->{self.outputs}"]
        detail += [f"feature_dim={self.feature_dim}"] if self.feature_dim else []
        detail += [f"{k}={v}" for k, v in self.options] + (["pretrained"] if self.pretrained else [])
        return f"{self.name}({', '.join(detail)})"

    @cached_property
    def parameter_names(self) -> frozenset[str]:
        """Names of trainable tensors; the others are buffers (BatchNorm statistics and counters)."""
        with torch.random.fork_rng(devices=[]):
            return frozenset(n for n, _ in self.build().named_parameters())

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by name. Raises ModelError where the model cannot be made."""
        with torch.random.fork_rng(devices=[]):
            return {n: tuple(t.shape) for n, t in self.build().state_dict().items()}

    @cached_property
    def batch_norm_names(self) -> frozenset[str]:
        """Names of all that BatchNorm layers hold, parameters and statistics; found by type, as names differ."""
        with torch.random.fork_rng(devices=[]):
            layers = [(path, m) for path, m in self.build().named_modules() if is_batch_norm(m)]
        return frozenset(f"{path}.{n}" for path, m in layers for n in m.state_dict())

    @cached_property
    def width(self) -> int:
        """Width of the features. Raises ModelError where the model cannot be made."""
        with torch.random.fork_rng(devices=[]):
            return int(self.build().feature_dim)

    def to_json(self) -> str:
        """As stored beside saved tensors."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """The reverse of `to_json`. Raises ValueError on anything else."""
        try:
            raw = json.loads(text)
            return cls.of(
                str(raw["name"]),
                int(raw["outputs"]),
                tuple(raw["input_shape"]),
                raw["feature_dim"],
                dict(raw["options"]),
                bool(raw["pretrained"]),
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
        except Exception as error:  # a wrong option value fails somewhere inside torch: one line for the user
            raise ModelError(f"{self.name} cannot be built with {dict(self.options)}: {error}") from None
