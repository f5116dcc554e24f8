"""Training objectives: a loss per example and a separate penalty on the parameters.

The separation allows exact weighting of padded batches, per-example gradient clipping (the penalty
is never clipped) and vectorized training of many clients. Objectives are frozen dataclasses, so
clients with equal objectives can be trained together. A slot is the name of a model in the training
step (`hetero_fl.core.plan.Fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from typing_extensions import override

from hetero_fl.core.task import Task
from model_zoo import SplitModel

Context = Mapping[str, Any]
Kind = Literal["multiclass", "multilabel", "regression"]
T = TypeVar("T")

# Lower bound of probabilities before a logarithm.
MIN_PROBABILITY = 1e-12
# Minimum number of examples with which a user's loss is examined.
TRIAL_EXAMPLES = 8
# Number of examples of a batch of which a loss may leave out a part.
TRIAL_BATCH = 64
# The fractional parts of multiples of an irrational number are spread evenly between 0 and 1.
GOLDEN_RATIO = (5**0.5 - 1) / 2


class ModelView:
    """A model as passed to objectives, a callable that returns logits.

    The model is an ordinary module, or one of several stacked models that are trained with `vmap`.
    `forward_head(forward_features(x))` has the value of `model(x)`. Losses that need features and
    logits call both functions, so that the features are computed once.

    Args:
        forward: Function that maps inputs to logits.
        forward_features: Function that maps inputs to features.
        forward_head: Function that maps features to logits.
        parameters: Trainable tensors, keyed by name.

    Attributes:
        forward_features: Function that maps inputs to features.
        forward_head: Function that maps features to logits.
        parameters: Trainable tensors, keyed by name.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        forward_features: Callable[[Tensor], Tensor],
        forward_head: Callable[[Tensor], Tensor],
        parameters: Mapping[str, Tensor],
    ) -> None:
        self._forward = forward
        self.forward_features = forward_features
        self.forward_head = forward_head
        self.parameters = parameters

    @classmethod
    def from_module(cls, module: SplitModel) -> ModelView:
        """Return the view of an ordinary module."""
        parameters = dict(module.named_parameters())
        return cls(module, module.forward_features, module.forward_head, parameters)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        return self._forward(x)


class AttributeDict(dict[str, T]):
    """A dictionary whose values can also be accessed as attributes."""

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
    """The models of a `Fit` step, keyed by slot. `nets.model` is `nets["model"]`."""

    kind = "model"
    hint = "name it in `train` or `frozen` of the fit"


class Batch(AttributeDict[Tensor]):
    """The columns of a batch, keyed by name. `batch.x` is `batch["x"]`.

    Attributes:
        weight: 1 for examples and 0 for padding, shape `[B]`, or None if there is no padding.
    """

    kind = "column"
    hint = "add it with `extra_columns` of the rows"
    weight: Tensor | None = None

    def mean(self, per_example: Tensor) -> Tensor:
        """Return the mean over all examples except padding.

        Raises:
            RuntimeError: If there is padding and no single value per example.
        """
        if self.weight is None:
            return per_example.mean()
        if per_example.shape != self.weight.shape:
            raise RuntimeError("the loss does not have one value per example")
        return (per_example * self.weight).sum() / self.weight.sum()


class Objective:
    """Base class of objectives: a loss per example and a penalty on the parameters.

    Subclasses are frozen dataclasses and implement `loss`. The arguments of all methods are:

    - `nets`: the models, keyed by slot,
    - `batch`: the columns of the batch, and
    - `context`: the tensors of `Fit.context`.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from hetero_fl.core.objectives import Batch, ModelView, ModelViews, Objective
        >>> from model_zoo import create_model
        >>> @dataclass(frozen=True)
        ... class MeanSquaredLogit(Objective):
        ...     def loss(self, nets, batch, context):
        ...         return nets.model(batch.x).square().mean(-1)
        >>> nets = ModelViews(model=ModelView.from_module(create_model("linear", 3, input_size=4)))
        >>> batch = Batch(x=torch.rand(5, 1, 4, 4))
        >>> MeanSquaredLogit().loss(nets, batch, {}).shape
        torch.Size([5])
    """

    @property
    def needs_whole_batches(self) -> bool:
        """Whether the loss of a batch is not the mean of the losses of its examples.

        In this case, `loss` returns values whose mean is the loss of the batch. Batches are not
        padded, and DP-SGD is not possible.
        """
        return False

    @property
    def is_user_defined(self) -> bool:
        """Whether the objective, or the loss function in it, is defined outside this package."""
        is_built_in = type(self).__module__.startswith("hetero_fl.")
        return not is_built_in or getattr(self, "function", None) is not None

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        """Return the loss of each example, shape `[B]`."""
        raise TypeError(f"{type(self).__name__} does not implement loss")

    def penalty(self, nets: ModelViews, context: Context) -> Tensor | float:
        """Return the penalty on the parameters, a scalar that is neither clipped nor weighted.

        By default, the penalty is 0.
        """
        return 0.0

    def private_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        """Return the part of the loss that depends on private rows, shape `[B]`.

        DP-SGD clips the gradients of this part and adds noise to them. By default, this is the
        whole loss.
        """
        return self.loss(nets, batch, context)

    def public_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor | float:
        """Return the part of the loss that depends on `Fit.extra_batches` only, a scalar.

        By default, this part is 0.
        """
        return 0.0

    def total_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        """Return the mean loss plus the penalty, the scalar that an optimizer step minimizes."""
        return batch.mean(self.loss(nets, batch, context)) + self.penalty(nets, context)


def supervised_loss(kind: Kind, logits: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
    """Compute the loss of a task.

    The loss is cross-entropy for multiclass tasks, binary cross-entropy (mean over labels) for
    multilabel tasks, and squared error (mean over outputs) for regression.

    Args:
        kind: Kind of the task.
        logits: Outputs, shape `[B, C]`.
        y: Targets, shape `[B]` (classes) or `[B, C]`.
        reduction: `none` or `mean`.

    Returns:
        Loss per example, shape `[B]`, or the mean over examples, a scalar.

    Example:
        >>> import torch
        >>> from hetero_fl.core.objectives import supervised_loss
        >>> supervised_loss("regression", torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
        tensor([1., 9.])
    """
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
    """Compute the distillation loss of a student with respect to a teacher.

    For multiclass tasks, the loss is `T**2 * KL(softmax(teacher / T) || softmax(student / T))`
    (Hinton et al. 2015, section 2), whose mean over examples equals the reduction `batchmean` of
    PyTorch. For multilabel tasks, the loss is the sum over labels of the same divergence between
    Bernoulli distributions. For regression, the loss is the mean squared error over outputs. The
    teacher is detached.

    Args:
        kind: Kind of the task.
        student: Outputs of the student, shape `[B, C]`.
        teacher: Outputs of the teacher, shape `[B, C]`.
        temperature: Temperature T, greater than 0.

    Returns:
        Loss per example, shape `[B]`.

    Example:
        >>> import torch
        >>> from hetero_fl.core.objectives import distillation_loss
        >>> distillation_loss("multiclass", torch.zeros(2, 3), torch.zeros(2, 3), temperature=2.0)
        tensor([0., 0.])
    """
    teacher = teacher.detach()
    if kind == "regression":
        return (student - teacher).square().mean(-1)
    t = teacher / temperature
    s = student / temperature
    if kind == "multilabel":
        p = t.sigmoid()
        divergence = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (
            F.logsigmoid(-t) - F.logsigmoid(-s)
        )
    else:
        log_t = F.log_softmax(t, -1)
        # F.kl_div has no batching rule under vmap.
        divergence = log_t.exp() * (log_t - F.log_softmax(s, -1))
    return divergence.sum(-1) * temperature**2


def squared_distance(parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of squared differences between parameters and the anchor's tensors.

    Args:
        parameters: Tensors, keyed by name.
        anchor: Tensors of the same shapes, with at least the same names.
    """
    return torch.stack([(p - anchor[n]).square().sum() for n, p in parameters.items()]).sum()


@dataclass(frozen=True)
class LossFunction:
    """A user's loss of logits and targets, with the meaning that it has in plain PyTorch.

    Args:
        function: Function of logits `[B, C]` and targets that returns the loss of the batch, a
            scalar, or the loss of each example, `[B]` or `[B, ...]`, whose mean is the loss of the
            batch. A loss of `torch.nn` keeps its `reduction`.
        task: The task, which determines the shapes of logits and targets.

    Example:
        >>> import torch
        >>> from hetero_fl.core.objectives import LossFunction
        >>> from hetero_fl.core.task import Task
        >>> weighted = LossFunction(
        ...     torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])), Task("multiclass", 2)
        ... )
        >>> weighted.total(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor(0.6931)
        >>> weighted.is_mean_of_examples
        False
    """

    function: Callable[[Tensor, Tensor], Tensor]
    task: Task

    def total(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar."""
        return self._call(logits, y).mean()

    def each(self, logits: Tensor, y: Tensor, separate: bool = False) -> Tensor:
        """Return one value per example, shape `[B]`, whose mean is the loss of the batch.

        Args:
            logits: Outputs, shape `[B, C]`.
            y: Targets.
            separate: Whether the values must be the losses of the examples, which requires
                `is_mean_of_examples`. Otherwise, they may be equal.
        """
        losses = self._call(logits, y)
        if losses.ndim:
            return losses.flatten(1).mean(1) if losses.ndim > 1 else losses
        if not separate:
            return losses.expand(len(logits))
        return vmap(lambda z, target: self._call(z[None], target[None]))(logits, y)

    def _call(self, logits: Tensor, y: Tensor) -> Tensor:
        if isinstance(self.function, nn.Module):
            # The weights of classes are tensors of the loss.
            self.function.to(logits.device)
        # A loss may change its arguments in place.
        losses = self.function(logits.clone(), y)
        if not isinstance(losses, Tensor):
            raise TypeError(f"the loss must be a tensor, got {type(losses).__name__}")
        if losses.ndim and len(losses) != len(logits):
            raise ValueError(
                "the loss must be a scalar or have one value per example, shape "
                f"{tuple(logits.shape[:1])}, got shape {tuple(losses.shape)}"
            )
        return losses

    @cached_property
    def is_mean_of_examples(self) -> bool:
        """Whether the loss of a batch is the mean of the losses of its examples.

        This does not hold for class weights with the reduction `mean`, whose denominator is the sum
        of the weights, for `ignore_index` of a class, and for the reduction `sum`. The result
        follows from the losses of pairs of examples, in which all classes occur, and of a batch.
        """
        classes = self.task.outputs if self.task.kind == "multiclass" else 0
        pairs = [[0, i] for i in range(1, max(classes, TRIAL_EXAMPLES))]
        batches = [*pairs, [*range(max(classes, TRIAL_BATCH))]]
        try:
            each = torch.stack([self.total(*self._examples([i])) for i in batches[-1]])
            return all(
                torch.allclose(self.total(*self._examples(batch)), each[batch].mean(), rtol=1e-4)
                for batch in batches
            )
        # A user's function may raise any exception.
        except Exception:
            return False

    @cached_property
    def needs_log_probabilities(self) -> bool:
        """Whether the loss is linear in the outputs, as `NLLLoss`, and has no minimum on logits."""
        z, y = self._examples(range(TRIAL_EXAMPLES))
        try:
            zero, one, two, opposite = (self.total(k * z, y) for k in (0, 100, 200, -100))
        # A user's function may raise any exception.
        except Exception:
            return False
        step = one - zero
        return bool(step) and torch.allclose(
            torch.stack([two - one, zero - opposite]), step, rtol=1e-3
        )

    def _examples(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return outputs between 0 and 1, and targets. The class of example i is i modulo C."""
        classes = torch.arange(1, self.task.outputs + 1)
        rows = torch.tensor(indices)
        position = (rows[:, None] + 1) * classes
        logits = (position * GOLDEN_RATIO).frac()
        if self.task.kind == "multiclass":
            return logits, rows % self.task.outputs
        targets = (position * 2**0.5).frac()
        return logits, targets.round() if self.task.kind == "multilabel" else targets


@dataclass(frozen=True)
class Supervised(Objective):
    """The supervised loss of the task.

    Two optional entries of the context modify the loss: `log_prior` `[C]` is added to the logits
    (logit adjustment, Menon et al. 2021, eq. 10), and `class_weights` `[C]` weights examples by
    class.

    Args:
        kind: Kind of the task.
        slot: Slot of the model.
        function: A user's loss in place of the supervised loss.

    Example:
        >>> import torch
        >>> from hetero_fl.core.objectives import Batch, ModelView, ModelViews, Supervised
        >>> from model_zoo import create_model
        >>> nets = ModelViews(model=ModelView.from_module(create_model("linear", 3, input_size=4)))
        >>> batch = Batch(x=torch.rand(5, 1, 4, 4), y=torch.tensor([0, 1, 2, 0, 1]))
        >>> Supervised("multiclass").loss(nets, batch, {}).shape
        torch.Size([5])
    """

    kind: Kind = "multiclass"
    slot: str = "model"
    function: LossFunction | None = field(default=None, kw_only=True)

    @property
    @override
    def needs_whole_batches(self) -> bool:
        return self.function is not None and not self.function.is_mean_of_examples

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        return self.loss_of_logits(nets[self.slot](batch.x), batch, context)

    def loss_of_logits(
        self, logits: Tensor, batch: Batch, context: Context, reduction: str = "none"
    ) -> Tensor:
        """Return the loss of logits that have already been computed.

        Args:
            logits: Outputs of the model, shape `[B, C]`.
            batch: The columns of the batch.
            context: The tensors of `Fit.context`.
            reduction: `none` or `mean`.
        """
        if "log_prior" in context:
            logits = logits + context["log_prior"]
        is_weighted = "class_weights" in context
        is_mean = reduction == "mean" and not is_weighted
        if self.function is None:
            losses = supervised_loss(self.kind, logits, batch.y, "mean" if is_mean else "none")
        elif is_mean:
            losses = self.function.total(logits, batch.y)
        else:
            is_padded = batch.weight is not None
            losses = self.function.each(logits, batch.y, separate=is_weighted or is_padded)
        if not is_weighted:
            return losses
        losses = losses * context["class_weights"][batch.y]
        return losses.mean() if reduction == "mean" else losses

    @override
    def total_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        if batch.weight is not None or type(self).loss is not Supervised.loss:
            return super().total_loss(nets, batch, context)
        # The mean over the batch is one fused kernel.
        logits = nets[self.slot](batch.x)
        return self.loss_of_logits(logits, batch, context, "mean") + self.penalty(nets, context)


@dataclass(frozen=True)
class Masked(Supervised):
    """The supervised loss with the logits of missing classes set to 0.

    This is the masked loss of HeteroFL (Diao et al. 2021, section 3). In the context, `present`
    `[C]` is 1 for classes that occur in the client's rows and 0 for all other classes.
    """

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        logits = nets[self.slot](batch.x) * context["present"]
        return self.loss_of_logits(logits, batch, context)


@dataclass(frozen=True)
class Proximal(Supervised):
    """The supervised loss plus (μ/2)·Σ‖θ - anchor‖² (FedProx, Li et al. 2020, eq. 2).

    In the context, `anchor` contains the tensors of the received model.

    Args:
        mu: Weight μ of the penalty.
    """

    mu: float = 0.01

    @override
    def penalty(self, nets: ModelViews, context: Context) -> Tensor | float:
        return self.mu / 2 * squared_distance(nets[self.slot].parameters, context["anchor"])


@dataclass(frozen=True)
class TeacherDistillation(Objective):
    """The distance of the model's logits from the teacher's logits, the column `teacher`.

    Args:
        kind: Kind of the task.
        temperature: Temperature of the distillation loss.
        distance: `kl` for the distillation loss, `mae` for the mean absolute error of logits as in
            the code of the FedMD authors.
        slot: Slot of the model.

    Example:
        >>> import torch
        >>> from hetero_fl.core.objectives import Batch, ModelView, ModelViews, TeacherDistillation
        >>> from model_zoo import create_model
        >>> nets = ModelViews(model=ModelView.from_module(create_model("linear", 3, input_size=4)))
        >>> batch = Batch(x=torch.rand(5, 1, 4, 4), teacher=torch.zeros(5, 3))
        >>> TeacherDistillation(temperature=2.0).loss(nets, batch, {}).shape
        torch.Size([5])
    """

    kind: Kind = "multiclass"
    temperature: float = 1.0
    distance: Literal["kl", "mae"] = "kl"
    slot: str = "model"

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        logits = nets[self.slot](batch.x)
        if self.distance == "mae":
            return (logits - batch.teacher.detach()).abs().mean(-1)
        return distillation_loss(self.kind, logits, batch.teacher, self.temperature)


@dataclass(frozen=True)
class ProxyReplay(Supervised):
    """The supervised loss plus a distillation loss on public rows.

    The distillation loss preserves what a client's model has learned about other clients' classes
    during training on private rows. The columns `public_x` and `public_teacher` contain the public
    examples and the logits of the teacher.

    Args:
        weight: Weight of the distillation loss.
        temperature: Temperature of the distillation loss.
    """

    weight: float = 1.0
    temperature: float = 1.0

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        return self.private_loss(nets, batch, context) + self.public_loss(nets, batch, context)

    @override
    def private_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        return self.loss_of_logits(nets[self.slot](batch.x), batch, context)

    @override
    def public_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        logits = nets[self.slot](batch.public_x)
        return (
            self.weight
            * distillation_loss(self.kind, logits, batch.public_teacher, self.temperature).mean()
        )


@dataclass(frozen=True)
class ClassTeacherDistillation(Supervised):
    """The supervised loss plus distillation from the consensus logits of the example's class.

    This is the regularizer of federated distillation (Jeong et al. 2018). In the context, row c of
    `teacher` `[C, C]` contains the logits of class c, and `known` `[C]` is 1 for classes with a
    teacher and 0 for others.

    Args:
        weight: Weight of the distillation loss.
        temperature: Temperature of the distillation loss.
    """

    weight: float = 1.0
    temperature: float = 1.0

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        logits = nets[self.slot](batch.x)
        distillation = distillation_loss(
            self.kind, logits, context["teacher"][batch.y], self.temperature
        )
        return (
            self.loss_of_logits(logits, batch, context)
            + self.weight * distillation * context["known"][batch.y]
        )


@dataclass(frozen=True)
class PrototypePull(Supervised):
    """The supervised loss plus the mean squared distance of the features from a class prototype.

    This is the loss of FedProto (Tan et al. 2022). In the context, `prototypes` has shape
    `[C, width]`, and `known` `[C]` is 1 for classes with a prototype and 0 for others.

    Args:
        weight: Weight of the distance.
    """

    weight: float = 1.0

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        net = nets[self.slot]
        features = net.forward_features(batch.x)
        logits = net.forward_head(features)
        distance = (features - context["prototypes"][batch.y]).square().mean(-1)
        return (
            self.loss_of_logits(logits, batch, context)
            + self.weight * distance * context["known"][batch.y]
        )


def log_prior(task: Task, counts: Tensor) -> Tensor | None:
    """Compute the logarithm of the smoothed class prior π_c = (n_c + 1) / Σ(n + 1).

    Args:
        task: The task.
        counts: Number of examples of each class, shape `[C]`.

    Returns:
        Tensor of shape `[C]`, or None if the task is not multiclass.

    Example:
        >>> import torch
        >>> from hetero_fl.core.objectives import log_prior
        >>> from hetero_fl.core.task import Task
        >>> log_prior(Task("multiclass", 2), torch.tensor([2, 0])).exp()
        tensor([0.7500, 0.2500])
    """
    if task.kind != "multiclass":
        return None
    smoothed = counts.to(torch.get_default_dtype()) + 1
    return (smoothed / smoothed.sum()).log()


@dataclass(frozen=True)
class SupervisedDistillation(Supervised):
    """The supervised loss plus distillation from the column `teacher` (FedGKT, He et al. 2020).

    If the batch has a column `log_prior` `[B, C]`, the values of this column are added to the
    logits. A batch can therefore contain rows of several clients with different class priors.

    Args:
        weight: Weight of the distillation loss.
        temperature: Temperature of the distillation loss.
    """

    weight: float = 1.0
    temperature: float = 1.0

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        logits = nets[self.slot](batch.x)
        distillation = distillation_loss(self.kind, logits, batch.teacher, self.temperature)
        context = {**context, "log_prior": batch.log_prior} if "log_prior" in batch else context
        return self.loss_of_logits(logits, batch, context) + self.weight * distillation


@dataclass(frozen=True)
class Coefficients(Objective):
    """The loss of the knowledge coefficients of KT-pFL (Zhang et al. 2021).

    The loss of client k is `T**2 * KL(Σ_j c_kj p_j || p_k) + ρ ‖c_k - 1/K‖²`, with the divergence
    averaged over D public examples. Each example of a batch represents one client. The column `x`
    `[B, K]` is the one-hot index of the client, and the column `own` `[B]` is the index k. The
    model in the slot `mix` maps the one-hot index to c_k. In the context, `predictions` `[K, D, C]`
    are the softened probabilities p. Unlike in distillation, the gradient passes through the
    mixture, the first argument of the divergence.

    Args:
        temperature: Temperature T.
        rho: Weight ρ of the regularizer.
    """

    temperature: float = 1.0
    rho: float = 0.7

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        c = nets.mix(batch.x)
        p = context["predictions"]
        mixed = torch.einsum("bk,kdc->bdc", c, p).clamp(min=MIN_PROBABILITY)
        own = p[batch.own].clamp(min=MIN_PROBABILITY)
        divergence = (mixed * (mixed.log() - own.log())).sum(-1).mean(-1)
        return self.temperature**2 * divergence + self.rho * (c - 1 / c.shape[-1]).square().sum(-1)
