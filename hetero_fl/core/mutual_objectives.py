"""Objectives of a client's model that is trained together with a small common model, the mentee."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from hetero_fl.core.images import to_shape
from hetero_fl.core.objectives import (
    Batch,
    Context,
    ModelViews,
    Supervised,
    distillation_loss,
)

# Lower bound of a sum of losses that is used as a divisor.
MIN_LOSS_SUM = 1e-12


@dataclass(frozen=True)
class MutualDistillation(Supervised):
    """The loss of two models that learn from each other (FML, Shen et al. 2020, eq. 6 and 7).

    The loss is the sum of α·task(p) + (1 - α)·KL(m ‖ p) for the client's model p and
    β·task(m) + (1 - β)·KL(p ‖ m) for the small common model m, the mentee. The teacher of each
    divergence is detached, so that one optimizer step trains each model with the gradient of its
    own loss.

    Args:
        alpha: Weight α of the model's supervised loss.
        beta: Weight β of the mentee's supervised loss.
        mentee: Slot of the mentee.
        shape: Shape of the mentee's inputs, `(channels, *size)`.
    """

    alpha: float = 0.5
    beta: float = 0.5
    mentee: str = "mentee"
    shape: tuple[int, ...] = ()

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        p = nets[self.slot](batch.x)
        m = nets[self.mentee](to_shape(batch.x, self.shape))
        own = self.alpha * self.loss_of_logits(p, batch, context) + (
            1 - self.alpha
        ) * distillation_loss(self.kind, p, m)
        shared = self.beta * self.loss_of_logits(m, batch, context) + (
            1 - self.beta
        ) * distillation_loss(self.kind, m, p)
        return own + shared


@dataclass(frozen=True)
class AdaptiveMutual(MutualDistillation):
    """The adaptive mutual distillation of FedKD (Wu et al. 2022, eq. 1 to 6).

    For the client's model t and the mentee s, the loss is task(t) + task(s) + (KL(s ‖ t) +
    KL(t ‖ s) + λ·MSE(h_t, W·h_s)) / (task(t) + task(s)), where h are the features and W is the
    matrix of the model in the slot `hidden`. The denominator is averaged over the batch and
    detached. A large supervised loss therefore reduces the weight of the divergence, but the models
    cannot reduce the divergence by increasing their supervised loss.

    Args:
        hidden_weight: Weight λ of the distance between features.
        hidden: Slot of the linear map W.
    """

    hidden_weight: float = 1.0
    hidden: str = "hidden"

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        own_features = nets[self.slot].forward_features(batch.x)
        t = nets[self.slot].forward_head(own_features)
        features = nets[self.mentee].forward_features(to_shape(batch.x, self.shape))
        s = nets[self.mentee].forward_head(features)
        mentor = self.loss_of_logits(t, batch, context)
        mentee = self.loss_of_logits(s, batch, context)
        divergence = distillation_loss(self.kind, t, s) + distillation_loss(self.kind, s, t)
        hidden = (own_features - nets[self.hidden](features)).square().mean(-1)
        weight = (batch.mean(mentor) + batch.mean(mentee)).detach().clamp(min=MIN_LOSS_SUM)
        return mentor + mentee + (divergence + self.hidden_weight * hidden) / weight


@dataclass(frozen=True)
class NestedRepresentations(MutualDistillation):
    """The loss of nested representations (FedMRL, Yi et al. 2024).

    The loss is m_F·task(head_F(r)) + m_G·task(head_G(r[:d₁])) with r = P·[g, f] of width d₂, where
    f are the features of the client's model F (width d₂), g are the features of the mentee G (width
    d₁), and P is the linear map in the slot `projection`.

    Args:
        alpha: Weight m_F.
        beta: Weight m_G.
        projection: Slot of the linear map P.
    """

    alpha: float = 1.0
    beta: float = 1.0
    projection: str = "projection"

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        f = nets[self.slot].forward_features(batch.x)
        g = nets[self.mentee].forward_features(to_shape(batch.x, self.shape))
        r = nets[self.projection](torch.cat([g, f], -1))
        fine = nets[self.slot].forward_head(r)
        coarse = nets[self.mentee].forward_head(r[..., : g.shape[-1]])
        own = self.alpha * self.loss_of_logits(fine, batch, context)
        return own + self.beta * self.loss_of_logits(coarse, batch, context)
