"""Membership inference: the scores of an attack, and what they are worth. Tensors in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hetero_fl.objectives import supervised
from hetero_fl.seeding import Key, generator
from hetero_fl.task import Task

FALSE_ALARMS = 0.01  # the rate at which hits are counted
RESAMPLES = 1000  # of the bootstrap
SMALLEST = 1e-12  # a variance, and a squared error


def confidence(task: Task, logits: Tensor, y: Tensor) -> Tensor:
    """How sure a model is of what is true, on a scale on which that is about normal, float64 `[N]`.

    Classes: the log-odds of the true one, log p_y − log(1 − p_y) (Carlini et al. 2022, section V.A), computed from the logits
    so that no certainty overflows. Labels: the mean over them. Regression: minus the logarithm of the mean squared error.
    """
    z = logits.double()
    if task.kind == "multiclass":
        others = z.scatter(1, y[:, None], -torch.inf).logsumexp(1)
        return z.gather(1, y[:, None]).squeeze(1) - others
    if task.kind == "multilabel":
        return ((2 * y - 1) * z).mean(1)
    return -supervised(task.kind, z, y.double()).clamp(min=SMALLEST).log()


def loss_score(task: Task, logits: Tensor, y: Tensor) -> Tensor:
    """Minus the loss: whoever is fitted well is taken for a member (Yeom et al. 2018), float64 `[N]`."""
    return -supervised(task.kind, logits.double(), y.double() if y.is_floating_point() else y)


def likelihood_ratio(target: Tensor, shadows: Tensor, inside: Tensor) -> Tensor:
    """Log-likelihood ratio of each example's being a member, up to a factor common to all, `[N]` (after Carlini et al. 2022).

    LiRA compares N(φ; μ_in, σ²_in) with N(φ; μ_out, σ²_out). Of few shadows no example's gap μ_in − μ_out can be told, and no
    variance. So the gap and the variance σ² are those of all examples (as section VI.D of the paper has the variance), and an
    example's own is only its level μ = (μ_in + μ_out)/2. The ratio is gap·(φ − μ)/σ² then: how much surer the model is
    than other models are, half of them trained on the example. Returned is (φ − μ)/σ; members are the surer.

    Args:
        target: confidence of the attacked model, `[N]`.
        shadows: of the shadow models, `[S, N]`.
        inside: which of them were trained on the example, bool `[S, N]`; at least two with and two without it.
    """
    means, squares, freedom = [], torch.zeros((), dtype=target.dtype), 0
    for side in (inside, ~inside):
        means.append((shadows * side).sum(0) / side.sum(0))
        squares = squares + ((shadows - means[-1]) * side).square().sum()
        freedom += int((side.sum(0) - 1).sum())
    return (target - (means[0] + means[1]) / 2) / (squares / freedom).clamp(min=SMALLEST).sqrt()


@dataclass(frozen=True)
class Verdict:
    """What an attack achieved: area under its ROC curve, hits at 1% false alarms, their standard errors, and the curve."""

    auroc: float
    auroc_se: float
    hits: float
    hits_se: float
    curve: list[list[float]]  # [false alarms, hits], from (0, 0) to (1, 1)

    @property
    def at_chance(self) -> bool:
        """Whether one half lies within two standard errors of the area."""
        return abs(self.auroc - 0.5) <= 2 * self.auroc_se


def verdict(scores: Tensor, member: Tensor, *key: Key) -> Verdict:
    """Of scores `[N]`, high for members, and who is one, bool `[N]`. Standard errors by a bootstrap over members and over
    non-members, drawn by the key; they do not know of the luck of training, in the target or in the shadows."""
    ins, outs = scores[member], scores[~member].sort().values
    draws = generator(*key)
    picked_in = torch.randint(len(ins), (RESAMPLES, len(ins)), generator=draws)
    picked_out = torch.randint(len(outs), (RESAMPLES, len(outs)), generator=draws)
    areas, hits = [], []
    for i, o in zip(picked_in, picked_out, strict=True):
        some = outs[o].sort().values
        areas.append(_area(ins[i], some))
        hits.append(_hits(ins[i], some))
    se = [float(torch.tensor(values, dtype=torch.float64).std()) for values in (areas, hits)]
    return Verdict(_area(ins, outs), se[0], _hits(ins, outs), se[1], _curve(ins, outs))


def _area(ins: Tensor, outs: Tensor) -> float:
    """P(a member's score is above a non-member's), ties counted half; `outs` sorted."""
    both = torch.searchsorted(outs, ins) + torch.searchsorted(outs, ins, right=True)
    return float(both.double().mean()) / (2 * len(outs))


def _hits(ins: Tensor, outs: Tensor) -> float:
    """Share of members above a threshold that at most so many non-members exceed; `outs` sorted. Of fewer than a hundred
    non-members none may."""
    allowed = int(FALSE_ALARMS * len(outs))
    return float((ins > outs[len(outs) - 1 - allowed]).double().mean())


def _curve(ins: Tensor, outs: Tensor) -> list[list[float]]:
    """The ROC curve's corners."""
    levels = torch.cat([ins, outs]).unique().flip(0)
    hits = [(ins >= level).double().mean() for level in levels]
    alarms = [(outs >= level).double().mean() for level in levels]
    return [[0.0, 0.0], *([float(a), float(h)] for a, h in zip(alarms, hits, strict=True))]
