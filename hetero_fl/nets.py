"""Models and batches as an objective sees them, whether the modules are live or stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from model_zoo import Outputs, SplitModel


class Net:
    """A model as an objective sees it: call it on inputs for `Outputs(logits, features)`.

    `parameters` are its trainable tensors by name; `forward` and `head` hide whether the module is live or stacked.
    """

    def __init__(
        self, forward: Callable[[Tensor], Outputs], head: Callable[[Tensor], Tensor], parameters: Mapping[str, Tensor]
    ) -> None:
        self._forward, self.head, self.parameters = forward, head, parameters

    @classmethod
    def live(cls, module: SplitModel) -> Net:
        """The module itself."""
        return cls(module, module.head, dict(module.named_parameters()))

    def __call__(self, x: Tensor) -> Outputs:
        return self._forward(x)


class Nets(dict[str, Net]):
    """The models of a fit by slot; `nets.model` is `nets["model"]`."""

    def __getattr__(self, slot: str) -> Net:
        try:
            return self[slot]
        except KeyError:
            raise AttributeError(slot) from None


class Batch(dict[str, Tensor]):
    """The columns of one step; `batch.x` is `batch["x"]`. `weight` `[B]` marks examples that are really there."""

    weight: Tensor | None = None

    def __getattr__(self, column: str) -> Tensor:
        try:
            return self[column]
        except KeyError:
            raise AttributeError(column) from None

    def mean(self, per_example: Tensor) -> Tensor:
        """Mean over the examples that are really there."""
        if self.weight is None:
            return per_example.mean()
        return (per_example * self.weight).sum() / self.weight.sum()


Given = Mapping[str, Any]
