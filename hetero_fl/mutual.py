"""Objectives of two models that train together on the same rows and learn from one another.

Each model minimises its own loss: what the other says is detached. The sum of both losses is therefore minimised in one
step, and each model's gradient is that of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.nets import Batch, Given, Nets
from hetero_fl.objectives import Supervised, divergence
from model_zoo import Outputs

SMALLEST = 1e-12  # a denominator: both models right and sure of it, to the last bit


def convertible(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether `as_shape` can turn examples of the one shape into the other: the same, or images of as many channels or one."""
    images = len(shape) == len(other) == 3
    return shape == other or (images and len({shape[0], other[0]} | {1}) <= 2)


def as_shape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Examples `[B, …]` as examples of another shape `(channels, *size)`: images are resized (bilinear), then their channels
    averaged into one or one repeated. What has the shape is returned as it is."""
    if tuple(x.shape[1:]) == shape:
        return x
    channels, *size = shape
    if list(x.shape[2:]) != size:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    if x.shape[1] == channels:
        return x
    return x.mean(1, keepdim=True) if channels == 1 else x.expand(-1, channels, *size)


@dataclass(frozen=True)
class Mutual(Supervised):
    """α·task(p) + (1 − α)·KL(m ‖ p) for the model p, and β·task(m) + (1 − β)·KL(p ‖ m) for its mentee m (Shen et al. 2020,
    FML, eq. 6 and 7). The mentee sees examples in `shape`, (channels, *size)."""

    alpha: float = 0.5
    beta: float = 0.5
    mentee: str = "mentee"
    shape: tuple[int, ...] = ()

    def both(self, nets: Nets, batch: Batch) -> tuple[Outputs, Outputs]:
        """What the model and its mentee say."""
        return nets[self.slot](batch.x), nets[self.mentee](as_shape(batch.x, self.shape))

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        p, m = self.both(nets, batch)
        own = self.alpha * self.of(p, batch, given) + (1 - self.alpha) * divergence(self.kind, p.logits, m.logits)
        shared = self.beta * self.of(m, batch, given) + (1 - self.beta) * divergence(self.kind, m.logits, p.logits)
        return own + shared


@dataclass(frozen=True)
class AdaptiveMutual(Mutual):
    """task(t) + task(s) + (KL(s ‖ t) + KL(t ‖ s) + λ·MSE(h_t, W·h_s)) / (task(t) + task(s)) for mentor t and mentee s
    (Wu et al. 2022, FedKD, eq. 1 to 6), h the features and W the matrix of the slot `hidden`.

    The denominator is the batch's mean and a weight, so no gradient goes through it: two models that are often wrong
    listen less to one another, but neither gets better at its distance by being wrong.
    """

    hidden_weight: float = 1.0
    hidden: str = "hidden"

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        t, s = self.both(nets, batch)
        mentor, mentee = self.of(t, batch, given), self.of(s, batch, given)
        apart = divergence(self.kind, t.logits, s.logits) + divergence(self.kind, s.logits, t.logits)
        hidden = (t.features - nets[self.hidden](s.features).logits).square().mean(-1)
        weight = (batch.mean(mentor) + batch.mean(mentee)).detach().clamp(min=SMALLEST)
        return mentor + mentee + (apart + self.hidden_weight * hidden) / weight


@dataclass(frozen=True)
class Nested(Mutual):
    """m_F·task(head_F(r)) + m_G·task(head_G(r[:d₁])), r = P·[g, f] of width d₂ (Yi et al. 2024, FedMRL); g are features of the
    mentee G (width d₁), f those of the own model F (width d₂), P is the linear map of the slot `projection`.

    `alpha` is m_F, `beta` m_G.
    """

    alpha: float = 1.0
    beta: float = 1.0
    projection: str = "projection"

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        f, g = (outputs.features for outputs in self.both(nets, batch))
        r = nets[self.projection](torch.cat([g, f], -1)).logits
        fine, coarse = nets[self.slot].head(r), nets[self.mentee].head(r[..., : g.shape[-1]])
        own = self.alpha * self.of(Outputs(fine, r), batch, given)
        return own + self.beta * self.of(Outputs(coarse, r), batch, given)
