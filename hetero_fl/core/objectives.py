"""Objectives of training: one loss per example and a separate penalty on the parameters.

Supervised, proximal, distillation and mutual objectives, for live and for stacked models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.core.task import Task
from model_zoo import Outputs, SplitModel

# Models and batches as an objective sees them, whether the modules are live or stacked.

T = TypeVar("T")


class ModelView:
    """A model as an objective sees it: call it on inputs for `Outputs(logits, features)`.

    `parameters` are its trainable tensors by name; `forward` and `head` hide whether the module is live or stacked.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Outputs],
        head: Callable[[Tensor], Tensor],
        parameters: Mapping[str, Tensor],
    ) -> None:
        self._forward = forward
        self.head = head
        self.parameters = parameters

    @classmethod
    def from_module(cls, module: SplitModel) -> ModelView:
        """The module itself."""
        return cls(module, module.head, dict(module.named_parameters()))

    def __call__(self, x: Tensor) -> Outputs:
        return self._forward(x)


class AttributeDict(dict[str, T]):
    """A dictionary whose values can be read as attributes, too."""

    kind: ClassVar[str]
    hint: ClassVar[str]

    def __getattr__(self, name: str) -> T:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(*error.args) from None

    def __missing__(self, name: str) -> T:
        names = ", ".join(map(repr, self)) or "none"
        raise KeyError(f"no {self.kind} {name!r}, only {names}; {self.hint}")


class ModelViews(AttributeDict[ModelView]):
    """The models of a fit by slot; `nets.model` is `nets["model"]`."""

    kind = "model"
    hint = "name it in `train` or `frozen` of the fit"


class Batch(AttributeDict[Tensor]):
    """The columns of one step; `batch.x` is `batch["x"]`. `weight` `[B]` marks examples that are really there."""

    kind = "column"
    hint = "add it by `extra_columns` of the rows"
    weight: Tensor | None = None

    def mean(self, per_example: Tensor) -> Tensor:
        """Mean over the examples that are really there."""
        if self.weight is None:
            return per_example.mean()
        return (per_example * self.weight).sum() / self.weight.sum()


Context = Mapping[str, Any]


# What is optimized: one loss per example and, apart from it, a penalty on the parameters.
#
# Keeping the two apart gives exact weighting of ragged batches, per-example clipping (the penalty
# is never clipped), and batched training of many clients. Objectives are frozen dataclasses: equal
# ones may share a batch.

Kind = Literal["multiclass", "multilabel", "regression"]


class Objective:
    """One loss per example, and a penalty of the parameters alone."""

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        """`[B]`."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def penalty(self, nets: ModelViews, context: Context) -> Tensor | float:
        """A number; never clipped, masked or weighted."""
        return 0.0

    def private_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        """`[B]`, what of the loss reads the rows: it is clipped and noised where they are to stay private. All of it, unless an
        objective says what `public` is."""
        return self.loss(nets, batch, context)

    def public_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor | float:
        """A number, what of the loss reads only columns that were drawn beside the rows (`Fit.extra_batches`)."""
        return 0.0

    def total_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        """The number to minimise on this batch."""
        return batch.mean(self.loss(nets, batch, context)) + self.penalty(nets, context)


def supervised_loss(kind: Kind, logits: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
    """Cross-entropy, binary cross-entropy (mean over labels) or squared error (mean over targets), `[B]`."""
    if kind == "multiclass":
        return F.cross_entropy(logits, y, reduction=reduction)
    if kind == "multilabel":
        each = F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(-1)
    else:
        each = (logits - y).square().mean(-1)
    return each.mean() if reduction == "mean" else each


def distillation_loss(
    kind: Kind, student: Tensor, teacher: Tensor, temperature: float = 1.0
) -> Tensor:
    """Distance of a student's logits from a teacher's, `[B]`; the teacher is detached.

    Classes: KL(softmax(teacher/T) ‖ softmax(student/T)) · T² (Hinton et al. 2015), the sum over classes, so that its mean
    over examples is `batchmean`. Labels: the same for each label's Bernoulli, summed. Regression: squared error.
    """
    teacher = teacher.detach()
    if kind == "regression":
        return (student - teacher).square().mean(-1)
    t = teacher / temperature
    s = student / temperature
    if kind == "multilabel":
        p = t.sigmoid()
        gap = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (
            F.logsigmoid(-t) - F.logsigmoid(-s)
        )
    else:
        log_t = F.log_softmax(t, -1)
        # F.kl_div has no batching rule under vmap
        gap = log_t.exp() * (log_t - F.log_softmax(s, -1))
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

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        return self.loss_of_outputs(nets[self.slot](batch.x), batch, context)

    def loss_of_outputs(
        self, outputs: Outputs, batch: Batch, context: Context, reduction: str = "none"
    ) -> Tensor:
        """The loss of outputs that another objective has computed."""
        logits = outputs.logits + context["log_prior"] if "log_prior" in context else outputs.logits
        if "class_weights" in context:
            each = supervised_loss(self.kind, logits, batch.y) * context["class_weights"][batch.y]
            return each.mean() if reduction == "mean" else each
        return supervised_loss(self.kind, logits, batch.y, reduction)

    def total_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        if batch.weight is not None or type(self).loss is not Supervised.loss:
            return super().total_loss(nets, batch, context)
        # one fused kernel
        return self.loss_of_outputs(
            nets[self.slot](batch.x), batch, context, "mean"
        ) + self.penalty(nets, context)


@dataclass(frozen=True)
class Masked(Supervised):
    """The task with the logits of classes that are not there held at nought (Diao et al. 2021, HeteroFL, section 3).

    given `present` `[C]` is 1 where the client has the class, else 0.
    """

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        outputs = nets[self.slot](batch.x)
        return self.loss_of_outputs(
            outputs._replace(logits=outputs.logits * context["present"]), batch, context
        )


@dataclass(frozen=True)
class Proximal(Supervised):
    """The task plus (μ/2)·Σ‖θ − anchor‖² (Li et al. 2020, FedProx, eq. 2)."""

    mu: float = 0.01

    def penalty(self, nets: ModelViews, context: Context) -> Tensor | float:
        return self.mu / 2 * squared_distance(nets[self.slot].parameters, context["anchor"])


@dataclass(frozen=True)
class TeacherDistillation(Objective):
    """Follow the column `teacher` (logits): KL · T², or mean absolute error of logits as FedMD's authors have it."""

    kind: Kind = "multiclass"
    temperature: float = 1.0
    distance: Literal["kl", "mae"] = "kl"
    slot: str = "model"

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        logits = nets[self.slot](batch.x).logits
        if self.distance == "mae":
            return (logits - batch.teacher.detach()).abs().mean(-1)
        return distillation_loss(self.kind, logits, batch.teacher, self.temperature)


@dataclass(frozen=True)
class ProxyReplay(Supervised):
    """The task plus λ·KL·T² towards a teacher on public rows beside the batch (columns `public_x`, `public_teacher`).

    What a client learns from its own rows does not cost it what it knows of the others' classes.
    """

    weight: float = 1.0
    temperature: float = 1.0

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        return self.private_loss(nets, batch, context) + self.public_loss(nets, batch, context)

    def private_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        return self.loss_of_outputs(nets[self.slot](batch.x), batch, context)

    def public_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        logits = nets[self.slot](batch.public_x).logits
        return (
            self.weight
            * distillation_loss(self.kind, logits, batch.public_teacher, self.temperature).mean()
        )


@dataclass(frozen=True)
class ClassTeacherDistillation(Supervised):
    """The task plus λ·KL·T² towards given `teacher` `[C, C]`, the consensus logits of the example's class (Jeong et al. 2018).

    given `known` `[C]` is 1 where the class has a teacher, else 0.
    """

    weight: float = 1.0
    temperature: float = 1.0

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        outputs = nets[self.slot](batch.x)
        towards = distillation_loss(
            self.kind, outputs.logits, context["teacher"][batch.y], self.temperature
        )
        return (
            self.loss_of_outputs(outputs, batch, context)
            + self.weight * towards * context["known"][batch.y]
        )


@dataclass(frozen=True)
class PrototypePull(Supervised):
    """The task plus λ·MSE(features, prototype of the example's class), the mean over the width (Tan et al. 2022, FedProto).

    given `prototypes` `[C, width]`, and `known` `[C]`, which is 1 where the class has one, else 0.
    """

    weight: float = 1.0

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        outputs = nets[self.slot](batch.x)
        apart = (outputs.features - context["prototypes"][batch.y]).square().mean(-1)
        return (
            self.loss_of_outputs(outputs, batch, context)
            + self.weight * apart * context["known"][batch.y]
        )


def log_prior(task: Task, counts: Tensor) -> Tensor | None:
    """log π with π_c = (n_c + 1) / Σ(n + 1), `[C]`; None where the task has no classes that exclude one another."""
    if task.kind != "multiclass":
        return None
    smoothed = counts.to(torch.get_default_dtype()) + 1
    return (smoothed / smoothed.sum()).log()


# Objectives of methods that distil: the task with a teacher beside it, and the mixture weights of
# teachers.

TINY = 1e-12  # of a probability, before its logarithm


@dataclass(frozen=True)
class SupervisedDistillation(Supervised):
    """The task plus λ·KL·T² towards the column `teacher` (logits) of the same examples (He et al. 2020, FedGKT). A
    column `log_prior` is logit adjustment by example, for rows of several clients."""

    weight: float = 1.0
    temperature: float = 1.0

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        outputs = nets[self.slot](batch.x)
        towards = distillation_loss(self.kind, outputs.logits, batch.teacher, self.temperature)
        context = {**context, "log_prior": batch.log_prior} if "log_prior" in batch else context
        return self.loss_of_outputs(outputs, batch, context) + self.weight * towards


@dataclass(frozen=True)
class Coefficients(Objective):
    """KL(Σ_j c_kj p_j ‖ p_k)·T² + ρ‖c_k − 1/K‖², an example being a client k (Zhang et al. 2021, KT-pFL).

    The slot `mix` maps column `x`, one-hot `[B, K]`, to c_k; `own` is k; given `predictions` `[K, D, C]`, softened by T. The
    KL is the mean over the D public examples. Unlike in distillation the gradient goes through the mixture.
    """

    temperature: float = 1.0
    rho: float = 0.7

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        c = nets.mix(batch.x).logits
        p = context["predictions"]
        mixed = torch.einsum("bk,kdc->bdc", c, p).clamp(min=TINY)
        apart = (mixed * (mixed.log() - p[batch.own].clamp(min=TINY).log())).sum(-1).mean(-1)
        return self.temperature**2 * apart + self.rho * (c - 1 / c.shape[-1]).square().sum(-1)


# Objectives of two models that train together on the same rows and learn from one another.
#
# Each model minimises its own loss: what the other says is detached. The sum of both losses is
# therefore minimised in one step, and each model's gradient is that of its own.

SMALLEST = 1e-12  # a denominator: both models right and sure of it, to the last bit


def is_convertible(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether `to_shape` can turn examples of the one shape into the other: the same, or images of as many channels or one."""
    images = len(shape) == len(other) == 3
    return shape == other or (images and len({shape[0], other[0]} | {1}) <= 2)


def to_shape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
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
class MutualDistillation(Supervised):
    """α·task(p) + (1 − α)·KL(m ‖ p) for the model p, and β·task(m) + (1 − β)·KL(p ‖ m) for its mentee m (Shen et al. 2020,
    FML, eq. 6 and 7). The mentee sees examples in `shape`, (channels, *size)."""

    alpha: float = 0.5
    beta: float = 0.5
    mentee: str = "mentee"
    shape: tuple[int, ...] = ()

    def both_outputs(self, nets: ModelViews, batch: Batch) -> tuple[Outputs, Outputs]:
        """What the model and its mentee say."""
        return nets[self.slot](batch.x), nets[self.mentee](to_shape(batch.x, self.shape))

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        p, m = self.both_outputs(nets, batch)
        own = self.alpha * self.loss_of_outputs(p, batch, context) + (
            1 - self.alpha
        ) * distillation_loss(self.kind, p.logits, m.logits)
        shared = self.beta * self.loss_of_outputs(m, batch, context) + (
            1 - self.beta
        ) * distillation_loss(self.kind, m.logits, p.logits)
        return own + shared


@dataclass(frozen=True)
class AdaptiveMutual(MutualDistillation):
    """task(t) + task(s) + (KL(s ‖ t) + KL(t ‖ s) + λ·MSE(h_t, W·h_s)) / (task(t) + task(s)) for mentor t and mentee s
    (Wu et al. 2022, FedKD, eq. 1 to 6), h the features and W the matrix of the slot `hidden`.

    The denominator is the batch's mean and a weight, so no gradient goes through it: two models that are often wrong
    listen less to one another, but neither gets better at its distance by being wrong.
    """

    hidden_weight: float = 1.0
    hidden: str = "hidden"

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        t, s = self.both_outputs(nets, batch)
        mentor = self.loss_of_outputs(t, batch, context)
        mentee = self.loss_of_outputs(s, batch, context)
        apart = distillation_loss(self.kind, t.logits, s.logits) + distillation_loss(
            self.kind, s.logits, t.logits
        )
        hidden = (t.features - nets[self.hidden](s.features).logits).square().mean(-1)
        weight = (batch.mean(mentor) + batch.mean(mentee)).detach().clamp(min=SMALLEST)
        return mentor + mentee + (apart + self.hidden_weight * hidden) / weight


@dataclass(frozen=True)
class NestedRepresentations(MutualDistillation):
    """m_F·task(head_F(r)) + m_G·task(head_G(r[:d₁])), r = P·[g, f] of width d₂ (Yi et al. 2024, FedMRL); g are features of the
    mentee G (width d₁), f those of the own model F (width d₂), P is the linear map of the slot `projection`.

    `alpha` is m_F, `beta` m_G.
    """

    alpha: float = 1.0
    beta: float = 1.0
    projection: str = "projection"

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        f, g = (outputs.features for outputs in self.both_outputs(nets, batch))
        r = nets[self.projection](torch.cat([g, f], -1)).logits
        fine = nets[self.slot].head(r)
        coarse = nets[self.mentee].head(r[..., : g.shape[-1]])
        own = self.alpha * self.loss_of_outputs(Outputs(fine, r), batch, context)
        return own + self.beta * self.loss_of_outputs(Outputs(coarse, r), batch, context)
