"""What a rule is: how the words of several clients, of whom some may lie, become one.

A rule of parameters gets a `Block`, the tensors that the same clients sent; a rule of predictions gets one tensor of all. Both
weigh all senders alike. `python:package.module:Name` in place of a rule's name takes one's own class with the same methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hetero_fl.architecture import Tensors
from hetero_fl.config.robust import AggregationConfig
from hetero_fl.registry import Registry


class Block:
    """Tensors that the same n clients sent under one name, in the order of their ids.

    Args:
        sent: of each client the tensors; all have the same names and shapes.
        references: of each client what it was sent under these names; {} or a name that is missing stands for nought.
        parameters: names of those that are trained; the others are buffers (BatchNorm statistics), which no distance counts.
        root: what the server itself would have made of the reference, for rules that ask for it.
    """

    def __init__(
        self,
        sent: Sequence[Tensors],
        references: Sequence[Tensors] | None = None,
        parameters: frozenset[str] | None = None,
        root: Tensors | None = None,
    ) -> None:
        self.sent, self.references = sent, references or [{} for _ in sent]
        self.names = list(sent[0])
        self.parameters = [n for n in self.names if parameters is None or n in parameters]
        self.buffers = [n for n in self.names if n not in self.parameters]
        self.root = root

    def __len__(self) -> int:
        return len(self.sent)

    def stack(self, name: str) -> Tensor:
        """`[n, …]`: a tensor of every client."""
        return torch.stack([tensors[name] for tensors in self.sent])

    def start(self, name: str) -> Tensor:
        """`[n, …]`: what every client was sent of it."""
        pairs = zip(self.sent, self.references, strict=True)
        return torch.stack([r[name] if name in r else torch.zeros_like(t[name]) for t, r in pairs])

    def distances(self) -> Tensor:
        """Squared Euclidean distances between the clients' parameters, float64 `[n, n]`."""
        total = torch.zeros(len(self), len(self), dtype=torch.float64)
        for name in self.parameters or self.names:
            flat = self.stack(name).double().flatten(1)
            total += torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
        return total

    def norms(self, names: Sequence[str]) -> Tensor:
        """Euclidean norms of the clients' updates of these tensors together, float64 `[n]`."""
        squares = torch.zeros(len(self), dtype=torch.float64)
        for name in names:
            squares += (self.stack(name) - self.start(name)).double().flatten(1).square().sum(1)
        return squares.sqrt()


class Rule:
    """A rule for parameters and updates."""

    uses_reference: ClassVar[bool] = False  # whether it looks at what clients were sent
    uses_root: ClassVar[bool] = False  # whether it compares with an update of the server's own

    def __init__(self, config: AggregationConfig) -> None:
        self.config = config

    def least(self, liars: int) -> int:
        """How many clients it takes to bear so many liars."""
        return 2 * liars + 1

    def combine(self, block: Block, liars: int) -> Tensors:
        """One tensor for each name of the block, in the dtype of what was sent."""
        raise TypeError(f"{type(self).__name__} defines no combine")


class PredictionRule:
    """A rule for predictions on public rows."""

    exclusive: ClassVar[bool] = False  # whether it is for classes of which each row has one

    def __init__(self, config: AggregationConfig) -> None:
        self.config = config

    def least(self, liars: int) -> int:
        """How many clients it takes to bear so many liars."""
        return 2 * liars + 1

    def combine(self, said: Tensor, liars: int, clients: Sequence[str], memory: dict[str, Any]) -> Tensor:
        """`[N, C]` from `said` `[n, N, C]`, one client after the other.

        `clients`: their ids; `memory`: what the rule remembers from round to round, plain numbers by id.
        """
        raise TypeError(f"{type(self).__name__} defines no combine")


rule: Registry[type[Rule]] = Registry("aggregation rule", lambda: Rule)
prediction_rule: Registry[type[PredictionRule]] = Registry("aggregation rule of predictions", lambda: PredictionRule)


def middle(values: Tensor, liars: int | None = None) -> Tensor:
    """The mean over dimension 0 without the `liars` lowest and highest of every coordinate; None: all but the middle one
    or two, the median."""
    n = len(values)
    drop = (n - 1) // 2 if liars is None else liars
    return values.sort(0).values[drop : n - drop].mean(0)
