"""Objectives of methods that distil: the task with a teacher beside it, and the mixture weights of teachers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hetero_fl.nets import Batch, Given, Nets
from hetero_fl.objectives import Objective, Supervised, divergence

TINY = 1e-12  # of a probability, before its logarithm


@dataclass(frozen=True)
class Taught(Supervised):
    """The task plus λ·KL·T² towards the column `teacher` (logits) of the same examples (He et al. 2020, FedGKT). A
    column `log_prior` is logit adjustment by example, for rows of several clients."""

    weight: float = 1.0
    temperature: float = 1.0

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        outputs = nets[self.slot](batch.x)
        towards = divergence(self.kind, outputs.logits, batch.teacher, self.temperature)
        given = {**given, "log_prior": batch.log_prior} if "log_prior" in batch else given
        return self.of(outputs, batch, given) + self.weight * towards


@dataclass(frozen=True)
class Coefficients(Objective):
    """KL(Σ_j c_kj p_j ‖ p_k)·T² + ρ‖c_k − 1/K‖², an example being a client k (Zhang et al. 2021, KT-pFL).

    The slot `mix` maps column `x`, one-hot `[B, K]`, to c_k; `own` is k; given `predictions` `[K, D, C]`, softened by T. The
    KL is the mean over the D public examples. Unlike in distillation the gradient goes through the mixture.
    """

    temperature: float = 1.0
    rho: float = 0.7

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        c, p = nets.mix(batch.x).logits, given["predictions"]
        mixed = torch.einsum("bk,kdc->bdc", c, p).clamp(min=TINY)
        apart = (mixed * (mixed.log() - p[batch.own].clamp(min=TINY).log())).sum(-1).mean(-1)
        return self.temperature**2 * apart + self.rho * (c - 1 / c.shape[-1]).square().sum(-1)
