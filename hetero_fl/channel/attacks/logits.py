"""Attacks on the predictions that clients send of the proxy rows. Where classes exclude one another, a row is forged about its
mean over the classes, so that forged probabilities still sum to one."""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_fl.channel.attacks.base import Attack, Scene, attack


class OnPredictions(Attack):
    """One that forges predictions: `strength` times what `lie` makes of the rows `[L, N, C]`, less their mean where classes
    exclude one another."""

    acts_on = frozenset({"rows"})
    strength = 10.0

    def said(self, honest: Tensor, scene: Scene) -> Tensor:
        level = honest.mean(-1, keepdim=True) if scene.task.kind == "multiclass" else torch.zeros_like(honest[..., :1])
        return level + self.factor * self.lie(honest - level, scene)

    def lie(self, rows: Tensor, scene: Scene) -> Tensor:
        """The false rows `[L, N, C]`."""
        raise TypeError(f"{type(self).__name__} defines no lie")


@attack("flipped")
class Flipped(OnPredictions):
    """The opposite of what the liar believes."""

    def lie(self, rows: Tensor, scene: Scene) -> Tensor:
        return -rows


@attack("confident_wrong")
class ConfidentWrong(OnPredictions):
    """Of each row a class that the liar does not believe in, drawn, with the confidence of the one that it does; every liar draws
    for itself."""

    def lie(self, rows: Tensor, scene: Scene) -> Tensor:
        return torch.stack([swapped(r, other(r, scene.draws(c))) for c, r in zip(scene.liars, rows, strict=True)])


@attack("targeted")
class Targeted(OnPredictions):
    """Of each row the class `target`, with the confidence of the one that the liar believes in."""

    def lie(self, rows: Tensor, scene: Scene) -> Tensor:
        to = torch.full(rows.shape[1:-1], self.config.target)
        return torch.stack([swapped(r, to) for r in rows])


@attack("collusion")
class Collusion(OnPredictions):
    """As `confident_wrong`, from the liars' mean belief, and all liars say the very same."""

    def lie(self, rows: Tensor, scene: Scene) -> Tensor:
        mean = rows.mean(0)
        return swapped(mean, other(mean, scene.draws())).expand_as(rows)


def other(rows: Tensor, draws: torch.Generator) -> Tensor:
    """For each row `[N, C]` a class other than the first one, `[N]`."""
    by = torch.randint(1, rows.shape[-1], rows.shape[:-1], generator=draws)
    return (rows.argmax(-1) + by) % rows.shape[-1]


def swapped(rows: Tensor, to: Tensor) -> Tensor:
    """Rows `[N, C]` whose largest value has changed places with that of the class `to`."""
    made, first = rows.clone(), rows.argmax(-1, keepdim=True)
    made.scatter_(-1, first, rows.gather(-1, to[..., None]))
    return made.scatter_(-1, to[..., None], rows.gather(-1, first))
