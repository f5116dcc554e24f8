"""What is optimised: one loss per example and, apart from it, a penalty on the parameters.

Keeping the two apart gives exact weighting of ragged batches, per-example clipping (the penalty is never clipped), and
batched training of many clients. Objectives are frozen dataclasses: equal ones may share a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.nets import Batch, Given, Nets
from hetero_fl.task import Task
from model_zoo import Outputs

Kind = Literal["multiclass", "multilabel", "regression"]


class Objective:
    """One loss per example, and a penalty of the parameters alone."""

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        """`[B]`."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def penalty(self, nets: Nets, given: Given) -> Tensor | float:
        """A number; never clipped, masked or weighted."""
        return 0.0

    def private(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        """`[B]`, what of the loss reads the rows: it is clipped and noised where they are to stay private. All of it, unless an
        objective says what `public` is."""
        return self.loss(nets, batch, given)

    def public(self, nets: Nets, batch: Batch, given: Given) -> Tensor | float:
        """A number, what of the loss reads only columns that were drawn beside the rows (`Fit.beside`)."""
        return 0.0

    def total(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        """The number to minimise on this batch."""
        return batch.mean(self.loss(nets, batch, given)) + self.penalty(nets, given)


def supervised(kind: Kind, logits: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
    """Cross-entropy, binary cross-entropy (mean over labels) or squared error (mean over targets), `[B]`."""
    if kind == "multiclass":
        return F.cross_entropy(logits, y, reduction=reduction)
    if kind == "multilabel":
        each = F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(-1)
    else:
        each = (logits - y).square().mean(-1)
    return each.mean() if reduction == "mean" else each


def divergence(kind: Kind, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Distance of a student's logits from a teacher's, `[B]`; the teacher is detached.

    Classes: KL(softmax(teacher/T) ‖ softmax(student/T)) · T² (Hinton et al. 2015), the sum over classes, so that its mean
    over examples is `batchmean`. Labels: the same for each label's Bernoulli, summed. Regression: squared error.
    """
    teacher = teacher.detach()
    if kind == "regression":
        return (student - teacher).square().mean(-1)
    t, s = teacher / temperature, student / temperature
    if kind == "multilabel":
        p = t.sigmoid()
        gap = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    else:
        log_t = F.log_softmax(t, -1)
        gap = log_t.exp() * (log_t - F.log_softmax(s, -1))  # F.kl_div has no batching rule under vmap
    return gap.sum(-1) * temperature**2


def squared_distance(parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Tensor:
    """Σ‖θ − anchor‖² over all tensors."""
    return torch.stack([(p - anchor[n]).square().sum() for n, p in parameters.items()]).sum()


@dataclass(frozen=True)
class Supervised(Objective):
    """The local task.

    given `log_prior` `[C]`: logit adjustment, cross-entropy of z + log π (Menon et al. 2021, eq. 10); given
    `class_weights` `[C]`: each example's loss times its class's weight.
    """

    kind: Kind = "multiclass"
    slot: str = "model"

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        return self.of(nets[self.slot](batch.x), batch, given)

    def of(self, outputs: Outputs, batch: Batch, given: Given, reduction: str = "none") -> Tensor:
        """The loss of outputs that another objective has computed."""
        logits = outputs.logits + given["log_prior"] if "log_prior" in given else outputs.logits
        if "class_weights" in given:
            each = supervised(self.kind, logits, batch.y) * given["class_weights"][batch.y]
            return each.mean() if reduction == "mean" else each
        return supervised(self.kind, logits, batch.y, reduction)

    def total(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        if batch.weight is not None or type(self).loss is not Supervised.loss:
            return super().total(nets, batch, given)
        return self.of(nets[self.slot](batch.x), batch, given, "mean") + self.penalty(nets, given)  # one fused kernel


@dataclass(frozen=True)
class Masked(Supervised):
    """The task with the logits of classes that are not there held at nought (Diao et al. 2021, HeteroFL, section 3).

    given `present` `[C]` is 1 where the client has the class, else 0.
    """

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        outputs = nets[self.slot](batch.x)
        return self.of(outputs._replace(logits=outputs.logits * given["present"]), batch, given)


@dataclass(frozen=True)
class Proximal(Supervised):
    """The task plus (μ/2)·Σ‖θ − anchor‖² (Li et al. 2020, FedProx, eq. 2)."""

    mu: float = 0.01

    def penalty(self, nets: Nets, given: Given) -> Tensor | float:
        return self.mu / 2 * squared_distance(nets[self.slot].parameters, given["anchor"])


@dataclass(frozen=True)
class Digest(Objective):
    """Follow the column `teacher` (logits): KL · T², or mean absolute error of logits as FedMD's authors have it."""

    kind: Kind = "multiclass"
    temperature: float = 1.0
    distance: Literal["kl", "mae"] = "kl"
    slot: str = "model"

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        logits = nets[self.slot](batch.x).logits
        if self.distance == "mae":
            return (logits - batch.teacher.detach()).abs().mean(-1)
        return divergence(self.kind, logits, batch.teacher, self.temperature)


@dataclass(frozen=True)
class Rehearsal(Supervised):
    """The task plus λ·KL·T² towards a teacher on public rows beside the batch (columns `public_x`, `public_teacher`).

    What a client learns from its own rows does not cost it what it knows of the others' classes.
    """

    weight: float = 1.0
    temperature: float = 1.0

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        return self.private(nets, batch, given) + self.public(nets, batch, given)

    def private(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        return self.of(nets[self.slot](batch.x), batch, given)

    def public(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        logits = nets[self.slot](batch.public_x).logits
        return self.weight * divergence(self.kind, logits, batch.public_teacher, self.temperature).mean()


@dataclass(frozen=True)
class ClassDigest(Supervised):
    """The task plus λ·KL·T² towards given `teacher` `[C, C]`, the consensus logits of the example's class (Jeong et al. 2018).

    given `known` `[C]` is 1 where the class has a teacher, else 0.
    """

    weight: float = 1.0
    temperature: float = 1.0

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        outputs = nets[self.slot](batch.x)
        towards = divergence(self.kind, outputs.logits, given["teacher"][batch.y], self.temperature)
        return self.of(outputs, batch, given) + self.weight * towards * given["known"][batch.y]


@dataclass(frozen=True)
class PrototypePull(Supervised):
    """The task plus λ·MSE(features, prototype of the example's class), the mean over the width (Tan et al. 2022, FedProto).

    given `prototypes` `[C, width]`, and `known` `[C]`, which is 1 where the class has one, else 0.
    """

    weight: float = 1.0

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        outputs = nets[self.slot](batch.x)
        apart = (outputs.features - given["prototypes"][batch.y]).square().mean(-1)
        return self.of(outputs, batch, given) + self.weight * apart * given["known"][batch.y]


def log_prior(task: Task, counts: Tensor) -> Tensor | None:
    """log π with π_c = (n_c + 1) / Σ(n + 1), `[C]`; None where the task has no classes that exclude one another."""
    if task.kind != "multiclass":
        return None
    smoothed = counts.to(torch.get_default_dtype()) + 1
    return (smoothed / smoothed.sum()).log()
