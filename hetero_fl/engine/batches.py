"""Batches of training steps, which are equal on all machines and with all backends.

In this module, a step is an optimizer step of a `Fit`. A stream is a tuple of values that is hashed
to seed random generators (see `hetero_fl.utils.seeding`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from hetero_fl.core.image_transforms import augment
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import Batch
from hetero_fl.core.participant import Columns, Participant
from hetero_fl.core.plan import Fit, SampledBatches
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.utils.seeding import Key, keyed_generator, stream_key

# A dropout key is the seed of the dropout masks of a step. Dropout keys have 32 bits.
MASK = 0xFFFFFFFF
# Difference between the dropout keys of two consecutive steps.
GOLDEN = 0x9E3779B9


def index_batches(n: int, fit: Fit, stream: tuple[Key, ...]) -> list[Tensor]:
    """Return the row indices of each step, shape `[B]` each.

    With `fit.epochs`, each epoch is a permutation of the rows, split into batches. A last batch of
    one example is merged with the batch before it, because BatchNorm needs at least two examples.
    With `fit.steps`, an endless sequence of permutations is split into full batches.

    Args:
        n: Number of rows.
        fit: The fit, which specifies the batch size and the number of epochs or steps.
        stream: Stream of the random permutations.
    """
    size = min(fit.batch_size, n)
    if fit.steps is None:
        full = _batches_per_epoch(n, size) - 1
        sizes = [*[size] * full, n - size * full] * fit.epochs
    else:
        sizes = [size] * step_count(n, fit)
    total = sum(sizes)
    orders = [
        torch.randperm(n, generator=keyed_generator(*stream, epoch))
        for epoch in range(-(-total // n))
    ]
    return list(torch.cat(orders)[:total].split(sizes))


def step_count(n: int, fit: Fit) -> int:
    """Return the number of batches that `index_batches` returns, without drawing batches.

    Args:
        n: Number of rows.
        fit: The fit, which specifies the batch size and the number of epochs or steps.
    """
    if fit.steps is not None:
        return max(1, fit.steps)
    return fit.epochs * _batches_per_epoch(n, min(fit.batch_size, n))


def _batches_per_epoch(n: int, size: int) -> int:
    # A client may claim any number of rows, so no list of their batches is created here.
    num_batches = -(-n // size)
    has_single_row = num_batches > 1 and n - (num_batches - 1) * size == 1
    return num_batches - has_single_row


class Batches:
    """Batches of a fit.

    Iterating over the batches yields the dropout key and the batch of each step.

    Args:
        participant: The participant that is trained.
        fit: The fit.
        memory: The device to which batches are moved.

    Attributes:
        count: Number of steps.
        examples: Total number of examples in all steps.
        source: The columns of all rows before they are moved to the device, keyed by name. Not set
            for `SampledBatches`.
        indices: Row indices of each step, shape `[B]` each. Not set for `SampledBatches`.
    """

    def __init__(self, participant: Participant, fit: Fit, memory: DeviceMemory) -> None:
        self.stream = participant.stream(fit.label, fit.stream_id)
        self._dropout_key = stream_key(*self.stream, "dropout")
        self.fit = fit
        self.memory = memory
        self.device = memory.device
        if isinstance(fit.data, SampledBatches):
            if fit.steps is None:
                raise ValueError("Fit.steps: required if data is SampledBatches, got None")
            self.count = step_count(fit.data.size, fit)
            self.examples = self.count * fit.data.size
            return
        self.source = fit.data.columns(participant)
        self.indices = self._draw_indices(len(next(iter(self.source.values()))))
        self.count = len(self.indices)
        self.examples = sum(map(len, self.indices))

    def _draw_indices(self, n: int) -> list[Tensor]:
        return index_batches(n, self.fit, self.stream)

    @cached_property
    def columns(self) -> Columns:
        """The columns of all rows, keyed by name. Large mapped ones are not on the device."""
        return {n: self.memory.keep_column(column) for n, column in self.source.items()}

    @cached_property
    def device_indices(self) -> Sequence[Tensor]:
        """The row indices of each step, on the device."""
        # All indices are copied to the device at once.
        lengths = [len(rows) for rows in self.indices]
        return torch.cat(self.indices).to(self.device).split(lengths)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        for step, columns in enumerate(self._main_batches()):
            batch = Batch(columns)
            if self.fit.augment is not None:
                batch["x"] = self.augment_batch(batch["x"], step)
            batch.update(self.extra_batch(step))
            yield self.dropout_key_at(step), batch

    def dropout_key_at(self, step: int) -> int:
        """Return the dropout key of a step."""
        return (self._dropout_key + step * GOLDEN) & MASK

    def _main_batches(self) -> Iterator[Tensors]:
        """Yield the batch of each step, without augmentation and extra batches."""
        if isinstance(self.fit.data, SampledBatches):
            for step in range(self.count):
                drawn = self.fit.data.draw(keyed_generator(*self.stream, step), self.fit.data.size)
                yield {n: t.to(self.device) for n, t in drawn.items()}
            return
        for rows in self.device_indices:
            yield {
                n: t.index_select(0, rows.to(t.device)).to(self.device)
                for n, t in self.columns.items()
            }

    def augment_batch(self, x: Tensor, step: int) -> Tensor:
        """Augment the images of a step at random.

        Args:
            x: Images, shape `[B, C, H, W]`.
            step: Index of the step, from 0.

        Returns:
            Augmented images, shape `[B, C, H, W]`.
        """
        assert self.fit.augment is not None
        return augment(x, self.fit.augment, keyed_generator(*self.stream, "augment", step))

    def extra_batch(self, step: int) -> Tensors:
        """Draw the extra batches of a step, with columns named `<extra batch>_<column>`."""
        columns: Tensors = {}
        for name, draws in self.fit.extra_batches.items():
            drawn = draws.draw(keyed_generator(*self.stream, name, step), draws.size)
            columns.update({f"{name}_{n}": t.to(self.device) for n, t in drawn.items()})
        return columns
