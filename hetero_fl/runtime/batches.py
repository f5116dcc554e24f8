"""Which examples each step of a fit sees: keyed, the same wherever it is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hetero_fl.data.augment import augment
from hetero_fl.objectives import Batch
from hetero_fl.plan import Draws, Fit
from hetero_fl.runtime.dropout import GOLDEN, MASK
from hetero_fl.seeding import Key, generator, key
from hetero_fl.state import Participant


def index_batches(n: int, fit: Fit, stream: tuple[Key, ...], work: float = 1.0) -> list[Tensor]:
    """Row numbers for each step, `[B]` each.

    Epochs: each a permutation, cut into batches; a last batch of one joins the one before (BatchNorm has no variance of
    one example). Steps: endless permutations, always full batches. `work` is the share of the steps there is time for.
    """
    size = min(fit.batch_size, n)
    if fit.steps is None:
        batches: list[Tensor] = []
        for epoch in range(fit.epochs):
            cut = list(torch.randperm(n, generator=generator(*stream, epoch)).split(size))
            if len(cut) > 1 and len(cut[-1]) == 1:
                cut[-2:] = [torch.cat(cut[-2:])]
            batches += cut
        return batches[: max(1, int(len(batches) * work))]
    total = max(1, int(fit.steps * work))
    epochs = -(-total * size // n)
    order = torch.cat([torch.randperm(n, generator=generator(*stream, e)) for e in range(epochs)])
    return list(order[: total * size].split(size))


class Batches:
    """The steps of one fit: `len()` of them, each a dropout key and a batch."""

    def __init__(self, participant: Participant, fit: Fit, device: torch.device) -> None:
        self.stream = participant.stream(fit.label, fit.as_id)
        self.fit, self.device = fit, device
        if isinstance(fit.data, Draws):
            if fit.steps is None:
                raise ValueError("a fit on endless draws needs steps")
            self.count, self.examples = fit.steps, fit.steps * fit.data.size
            return
        self.columns = {n: t.to(device) for n, t in fit.data.columns(participant).items()}
        self.indices = index_batches(len(next(iter(self.columns.values()))), fit, self.stream, participant.work)
        self.count, self.examples = len(self.indices), sum(map(len, self.indices))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        base = key(*self.stream, "dropout")
        for i in range(self.count):
            yield (base + i * GOLDEN) & MASK, self._batch(i)

    def _batch(self, i: int) -> Batch:
        if isinstance(self.fit.data, Draws):
            columns = self.fit.data.draw(generator(*self.stream, i), self.fit.data.size)
            batch = Batch({n: t.to(self.device) for n, t in columns.items()})
        else:
            rows = self.indices[i].to(self.device)
            batch = Batch({n: t.index_select(0, rows) for n, t in self.columns.items()})
        if self.fit.augment is not None:
            batch["x"] = augment(batch["x"], self.fit.augment, generator(*self.stream, "augment", i))
        for name, draws in self.fit.beside.items():
            drawn = draws.draw(generator(*self.stream, name, i), draws.size)
            batch.update({f"{name}_{n}": t.to(self.device) for n, t in drawn.items()})
        return batch
