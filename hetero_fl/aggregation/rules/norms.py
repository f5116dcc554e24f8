"""Rules that bound how far one client can move the model. Both act on updates, what was sent less what was received."""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_fl.aggregation.rules.base import Block, Rule, middle, rule
from hetero_fl.architecture import Tensors

TINY = 1e-12


@rule("norm_bound")
class NormBound(Rule):
    """The mean of updates clipped to a norm: the one that is given, or the median of the clients' (Sun et al. 2019, section 4).

    Buffers have a norm of their own, always bounded by the median: a clipped one lies between what was received and sent.
    """

    uses_reference = True

    def combine(self, block: Block, liars: int) -> Tensors:
        made: Tensors = {}
        for names, bound in ((block.parameters, self.config.bound), (block.buffers, None)):
            norms = block.norms(names)
            most = middle(norms) if bound is None else torch.as_tensor(bound)
            made |= moved(block, names, (most / norms.clamp(min=TINY)).clamp(max=1.0) / len(block))
        return {name: made[name] for name in block.names}


@rule("fltrust")
class FLTrust(Rule):
    """Updates of the norm of the server's own, weighted by ReLU(cos) with it (Cao et al. 2021, Algorithm 2).

    The paper's server has labelled rows. Here it has the proxy set, without labels: its own update is what the reference
    becomes when the median of the uploaded models' predictions is distilled into it (hetero_fl.aggregation.rules.root).
    Buffers take the same weights and are never moved further than their client did. Without trust in anybody nothing moves.
    """

    uses_reference = True
    uses_root = True

    def combine(self, block: Block, liars: int) -> Tensors:
        assert block.root is not None  # the runtime has made it: `uses_root`
        trust, size = self.trust(block)
        norms = block.norms(block.parameters).clamp(min=TINY)
        share = trust / trust.sum().clamp(min=TINY)
        made = moved(block, block.parameters, share * size / norms)
        made |= moved(block, block.buffers, share * (size / norms).clamp(max=1.0))
        return {name: made[name] for name in block.names}

    @staticmethod
    def trust(block: Block) -> tuple[Tensor, Tensor]:
        """ReLU of the cosine of each client's update with the server's `[n]`, and the norm of the server's own."""
        assert block.root is not None
        dots, square = torch.zeros(len(block), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for name in block.parameters:
            start = block.start(name)
            own = (block.root[name] - start).double().flatten(1)
            dots += ((block.stack(name) - start).double().flatten(1) * own).sum(1)
            square += own[0].square().sum()
        size = square.sqrt()
        cosine = dots / (block.norms(block.parameters) * size).clamp(min=TINY)
        return cosine.clamp(min=0), size


def moved(block: Block, names: list[str], factors: Tensor) -> Tensors:
    """The mean of what clients received, moved by Σ factor·update."""
    made = {}
    for name in names:
        start = block.start(name)
        by = factors.to(start.dtype).reshape(-1, *[1] * (start.ndim - 1))
        made[name] = start.mean(0) + (by * (block.stack(name) - start)).sum(0)
    return made
