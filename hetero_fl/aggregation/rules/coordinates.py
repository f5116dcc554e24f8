"""Rules that look at each coordinate by itself (Yin et al. 2018); buffers like any other."""

from __future__ import annotations

from hetero_fl.aggregation.rules.base import Block, Rule, middle, rule
from hetero_fl.architecture import Tensors


@rule("median")
class Median(Rule):
    """The median of each coordinate; of an even number the mean of the two in the middle (Yin et al. 2018, Definition 1)."""

    def combine(self, block: Block, liars: int) -> Tensors:
        return {name: middle(block.stack(name)) for name in block.names}


@rule("trimmed_mean")
class TrimmedMean(Rule):
    """The mean of each coordinate without its f lowest and f highest (Yin et al. 2018, Definition 2)."""

    def combine(self, block: Block, liars: int) -> Tensors:
        return {name: middle(block.stack(name), liars) for name in block.names}
