"""Batches of training steps, which are equal on all machines and with all backends.

In this module, a step is an optimizer step of a `Fit`. A stream is a tuple of values that is hashed
to seed random generators (see `hetero_fl.utils.seeding`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hetero_fl.core.image_transforms import augment
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import Batch
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit, SampledBatches
from hetero_fl.core.stored_rows import read_batches
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

    Iterating over the batches yields the dropout key and the batch of each step. The columns of an
    extra batch have the names `<extra batch>_<column>`.

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

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        for step, columns in enumerate(self._main_batches()):
            batch = Batch(columns)
            # With Poisson sampling, a batch may be empty.
            if self.fit.augment is not None and len(batch["x"]):
                generator = keyed_generator(*self.stream, "augment", step)
                batch["x"] = augment(batch["x"], self.fit.augment, generator)
            for name, draws in self.fit.extra_batches.items():
                drawn = draws.draw(keyed_generator(*self.stream, name, step), draws.size)
                batch.update({f"{name}_{n}": t.to(self.device) for n, t in drawn.items()})
            yield (self._dropout_key + step * GOLDEN) & MASK, batch

    def _main_batches(self) -> Iterator[Tensors]:
        """Yield the batch of each step, without augmentation and extra batches."""
        if isinstance(self.fit.data, SampledBatches):
            for step in range(self.count):
                drawn = self.fit.data.draw(keyed_generator(*self.stream, step), self.fit.data.size)
                yield {n: t.to(self.device) for n, t in drawn.items()}
            return
        # All indices are copied to the device at once.
        lengths = [len(rows) for rows in self.indices]
        indices = torch.cat(self.indices).to(self.device).split(lengths)
        columns = [self.memory.keep_column(column) for column in self.source.values()]
        readers = [read_batches(column, indices) for column in columns]
        for tensors in zip(*readers, strict=True):
            yield {n: t.to(self.device) for n, t in zip(self.source, tensors, strict=True)}
