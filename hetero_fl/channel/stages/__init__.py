"""The stages of the channel, from the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hetero_fl.channel.stages.base import Format, Stage
from hetero_fl.channel.stages.classes import TopClasses
from hetero_fl.channel.stages.half import Half
from hetero_fl.channel.stages.lowrank import LowRank
from hetero_fl.channel.stages.quantize import Quantize
from hetero_fl.channel.stages.sparse import RandomK, TopK
from hetero_fl.config.channel import StageConfig

MADE: dict[str, Callable[[StageConfig, bool], Stage | Format]] = {
    "topk": lambda c, entropy: TopK(c.topk or 0, entropy),
    "randk": lambda c, entropy: RandomK(c.randk or 0),
    "lowrank": lambda c, entropy: LowRank(c.lowrank or 0),
    "top_classes": lambda c, entropy: TopClasses(c.top_classes or 0),
    "quantize": lambda c, entropy: Quantize(c.quantize or 0, c.bucket),
    "half": lambda c, entropy: Half(),
}


def dearest(stages: Sequence[Stage | Format]) -> tuple[Stage | Format, ...]:
    """A chain whose messages are as long as those of this one can be, and whose lengths do not depend on the numbers."""
    return tuple(stage.dearest() if isinstance(stage, Stage) else stage for stage in stages)


def stages_of(chain: Sequence[StageConfig], entropy: bool) -> tuple[Stage | Format, ...]:
    """The stages of a configured chain, in its order; `entropy`: code indices, where that makes them shorter."""
    return tuple(MADE[stage.name](stage, entropy) for stage in chain)
