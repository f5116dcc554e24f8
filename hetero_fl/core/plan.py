"""The steps that a plan may yield.

A plan is a generator: it yields a step (or a list of steps that may run in any order, together),
is sent the result (or results), and returns what its author promised, an upload for instance. It
contains no training loop; the engine decides how a step is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.config.clients import AugmentConfig
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.objectives import Objective
from hetero_fl.core.participant import Columns, Part, Participant


class StepKey:
    """The identity of a step, which copies by `dataclasses.replace` share."""


# the steps created while `record_steps` is active, by key; None: nothing is recorded
_created: ContextVar[dict[StepKey, Step] | None] = ContextVar("created_steps", default=None)


@contextmanager
def record_steps() -> Iterator[dict[StepKey, Step]]:
    """Collect the steps that are created inside the `with` block, by key.

    A dry run compares them with the steps that were yielded, so that a forgotten `yield` is found.
    """
    created: dict[StepKey, Step] = {}
    token = _created.set(created)
    try:
        yield created
    finally:
        _created.reset(token)


class RecordedStep:
    """A step that `record_steps` collects."""

    key: StepKey

    def __post_init__(self) -> None:
        created = _created.get()
        if created is not None:
            created.setdefault(self.key, self)  # type: ignore[arg-type]  # subclasses are steps


@dataclass(frozen=True)
class Rows:
    """A named data set of the participant, with extra columns aligned to its rows (a teacher's logits)."""

    name: str = "train"
    rows: Tensor | None = None  # int64 [N]: only these
    extra_columns: Mapping[str, Tensor] = field(default_factory=dict)
    preprocess: Any = None  # another preprocessing than the participant's own

    def columns(self, participant: Participant) -> Columns:
        """The tensors, aligned on dimension 0."""
        columns = participant.data(self.name, self.preprocess)
        if self.rows is not None:
            columns = {n: t[self.rows] for n, t in columns.items()}
        return {**columns, **self.extra_columns}


@dataclass(frozen=True)
class TensorRows:
    """Tensors in hand, aligned on dimension 0 (what a server made of its uploads)."""

    tensors: Columns

    def columns(self, participant: Participant) -> Columns:
        """The tensors themselves."""
        return self.tensors


@dataclass(frozen=True)
class SampledBatches:
    """Batches without end, each drawn with a keyed generator: `draw(generator, size)` gives columns."""

    draw: Callable[[torch.Generator, int], Columns]
    size: int


@dataclass(frozen=True)
class Fit(RecordedStep):
    """Minimize an objective. `train` maps slots to the part of them that moves (None: all of it)."""

    train: Mapping[str, Part]
    objective: Objective
    data: Rows | TensorRows | SampledBatches = field(default_factory=Rows)
    epochs: int = 1
    steps: int | None = None  # in place of epochs; endless permutations, full batches
    batch_size: int = 32
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augment: AugmentConfig | None = None  # random changes of the images of each batch
    anneal: bool = False  # cosine from lr to 0 within this fit
    frozen: tuple[str, ...] = ()  # slots that the objective may call but not change
    # tensors (or named tensors) an objective reads
    context: Mapping[str, Any] = field(default_factory=dict)
    # one batch of each per step
    extra_batches: Mapping[str, SampledBatches] = field(default_factory=dict)
    # slot -> d: θ −= lr·d after every optimizer step
    drift: Mapping[str, Tensors] = field(default_factory=dict)
    keep: str | None = None  # a name under which the optimizer's state lives on in the participant
    label: str = "train"  # names the random stream
    as_id: str | None = None  # draw as this participant would
    key: StepKey = field(default_factory=StepKey, kw_only=True, repr=False, compare=False)


@dataclass(frozen=True)
class FitReport:
    """What a fit did: optimizer steps, examples seen, mean loss over the steps."""

    steps: int
    examples: int
    loss: float


@dataclass(frozen=True)
class Predict(RecordedStep):
    """Outputs of a model in evaluation mode, `[N, …]` in the order of the rows.

    `tensors` and `arch` in place of a slot: a model that another participant sent.
    """

    slot: str
    data: Rows | TensorRows = field(default_factory=Rows)
    readout: Literal["logits", "features"] = "logits"
    batch_size: int = 500
    tensors: Tensors | None = None
    arch: ModelSpec | None = None
    key: StepKey = field(default_factory=StepKey, kw_only=True, repr=False, compare=False)


@dataclass(frozen=True)
class ClassSums(RecordedStep):
    """Sum and count by class of a model's output on labelled rows: `([C, width], [C])`."""

    slot: str
    data: Rows | TensorRows = field(default_factory=Rows)
    readout: Literal["logits", "features", "log_probabilities"] = "logits"
    at_least: float | None = None  # outputs are clipped from below before they are summed
    batch_size: int = 500
    key: StepKey = field(default_factory=StepKey, kw_only=True, repr=False, compare=False)


Step = Fit | Predict | ClassSums
T = TypeVar("T")
Plan = Generator[Any, Any, T]
