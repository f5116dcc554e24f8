"""The steps that a plan may yield. A method says with them what is computed; the runtime decides how.

A plan is a generator: it yields a step (or a list of steps that may run in any order, together), is sent the result (or
results), and returns what its author promised, an upload for instance. It holds no training loop. The last field of a step,
`made`, is how one that is made and never yielded is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from hetero_fl.architecture import Architecture, Tensors
from hetero_fl.config.clients import AugmentConfig
from hetero_fl.config.optimizer import OptimizerConfig
from hetero_fl.made import Made, note
from hetero_fl.objectives import Objective
from hetero_fl.state import Columns, Part, Participant


@dataclass(frozen=True)
class Rows:
    """A named data set of the participant, with columns set beside it, aligned to its rows (a teacher's logits)."""

    name: str = "train"
    rows: Tensor | None = None  # int64 [N]: only these
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    through: Any = None  # another preprocessing than the participant's own

    def columns(self, participant: Participant) -> Columns:
        """The tensors, aligned on dimension 0."""
        columns = participant.data(self.name, self.through)
        if self.rows is not None:
            columns = {n: t[self.rows] for n, t in columns.items()}
        return {**columns, **self.beside}


@dataclass(frozen=True)
class Table:
    """Tensors in hand, aligned on dimension 0 (what a server made of its uploads)."""

    table: Columns

    def columns(self, participant: Participant) -> Columns:
        """The tensors themselves."""
        return self.table


@dataclass(frozen=True)
class Draws:
    """Batches without end, each drawn with a keyed generator: `draw(generator, size)` gives columns."""

    draw: Callable[[torch.Generator, int], Columns]
    size: int


@dataclass(frozen=True)
class Fit:
    """Minimise an objective. `train` maps slots to the part of them that moves (None: all of it)."""

    train: Mapping[str, Part]
    objective: Objective
    data: Rows | Table | Draws = field(default_factory=Rows)
    epochs: int = 1
    steps: int | None = None  # in place of epochs; endless permutations, full batches
    batch_size: int = 32
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augment: AugmentConfig | None = None  # random changes of the images of each batch
    anneal: bool = False  # cosine from lr to nought within this fit
    frozen: tuple[str, ...] = ()  # slots that the objective may call but not change
    given: Mapping[str, Any] = field(default_factory=dict)  # tensors (or named tensors) an objective reads
    beside: Mapping[str, Draws] = field(default_factory=dict)  # one batch of each per step
    drift: Mapping[str, Tensors] = field(default_factory=dict)  # slot -> d: θ −= lr·d after every optimiser step
    keep: str | None = None  # a name under which the optimiser's state lives on in the participant
    label: str = "train"  # names the random stream
    as_id: str | None = None  # draw as this participant would
    made: Made | None = field(default_factory=partial(note, "a Fit"), kw_only=True, repr=False, compare=False)


@dataclass(frozen=True)
class FitReport:
    """What a fit did: optimiser steps, examples seen, mean loss over the steps."""

    steps: int
    examples: int
    loss: float


@dataclass(frozen=True)
class Predict:
    """Outputs of a model in evaluation mode, `[N, …]` in the order of the rows.

    `tensors` and `arch` in place of a slot: a model that somebody sent.
    """

    slot: str
    data: Rows | Table = field(default_factory=Rows)
    readout: Literal["logits", "features"] = "logits"
    batch_size: int = 500
    tensors: Tensors | None = None
    arch: Architecture | None = None
    made: Made | None = field(default_factory=partial(note, "a Predict"), kw_only=True, repr=False, compare=False)


@dataclass(frozen=True)
class ClassSums:
    """Sum and count by class of a model's output on labelled rows: `([C, width], [C])`."""

    slot: str
    data: Rows | Table = field(default_factory=Rows)
    readout: Literal["logits", "features", "log_probabilities"] = "logits"
    at_least: float | None = None  # outputs are clipped from below before they are summed
    batch_size: int = 500
    made: Made | None = field(default_factory=partial(note, "a ClassSums"), kw_only=True, repr=False, compare=False)


Step = Fit | Predict | ClassSums
T = TypeVar("T")
Plan = Generator[Any, Any, T]
