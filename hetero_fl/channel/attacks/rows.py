"""Attacks by what liars train on."""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_fl.channel.attacks.base import Attack, Scene, attack
from hetero_fl.config.robust import AttacksConfig
from hetero_fl.seeding import generator
from hetero_fl.state import Columns


@attack("label_flip")
class LabelFlip(Attack):
    """Labels y become C − 1 − y, or as `pairs` says (Tolpegin et al. 2020); labels that exclude nothing become their opposite."""

    acts_on = frozenset({"data"})

    def rows_of(self, columns: Columns, scene: Scene) -> Columns:
        y, classes = columns["y"], scene.task.outputs
        if scene.task.kind == "multilabel":
            return {**columns, "y": 1 - y}
        pairs = self.config.pairs
        becomes = torch.arange(classes).flip(0) if pairs is None else torch.arange(classes)
        for one, other in (pairs or {}).items():
            becomes[one] = other
        return {**columns, "y": becomes[y]}


@attack("backdoor")
class Backdoor(Attack):
    """A share of a liar's images bear a trigger and the target's label; it may send its update scaled besides (Gu et al. 2017;
    Bagdasaryan et al. 2020)."""

    def __init__(self, config: AttacksConfig) -> None:
        super().__init__(config)
        self.acts_on = frozenset({"data"}) if self.factor == 1 else frozenset({"data", "updates"})

    def rows_of(self, columns: Columns, scene: Scene) -> Columns:
        x, y = columns["x"], columns["y"]
        draws = generator(scene.seed, "attack", "stamped", scene.liars[0])
        some = torch.randperm(len(x), generator=draws)[: max(1, round(self.config.stamped * len(x)))]
        x, y = x.clone(), y.clone()
        x[some], y[some] = self.stamp(x[some], x), self.config.target
        return {**columns, "x": x, "y": y}

    def stamp(self, some: Tensor, all_: Tensor) -> Tensor:
        """These images `[n, C, H, W]` with the trigger: a square in the lower right corner, as bright as anything is."""
        made, side = some.clone(), self.config.trigger
        made[..., -side:, -side:] = all_.amax()
        return made

    def triggered(self, columns: Columns, scene: Scene) -> Columns | None:
        others = columns["y"] != self.config.target
        return {"x": self.stamp(columns["x"][others], columns["x"]), "y": columns["y"][others]}

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        return honest * self.factor
