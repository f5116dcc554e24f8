"""Plans and the compute steps that they yield.

A plan is a generator. It yields a step, or a list of steps that may run together in any order,
receives the result or the results, and returns a value such as an upload. The engine decides how a
step is computed.
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
    """The identity of a step; copies made by `dataclasses.replace` share it."""


# The steps created while `record_steps` is active, by key; None if it is not active.
_created: ContextVar[dict[StepKey, Step] | None] = ContextVar("created_steps", default=None)


@contextmanager
def record_steps() -> Iterator[dict[StepKey, Step]]:
    """Collect the steps that are created inside the `with` block, by key.

    The dry run compares them with the yielded steps to detect a forgotten `yield`.
    """
    created: dict[StepKey, Step] = {}
    token = _created.set(created)
    try:
        yield created
    finally:
        _created.reset(token)


class RecordedStep:
    """Base class of steps, which registers them with `record_steps`."""

    key: StepKey

    def __post_init__(self) -> None:
        created = _created.get()
        if created is not None:
            created.setdefault(self.key, self)  # type: ignore[arg-type]  # subclasses are steps


@dataclass(frozen=True)
class Rows:
    """Rows of a participant's named data set, with optional extra columns.

    Args:
        name: Name of the data set: `train`, `validation`, `test`, `proxy`, or at the server
            `common_validation`.
        rows: Indices of the rows to use, int64 `[N]`; None for all rows.
        extra_columns: Further columns, aligned with the selected rows, such as a teacher's logits.
        preprocess: Preprocessing to use instead of the participant's.

    Example:
        >>> import torch
        >>> from hetero_fl.core.plan import Rows
        >>> rows = Rows("proxy", rows=torch.tensor([0, 2]), extra_columns={"teacher": torch.eye(2)})
        >>> rows.name, rows.extra_columns["teacher"].shape
        ('proxy', torch.Size([2, 2]))
    """

    name: str = "train"
    rows: Tensor | None = None
    extra_columns: Mapping[str, Tensor] = field(default_factory=dict)
    preprocess: Any = None

    def columns(self, participant: Participant) -> Columns:
        """Return the columns by name, aligned along dimension 0."""
        columns = participant.data(self.name, self.preprocess)
        if self.rows is not None:
            columns = {n: t[self.rows] for n, t in columns.items()}
        return {**columns, **self.extra_columns}


@dataclass(frozen=True)
class TensorRows:
    """Rows given as tensors, for example data that a server derived from uploads.

    Args:
        tensors: Columns by name, aligned along dimension 0.

    Example:
        >>> import torch
        >>> from hetero_fl.core.plan import TensorRows
        >>> rows = TensorRows({"x": torch.rand(4, 3), "y": torch.zeros(4, dtype=torch.int64)})
        >>> sorted(rows.tensors)
        ['x', 'y']
    """

    tensors: Columns

    def columns(self, participant: Participant) -> Columns:
        """Return the columns by name, aligned along dimension 0."""
        return self.tensors


@dataclass(frozen=True)
class SampledBatches:
    """An endless stream of batches, drawn with keyed generators.

    Args:
        draw: `draw(generator, size)` returns the columns of a batch.
        size: Number of examples in a batch.

    Example:
        >>> import torch
        >>> from hetero_fl.core.plan import SampledBatches
        >>> def draw(generator, size):
        ...     return {"x": torch.randn(size, 2, generator=generator)}
        >>> batches = SampledBatches(draw, size=8)
        >>> batches.draw(torch.Generator(), batches.size)["x"].shape
        torch.Size([8, 2])
    """

    draw: Callable[[torch.Generator, int], Columns]
    size: int


@dataclass(frozen=True)
class Fit(RecordedStep):
    """A step that minimizes an objective. Its result is a `FitReport`.

    Args:
        train: The part of the model to train, by slot; None trains all of it.
        objective: The objective.
        data: The examples.
        epochs: Number of passes over the data.
        steps: Number of optimizer steps instead of `epochs`. All batches are full; the data is
            shuffled again whenever it is exhausted.
        batch_size: Number of examples in a batch.
        optimizer: Settings of the optimizer.
        augment: Random augmentation of the images of each batch.
        anneal: Whether the learning rate follows a cosine from its value to 0 within this step.
        frozen: Slots that the objective uses without training them.
        context: Tensors, or named tensors, that the objective reads.
        extra_batches: Further batches by name; each optimizer step draws one of each, and the
            objective reads its columns with the name as prefix.
        drift: Correction d by slot: every optimizer step is followed by θ ← θ - lr · d.
        keep: Name under which the participant keeps the optimizer's state for later steps; None
            discards it.
        label: Label of the step's random stream.
        stream_id: Participant whose random stream is used instead of the participant's own.

    Example:
        >>> from hetero_fl.core.objectives import Supervised
        >>> from hetero_fl.core.plan import Fit, Rows
        >>> def train(client):
        ...     report = yield Fit({"model": None}, Supervised(), Rows("train"), epochs=2)
        ...     return report.loss
        >>> step = next(train(client=None))
        >>> step.epochs, step.data.name
        (2, 'train')
    """

    train: Mapping[str, Part]
    objective: Objective
    data: Rows | TensorRows | SampledBatches = field(default_factory=Rows)
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augment: AugmentConfig | None = None
    anneal: bool = False
    frozen: tuple[str, ...] = ()
    context: Mapping[str, Any] = field(default_factory=dict)
    extra_batches: Mapping[str, SampledBatches] = field(default_factory=dict)
    drift: Mapping[str, Tensors] = field(default_factory=dict)
    keep: str | None = None
    label: str = "train"
    stream_id: str | None = None
    key: StepKey = field(default_factory=StepKey, kw_only=True, repr=False, compare=False)


@dataclass(frozen=True)
class FitReport:
    """The result of a `Fit` step.

    Attributes:
        steps: Number of optimizer steps.
        examples: Number of examples processed.
        loss: Mean loss over the steps.

    Example:
        >>> from hetero_fl.core.plan import FitReport
        >>> FitReport(steps=10, examples=320, loss=0.5)
        FitReport(steps=10, examples=320, loss=0.5)
    """

    steps: int
    examples: int
    loss: float


@dataclass(frozen=True)
class Predict(RecordedStep):
    """A step that computes the outputs of a model in evaluation mode.

    Its result is a tensor `[N, …]` in the order of the rows.

    Args:
        slot: Slot of the model.
        data: The examples.
        readout: The output to return.
        batch_size: Number of examples per forward pass.
        tensors: Tensors to use instead of the slot's, for a model that another participant sent.
        arch: Architecture of the model whose tensors are given.

    Example:
        >>> from hetero_fl.core.plan import Predict, Rows
        >>> def upload_logits(client):
        ...     logits = yield Predict("model", Rows("proxy"))
        ...     return {"logits": logits}
        >>> next(upload_logits(client=None)).readout
        'logits'
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
    """A step that sums a model's outputs on labeled rows by class.

    Its result is the pair of the sums `[C, width]` and the counts `[C]`.

    Args:
        slot: Slot of the model.
        data: The examples.
        readout: The output to sum.
        at_least: Lower bound to which the outputs are clipped before they are summed.
        batch_size: Number of examples per forward pass.

    Example:
        >>> from hetero_fl.core.payload import Item
        >>> from hetero_fl.core.plan import ClassSums, Rows
        >>> def upload_prototypes(client):
        ...     sums, counts = yield ClassSums("model", Rows("train"), readout="features")
        ...     return {"prototypes": Item(sums, counts[:, None], "class_sums")}
        >>> next(upload_prototypes(client=None)).readout
        'features'
    """

    slot: str
    data: Rows | TensorRows = field(default_factory=Rows)
    readout: Literal["logits", "features", "log_probabilities"] = "logits"
    at_least: float | None = None
    batch_size: int = 500
    key: StepKey = field(default_factory=StepKey, kw_only=True, repr=False, compare=False)


@dataclass(frozen=True)
class Recalibrate(RecordedStep):
    """A step that recomputes the statistics of a model's BatchNorm layers.

    Its result contains the running means and variances by tensor name; it is empty if the model has
    no BatchNorm layers. Each statistic is the mean over the batches of one forward pass in training
    mode, without dropout; a last batch of a single example is left out. The participant's model
    does not change.

    Args:
        slot: Slot of the model.
        data: The examples.
        batch_size: Number of examples per forward pass.
        tensors: Tensors to use instead of the slot's, for a model that another participant sent.
        arch: Architecture of the model whose tensors are given.

    Example:
        >>> from hetero_fl.core.plan import Predict, Recalibrate, Rows
        >>> def predict_proxy(client):
        ...     statistics = yield Recalibrate("model", Rows("proxy"))
        ...     tensors = {**client.models["model"], **statistics}
        ...     return (yield Predict("model", Rows("proxy"), tensors=tensors))
        >>> next(predict_proxy(client=None)).batch_size
        64
    """

    slot: str
    data: Rows | TensorRows = field(default_factory=Rows)
    batch_size: int = 64
    tensors: Tensors | None = None
    arch: ModelSpec | None = None
    key: StepKey = field(default_factory=StepKey, kw_only=True, repr=False, compare=False)


Step = Fit | Predict | ClassSums | Recalibrate
T = TypeVar("T")
Plan = Generator[Any, Any, T]
