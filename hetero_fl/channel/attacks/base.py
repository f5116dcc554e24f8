"""What an attack is: what simulated liars do to their rows, or to their uploads with one another's in hand. For studies only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hetero_fl.config.robust import AttacksConfig
from hetero_fl.registry import Registry
from hetero_fl.seeding import generator
from hetero_fl.state import Columns
from hetero_fl.task import Task

ActsOn = Literal["data", "updates", "rows"]


@dataclass(frozen=True)
class Scene:
    """Who lies, and when.

    `senders`: how many sent this item, liars included; `item`: the name of what is forged; `tensor`: of which tensor in it.
    """

    task: Task
    seed: int
    round: int
    liars: Sequence[str]
    senders: int = 0
    item: str = ""
    tensor: str = ""

    def draws(self, liar: str = "") -> torch.Generator:
        """A generator of this liar's own; of all together by default."""
        return generator(self.seed, self.round, "attack", liar, self.item, self.tensor)


class Attack:
    """An attack. `acts_on`: the training rows, the updates (parameters, class sums), the predictions on proxy rows; what it
    does not act on is as honest clients have it, to the bit."""

    acts_on: frozenset[ActsOn] = frozenset()
    strength: ClassVar[float] = 1.0  # where the configuration says none

    def __init__(self, config: AttacksConfig) -> None:
        self.config = config
        self.factor = config.strength or self.strength

    def rows_of(self, columns: Columns, scene: Scene) -> Columns:
        """A liar's training rows, from its own."""
        return columns

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        """`[L, …]`: what L liars send, from what they would have sent honestly, as differences from what they received."""
        return honest

    def said(self, honest: Tensor, scene: Scene) -> Tensor:
        """`[L, N, C]`: the predictions that they send."""
        return honest

    def triggered(self, columns: Columns, scene: Scene) -> Columns | None:
        """Test rows on which success shows as the class `config.target`; None: this attack has none."""
        return None


attack: Registry[type[Attack]] = Registry("attack", lambda: Attack)
