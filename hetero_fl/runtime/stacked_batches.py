"""The batches of many fits side by side: one gather a step for all participants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hetero_fl.plan import Draws
from hetero_fl.runtime.batches import Batches
from hetero_fl.runtime.dropout import GOLDEN, MASK
from hetero_fl.state import Columns


class StackedBatches:
    """Steps of fits that differ only in whose they are, the longest first, so that those still in training are a prefix.

    A batch shorter than another of the same step is filled up with copies of its own first row, which weigh nothing.
    """

    def __init__(self, runs: Sequence[Batches], device: torch.device) -> None:
        self.runs, self.device, self.fit = runs, device, runs[0].fit
        self.counts = [run.count for run in runs]
        self._keys = torch.tensor([run.dropout_key & MASK for run in runs], device=device)
        if isinstance(self.fit.data, Draws):
            return
        lengths = torch.tensor([len(b) for run in runs for b in run.indices])
        table = pad_sequence(
            [b for run in runs for b in run.indices], batch_first=True
        )  # [steps of all, longest batch]
        real = torch.arange(table.shape[1]) < lengths[:, None]
        self._sizes = [run.tolist() for run in lengths.split(self.counts)]
        self._starts = (torch.tensor(self.counts).cumsum(0) - torch.tensor(self.counts)).to(device)
        self._table = torch.where(real, table, table[:, :1]).to(device)
        self._real = real.to(torch.get_default_dtype()).to(device)
        self._columns: dict[str, tuple[Tensor, bool]] = {}  # all rows of all participants, and whether they share them
        for name, first in runs[0].source.items():
            shared = all(run.source[name] is first for run in runs)
            rows = first if shared else torch.cat([run.source[name] for run in runs])
            self._columns[name] = (rows.to(device), shared)
        n = torch.tensor([len(next(iter(run.source.values()))) for run in runs])
        self._offsets = (n.cumsum(0) - n).to(device)

    def sizes(self, step: int, active: int) -> list[int]:
        """How many examples the first so many participants have in that step."""
        if isinstance(self.fit.data, Draws):
            return [self.fit.data.size] * active
        return [sizes[step] for sizes in self._sizes[:active]]

    def keys(self, step: int, who: Tensor | slice) -> Tensor:
        """Dropout keys, int64 `[K]`."""
        return (self._keys[who] + step * GOLDEN) & MASK

    def at(self, step: int, who: Tensor | slice, sizes: Sequence[int]) -> tuple[Columns, Tensor | None]:
        """Columns `[K, B, …]` of those participants, who have `sizes` examples in that step; weights `[K, B]` if they differ."""
        members = range(len(self.runs))[who] if isinstance(who, slice) else who.tolist()
        weight = None
        if isinstance(self.fit.data, Draws):
            columns = _stack([self.runs[i].draw(step) for i in members])
        else:
            place, longest = self._starts[who] + step, max(sizes)
            rows = self._table[place, :longest]
            own = rows + self._offsets[who, None]
            columns = {name: all_rows[rows if shared else own] for name, (all_rows, shared) in self._columns.items()}
            if min(sizes) < longest:
                weight = self._real[place, :longest]
        if self.fit.augment is not None:
            for j, (i, size) in enumerate(zip(members, sizes, strict=True)):
                columns["x"][j, :size] = self.runs[i].augmented(columns["x"][j, :size], step)
        if self.fit.beside:
            columns |= _stack([self.runs[i].beside(step) for i in members])
        return columns, weight


def _stack(drawn: Sequence[Columns]) -> Columns:
    """Raises RuntimeError where the draws are not alike."""
    first = drawn[0]
    for other in drawn:
        if other.keys() != first.keys() or any(other[n].dtype != t.dtype for n, t in first.items()):
            raise RuntimeError("draws of different columns cannot be stacked")
    return {n: torch.stack([d[n] for d in drawn]) for n in first}
