"""Attacks on the update, tensor by tensor. Liars have trained honestly, and know one another's updates; buffers (BatchNorm
statistics) they send as they are, for a variance below nought would give them away."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from hetero_fl.channel.attacks.base import Attack, Scene, attack


class OnUpdates(Attack):
    """One that forges whatever is sent."""

    acts_on = frozenset({"updates", "rows"})

    def said(self, honest: Tensor, scene: Scene) -> Tensor:
        return self.updates(honest, scene)


@attack("sign_flip")
class SignFlip(OnUpdates):
    """−strength·u: the update against its own direction."""

    strength = 4.0

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        return -self.factor * honest


@attack("scaled")
class Scaled(OnUpdates):
    """strength·u: the update boosted."""

    strength = 10.0

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        return self.factor * honest


@attack("gaussian")
class Gaussian(OnUpdates):
    """Noise in place of the update, strength times as large (root mean square of the tensor); each liar has its own
    (Blanchard et al. 2017, section 5)."""

    strength = 10.0

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        noise = [
            torch.randn(u.shape, generator=scene.draws(c), dtype=u.dtype)
            for c, u in zip(scene.liars, honest, strict=True)
        ]
        size = honest.flatten(1).square().mean(1).sqrt().reshape(-1, *[1] * (honest.ndim - 1))
        return self.factor * size * torch.stack(noise)


@attack("little_is_enough")
class LittleIsEnough(OnUpdates):
    """mean − z·std, by coordinate, of what the liars know; all send the same (Baruch et al. 2019, Algorithm 3).

    z: `strength`, or the largest with which enough honest clients lie further out: Φ(z) = (n − f − s)/(n − f), with
    s = ⌊n/2⌋ + 1 − f.
    """

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        forged = honest.mean(0) - self.z(scene.senders, len(honest)) * honest.std(0, correction=0)
        return forged.expand_as(honest)

    def z(self, n: int, liars: int) -> float:
        """How many deviations from the mean."""
        if self.config.strength is not None:
            return self.config.strength
        honest, supporters = n - liars, n // 2 + 1 - liars
        share = (honest - supporters) / honest if honest > 0 else 0.5
        return NormalDist().inv_cdf(min(0.999, max(0.5, share)))


@attack("inner_product")
class InnerProduct(OnUpdates):
    """−strength·mean of what the liars know: the sum's product with the true gradient turns negative (Xie et al. 2020,
    section 3); all send the same."""

    strength = 8.0

    def updates(self, honest: Tensor, scene: Scene) -> Tensor:
        return (-self.factor * honest.mean(0)).expand_as(honest)
