"""Objectives in the space of features: prototypes that are trained, and generators of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.nets import Batch, Given, Nets
from hetero_fl.objectives import Objective, Supervised, divergence

NEAREST = 1e-12  # a squared distance: below it the root has no gradient to speak of, and at nought none at all


@dataclass(frozen=True)
class AdaptiveMargin(Objective):
    """−log softmax_y(−(‖x − P̂_c‖ + δ·[c = y])) of a client's prototype x of class y (Zhang et al. 2024, FedTGP).

    P̂ = F(P̆): the rows of the slot `vectors` (a linear map of one-hot classes) through the network of the slot `slot`.
    given `one_hot` `[C, C]`, the identity, and `margin`, the number δ.
    """

    slot: str = "prototypes"
    vectors: str = "vectors"

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        prototypes = nets[self.slot](nets[self.vectors](given["one_hot"]).logits).logits
        squares = (batch.x[:, None] - prototypes[None]).square().sum(-1)
        apart = squares.clamp(min=NEAREST).sqrt() + given["margin"] * given["one_hot"][batch.y]
        return F.cross_entropy(-apart, batch.y, reduction="none")


@dataclass(frozen=True)
class Generate(Objective):
    """Σ_k a_k(y)·CE(head_k(G(y, ε)), y) + η·exp(−mean_ij(mean|z_i − z_j| · mean(ε_i − ε_j)²)), z = G(y, ε) (Zhu et al. 2021,
    FedGen, in the form of the authors' code: teachers weighted one by one, and features that differ where noise does).

    Columns `x` `[B, C + noise]`, one-hot class beside noise, and `y`. given `heads`, the teachers' `weight` `[K, C, d]` and
    `bias` `[K, C]`, and `say` `[K, C]`, the weight of each teacher's word on a class.
    """

    diversity: float = 1.0
    slot: str = "generator"

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        z, heads = nets[self.slot](batch.x).logits, given["heads"]
        logits = torch.einsum("kcd,bd->kbc", heads["weight"], z) + heads["bias"][:, None]
        wrong = -logits.log_softmax(-1)[:, torch.arange(len(z)), batch.y]  # [K, B]
        noise = batch.x[:, heads["bias"].shape[-1] :]
        far = (z[:, None] - z[None]).abs().mean(-1) * (noise[:, None] - noise[None]).square().mean(-1)
        return (given["say"][:, batch.y] * wrong).sum(0) + self.diversity * torch.exp(-far.mean())


@dataclass(frozen=True)
class FromGenerator(Supervised):
    """The task plus α·CE(head(G(ŷ, ε)), ŷ) on drawn classes ŷ (Zhu et al. 2021, FedGen), and, as the authors' code adds,
    β·KL(head(G(y, ε)) ‖ model(x)) on the batch's own.

    Columns `fake_x` and `fake_y` as `Generate` has them; with β `noise_x` `[at least B, noise]` too, and given `one_hot`.
    """

    weight: float = 1.0
    latent_weight: float = 0.0
    generator: str = "generator"

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        return self.private(nets, batch, given) + self.public(nets, batch, given)

    def public(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        features = nets[self.generator](batch.fake_x).logits
        return self.weight * F.cross_entropy(nets[self.slot].head(features), batch.fake_y)

    def private(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        net, generator = nets[self.slot], nets[self.generator]
        outputs = net(batch.x)
        loss = self.of(outputs, batch, given)
        if self.latent_weight:
            noise = batch.noise_x[: len(batch.y)]
            alike = generator(torch.cat([given["one_hot"][batch.y], noise], 1)).logits
            loss = loss + self.latent_weight * divergence(self.kind, outputs.logits, net.head(alike))
        return loss
