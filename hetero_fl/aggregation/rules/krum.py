"""Rules that select whole clients by their distances to one another. Buffers are those of the selected."""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_fl.aggregation.rules.base import Block, Rule, rule
from hetero_fl.architecture import Tensors


def scores(distances: Tensor, liars: int) -> Tensor:
    """Of each client the sum of the squared distances to its n − f − 2 nearest others, `[n]`; at least to one."""
    n = len(distances)
    others = distances.masked_fill(torch.eye(n, dtype=torch.bool), torch.inf)
    return others.sort(1).values[:, : max(1, n - liars - 2)].sum(1)


@rule("krum")
class Krum(Rule):
    """The client whose n − f − 2 nearest others are nearest (Blanchard et al. 2017); of equals the first by id."""

    def least(self, liars: int) -> int:
        return 2 * liars + 3

    def combine(self, block: Block, liars: int) -> Tensors:
        return dict(block.sent[int(scores(block.distances(), liars).argmin())])


@rule("multi_krum")
class MultiKrum(Krum):
    """The mean of the n − f clients with the lowest scores of Krum (Blanchard et al. 2017, section 5)."""

    def combine(self, block: Block, liars: int) -> Tensors:
        ranked = scores(block.distances(), liars).argsort(stable=True)
        chosen = ranked[: len(block) - liars].sort().values
        return {name: block.stack(name)[chosen].mean(0) for name in block.names}


@rule("bulyan")
class Bulyan(Rule):
    """n − 2f clients selected by Krum, one after the other; of each coordinate the mean of the n − 4f values nearest to their
    median (El Mhamdi et al. 2018, section 4)."""

    def least(self, liars: int) -> int:
        return 4 * liars + 3

    def combine(self, block: Block, liars: int) -> Tensors:
        distances, left = block.distances(), torch.arange(len(block))
        chosen: list[int] = []
        while len(chosen) < len(block) - 2 * liars:
            best = int(scores(distances[left][:, left], liars).argmin()) if len(left) > 1 else 0
            chosen.append(int(left[best]))
            left = torch.cat([left[:best], left[best + 1 :]])
        keep = len(chosen) - 2 * liars
        return {name: nearest_to_median(block.stack(name)[sorted(chosen)], keep) for name in block.names}


def nearest_to_median(values: Tensor, keep: int) -> Tensor:
    """Of each coordinate the mean of the `keep` values that lie nearest to its median, over dimension 0."""
    ordered = values.sort(0).values
    n = len(ordered)
    centre = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    near = (ordered - centre).abs().argsort(dim=0, stable=True)[:keep]
    return ordered.gather(0, near).mean(0)
