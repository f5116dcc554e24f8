"""Keyed batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from hetero_fl.core.objectives import Batch
from hetero_fl.core.participant import Columns, Participant
from hetero_fl.core.plan import Fit, SampledBatches
from hetero_fl.data.preprocessing import augment
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.utils.seeding import Key, keyed_generator, stream_key

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # between the dropout keys of two steps


# Which examples each step of a fit sees: keyed, the same wherever it is computed.


def index_batches(n: int, fit: Fit, stream: tuple[Key, ...], work: float = 1.0) -> list[Tensor]:
    """Row numbers for each step, `[B]` each.

    Epochs: each a permutation, cut into batches; a last batch of one joins the one before (BatchNorm has no variance of
    one example). Steps: endless permutations, always full batches. `work` is the share of the steps there is time for.
    """
    size = min(fit.batch_size, n)
    if fit.steps is None:
        batches: list[Tensor] = []
        for epoch in range(fit.epochs):
            cut = list(torch.randperm(n, generator=keyed_generator(*stream, epoch)).split(size))
            if len(cut) > 1 and len(cut[-1]) == 1:
                cut[-2:] = [torch.cat(cut[-2:])]
            batches += cut
        return batches[: max(1, int(len(batches) * work))]
    total = max(1, int(fit.steps * work))
    epochs = -(-total * size // n)
    order = torch.cat(
        [torch.randperm(n, generator=keyed_generator(*stream, e)) for e in range(epochs)]
    )
    return list(order[: total * size].split(size))


def step_count(n: int, fit: Fit, work: float = 1.0) -> int:
    """How many steps a fit on `n` rows takes: the length of `index_batches`, before anything is drawn."""
    return max(1, int(full_step_count(n, fit.batch_size, fit.epochs, fit.steps) * work))


def full_step_count(n: int, batch_size: int, epochs: int, steps: int | None) -> int:
    """How many steps a fit on `n` rows takes where there is time for all of them."""
    if steps is not None:
        return steps
    size = min(batch_size, n)
    each = -(-n // size)
    if each > 1 and n - (each - 1) * size == 1:
        each -= 1
    return epochs * each


class Batches:
    """The steps of one fit: `len()` of them, each a dropout key and a batch."""

    def __init__(self, participant: Participant, fit: Fit, memory: DeviceMemory) -> None:
        self.stream = participant.stream(fit.label, fit.as_id)
        self.fit = fit
        self.memory = memory
        self.device = memory.device
        if isinstance(fit.data, SampledBatches):
            if fit.steps is None:
                raise ValueError("a fit on endless draws needs steps")
            self.count = step_count(fit.data.size, fit, participant.step_share)
            self.examples = self.count * fit.data.size
            return
        self.source = fit.data.columns(participant)
        self.indices = self._draw_indices(
            len(next(iter(self.source.values()))), participant.step_share
        )
        self.count = len(self.indices)
        self.examples = sum(map(len, self.indices))

    def _draw_indices(self, n: int, work: float) -> list[Tensor]:
        return index_batches(n, self.fit, self.stream, work)

    @cached_property
    def columns(self) -> Columns:
        """All rows, on the device."""
        return {n: self.memory.keep(t).to(self.device) for n, t in self.source.items()}

    @cached_property
    def device_indices(self) -> Sequence[Tensor]:
        """Row numbers of each step, on the device: one copy for the whole fit."""
        lengths = [len(rows) for rows in self.indices]
        return torch.cat(self.indices).to(self.device).split(lengths)

    @cached_property
    def dropout_key(self) -> int:
        """From which those of the steps follow."""
        return stream_key(*self.stream, "dropout")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        for i in range(self.count):
            yield self.dropout_key_at(i), self._batch(i)

    def dropout_key_at(self, step: int) -> int:
        """Return the seed of a step's dropout masks."""
        return (self.dropout_key + step * GOLDEN) & MASK

    def _batch(self, i: int) -> Batch:
        if isinstance(self.fit.data, SampledBatches):
            batch = Batch(self.sampled_batch(i))
        else:
            rows = self.device_indices[i]
            batch = Batch({n: t.index_select(0, rows) for n, t in self.columns.items()})
        if self.fit.augment is not None:
            batch["x"] = self.augment_batch(batch["x"], i)
        batch.update(self.extra_batch(i))
        return batch

    def sampled_batch(self, i: int) -> Columns:
        """The batch of step `i` of a fit on endless draws."""
        assert isinstance(self.fit.data, SampledBatches)
        columns = self.fit.data.draw(keyed_generator(*self.stream, i), self.fit.data.size)
        return {n: t.to(self.device) for n, t in columns.items()}

    def augment_batch(self, x: Tensor, i: int) -> Tensor:
        """The images of step `i`, changed as its key has it."""
        assert self.fit.augment is not None
        return augment(x, self.fit.augment, keyed_generator(*self.stream, "augment", i))

    def extra_batch(self, step: int) -> Columns:
        """What is drawn beside the batch of step `step`, under the names that an objective reads."""
        columns: Columns = {}
        for name, draws in self.fit.extra_batches.items():
            drawn = draws.draw(keyed_generator(*self.stream, name, step), draws.size)
            columns.update({f"{name}_{n}": t.to(self.device) for n, t in drawn.items()})
        return columns
