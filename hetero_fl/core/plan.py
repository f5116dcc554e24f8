"""Plans, and the compute steps that plans yield.

A plan is a generator. A plan yields a step, or a list of steps that may run together in any order,
receives the result or the results, and returns a value such as an upload. The engine decides how a
step is computed. A slot is the name under which a participant stores a model.
"""

from __future__ import annotations

import math
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
    """The identity of a step, which copies made by `dataclasses.replace` share."""


# The steps created inside the `with` block of `record_steps`, by key; None outside such a block.
_created: ContextVar[dict[StepKey, Step] | None] = ContextVar("created_steps", default=None)


@contextmanager
def record_steps() -> Iterator[dict[StepKey, Step]]:
    """Record the steps that are created inside the `with` block, keyed by `StepKey`.

    The dry run compares the recorded steps with the yielded steps to detect a forgotten `yield`.
    """
    created: dict[StepKey, Step] = {}
    token = _created.set(created)
    try:
        yield created
    finally:
        _created.reset(token)


class RecordedStep:
    """Base class of steps, which `record_steps` records on creation."""

    key: StepKey

    def __post_init__(self) -> None:
        created = _created.get()
        if created is not None:
            created.setdefault(self.key, self)  # type: ignore[arg-type]  # subclasses are steps


@dataclass(frozen=True)
class Rows:
    """Rows of a participant's named data set, with optional extra columns.

    Args:
        name: Name of the data set: `train`, `validation`, `test` or `proxy`. The server also has
            the data set `common_validation`.
        rows: Indices of the rows to use, int64 `[N]`. If None, all rows are used.
        extra_columns: Further columns, keyed by name, such as a teacher's logits. The rows of these
            columns are aligned with the selected rows.
        preprocess: Preprocessing of the rows. If None, the participant's own preprocessing is used.

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
        """Return the columns, keyed by name and aligned along dimension 0."""
        columns = participant.data(self.name, self.preprocess)
        if self.rows is not None:
            columns = {n: t[self.rows] for n, t in columns.items()}
        return {**columns, **self.extra_columns}


@dataclass(frozen=True)
class TensorRows:
    """Rows that are passed as tensors, for example data that the server derived from uploads.

    Args:
        tensors: Columns, keyed by name and aligned along dimension 0.

    Example:
        >>> import torch
        >>> from hetero_fl.core.plan import TensorRows
        >>> rows = TensorRows({"x": torch.rand(4, 3), "y": torch.zeros(4, dtype=torch.int64)})
        >>> sorted(rows.tensors)
        ['x', 'y']
    """

    tensors: Columns

    def columns(self, participant: Participant) -> Columns:
        """Return the columns, keyed by name and aligned along dimension 0."""
        return self.tensors


@dataclass(frozen=True)
class SampledBatches:
    """An endless stream of random batches.

    Args:
        draw: Function `draw(generator, size)` that returns the columns of a batch. The generator is
            seeded with a random stream of the participant.
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

    draw: Callable[[torch.Generator, int], Tensors]
    size: int


@dataclass(frozen=True)
class Fit(RecordedStep):
    """A step that minimizes an objective. Its result is a `FitReport`.

    Args:
        train: The part of each model to train, keyed by slot. A part is a tuple of prefixes of
            parameter names, or None for the whole model.
        objective: The objective.
        data: The examples.
        epochs: Number of passes over the data.
        steps: Number of optimizer steps. If None, the number follows from `epochs`, which is
            ignored otherwise. With `steps`, all batches are full, and the data is shuffled again
            whenever all examples have been used.
        batch_size: Number of examples in a batch.
        optimizer: Settings of the optimizer.
        augment: Random augmentation of the images of each batch. If None, images are not augmented.
        anneal: Whether the learning rate decreases to 0 within this fit, following a cosine.
        frozen: Slots of models that the objective uses without training them.
        context: Tensors, or dictionaries of tensors, that the objective uses in addition to the
            batch.
        extra_batches: Sources of further batches, keyed by name. Each optimizer step draws a batch
            from each source and adds the columns of this batch to the main batch. The name of the
            source is the prefix of the column names (`name_x`).
        drift: Correction d of the parameters, keyed by slot and tensor name. Every optimizer step
            is followed by θ ← θ - lr · d.
        keep: Name under which the participant stores the state of the optimizer for later fits. If
            None, the state is discarded.
        label: Label of the random stream, and name of the fit in reports and messages.
        stream_id: Name of the participant whose random stream is used. If None, the participant's
            own random stream is used.

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
        examples: Number of examples that were processed.
        loss: Mean loss over the steps.

    Example:
        >>> from hetero_fl.core.plan import FitReport
        >>> FitReport(steps=10, examples=320, loss=0.5)
        FitReport(steps=10, examples=320, loss=0.5)
    """

    steps: int
    examples: int
    loss: float


# Maximum number of input values in a forward pass on a CPU, which is reached by 500 color images of
# 32x32 pixels. The outputs of convolutional layers take many times the memory of the inputs.
MAX_FORWARD_VALUES = 500 * 3 * 32 * 32


def forward_batch_size(batch_size: int, x: Tensor, device: torch.device | None = None) -> int:
    """Return the number of examples per forward pass, which is smaller for large images on a CPU.

    Args:
        batch_size: Maximum number of examples.
        x: The examples, shape `[N, ...]`.
        device: The device of the forward pass. If None, the CPU.
    """
    if device is not None and device.type != "cpu":
        return batch_size
    return max(1, min(batch_size, MAX_FORWARD_VALUES // max(1, math.prod(x.shape[1:]))))


@dataclass(frozen=True)
class Predict(RecordedStep):
    """A step that computes the outputs of a model in evaluation mode.

    The result is a tensor of shape `[N, C]` (logits) or `[N, feature_dim]` (features), whose rows
    have the order of the examples.

    Args:
        slot: Slot of the model.
        data: The examples.
        readout: The output to return, `logits` or `features`.
        batch_size: Maximum number of examples per forward pass (see `forward_batch_size`).
        tensors: Tensors of a model that another participant sent, keyed by name. If None, the
            participant's own model in the slot is used.
        arch: Architecture of the model to which `tensors` belong. If None, the architecture of the
            slot is used.

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
    """A step that sums a model's outputs on labeled rows, separately for each class.

    The result is a pair: the sums, shape `[C, width]`, and the number of rows per class, shape
    `[C]`.

    Args:
        slot: Slot of the model.
        data: The examples.
        readout: The output to sum, `logits`, `features` or `log_probabilities`.
        at_least: Lower bound to which outputs are clipped before the sum. If None, outputs are not
            clipped.
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

    The result is a dictionary of running means and variances, keyed by tensor name. The dictionary
    is empty if the model has no BatchNorm layers or there are fewer than two examples. Each
    statistic is the mean over all batches in a single pass over the data, in which BatchNorm is in
    training mode and all other layers are in evaluation mode. A last batch with a single example is
    left out. The participant's model is not changed.

    Args:
        slot: Slot of the model.
        data: The examples.
        batch_size: Number of examples per forward pass.
        tensors: Tensors of a model that another participant sent, keyed by name. If None, the
            participant's own model in the slot is used.
        arch: Architecture of the model to which `tensors` belong. If None, the architecture of the
            slot is used.

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
