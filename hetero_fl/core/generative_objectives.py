"""Objectives for trainable prototypes and for generators of features or examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from hetero_fl.core.images import to_shape
from hetero_fl.core.objectives import (
    Batch,
    Context,
    ModelViews,
    Objective,
    Supervised,
    distillation_loss,
)
from model_zoo import SplitModel

Number = float | tuple[float, ...] | None
# Shape of a model's inputs, and the mean and standard deviation with which inputs are normalized.
View = tuple[tuple[int, ...], Number, Number]

# Lower bound of squared distances: the square root has no gradient at 0.
MIN_SQUARED_DISTANCE = 1e-12


@dataclass(frozen=True)
class AdaptiveMargin(Objective):
    """The contrastive loss with adaptive margin of FedTGP (Zhang et al. 2024).

    The loss of a client's prototype x of class y is -log softmax_y(-(‖x - P̂_c‖ + δ·[c = y])). The
    global prototypes are P̂ = F(P̆), where P̆ are the vectors to which the model in the slot
    `vectors` maps one-hot classes, and F is the network in the slot `slot`. The context contains
    the identity matrix `one_hot`, shape `[C, C]`, and the scalar δ as `margin`.

    Args:
        slot: Slot of the network F.
        vectors: Slot of the vectors P̆.
    """

    slot: str = "prototypes"
    vectors: str = "vectors"

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        prototypes = nets[self.slot](nets[self.vectors](context["one_hot"]))
        squares = (batch.x[:, None] - prototypes[None]).square().sum(-1)
        distances = (
            squares.clamp(min=MIN_SQUARED_DISTANCE).sqrt()
            + context["margin"] * context["one_hot"][batch.y]
        )
        return F.cross_entropy(-distances, batch.y, reduction="none")


@dataclass(frozen=True)
class GeneratorObjective(Objective):
    """The loss of the feature generator of FedGen (Zhu et al. 2021), as in the authors' code.

    With z = G(y, ε), the loss is Σ_k a_k(y)·CE(head_k(z), y) + η·exp(-mean_ij(mean|z_i - z_j| ·
    mean(ε_i - ε_j)²)). The second term rewards features that differ where the noise differs.

    A batch has the columns `x` `[B, C + noise]`, a one-hot class followed by noise, and `y` `[B]`,
    the class. In the context, `heads` contains the `weight` `[K, C, d]` and `bias` `[K, C]` of the
    heads of K clients, and `client_weights` `[K, C]` contains the weights a_k of the clients per
    class.

    Args:
        diversity: Weight η of the second term.
        slot: Slot of the generator G.
    """

    diversity: float = 1.0
    slot: str = "generator"

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        z = nets[self.slot](batch.x)
        heads = context["heads"]
        logits = torch.einsum("kcd,bd->kbc", heads["weight"], z) + heads["bias"][:, None]
        examples = torch.arange(len(z), device=z.device)
        # Cross-entropy by head and example, [K, B].
        losses = -logits.log_softmax(-1)[:, examples, batch.y]
        noise = batch.x[:, heads["bias"].shape[-1] :]
        feature_distances = (z[:, None] - z[None]).abs().mean(-1)
        noise_distances = (noise[:, None] - noise[None]).square().mean(-1)
        similarity = torch.exp(-(feature_distances * noise_distances).mean())
        return (context["client_weights"][:, batch.y] * losses).sum(0) + self.diversity * similarity


@dataclass(frozen=True)
class GeneratedFeatures(Supervised):
    """The local loss of FedGen (Zhu et al. 2021).

    The loss is the supervised loss plus α·CE(head(G(ŷ, ε)), ŷ) for sampled classes ŷ and, as in the
    authors' code, β·KL(head(G(y, ε)) ‖ model(x)) for the classes y of the batch. The columns
    `fake_x` and `fake_y` have the shapes and meaning of `x` and `y` in `GeneratorObjective`. If β
    is not 0, the batch also needs a column `noise_x` with at least B rows, and the context needs
    the identity matrix `one_hot`, shape `[C, C]`.

    Args:
        weight: Weight α.
        latent_weight: Weight β.
        generator: Slot of the generator G.
    """

    weight: float = 1.0
    latent_weight: float = 0.0
    generator: str = "generator"

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        return self.private_loss(nets, batch, context) + self.public_loss(nets, batch, context)

    @override
    def public_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        features = nets[self.generator](batch.fake_x)
        logits = nets[self.slot].forward_head(features)
        return self.weight * F.cross_entropy(logits, batch.fake_y)

    @override
    def private_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        net = nets[self.slot]
        generator = nets[self.generator]
        logits = net(batch.x)
        loss = self.loss_of_logits(logits, batch, context)
        if self.latent_weight:
            noise = batch.noise_x[: len(batch.y)]
            generated = generator(torch.cat([context["one_hot"][batch.y], noise], 1))
            loss = loss + self.latent_weight * distillation_loss(
                self.kind, logits, net.forward_head(generated)
            )
        return loss


class Generator(SplitModel):
    """A generator that maps noise `[B, z]` to flattened examples, returned as logits.

    Images with values in [0, 1] are generated at a quarter of their height and width and upsampled
    twice. Other examples are generated by a perceptron. The network has GroupNorm instead of
    BatchNorm, so that training and evaluation mode are equivalent.

    Args:
        num_classes: Number of values in an example.
        in_channels: Width z of the noise.
        shape: Shape of an example, `(channels, *size)`.
        width: Number of hidden channels.
    """

    def __init__(
        self, num_classes: int, in_channels: int, shape: Sequence[int], width: int = 64
    ) -> None:
        channels, *size = shape
        if len(size) == 2:
            small = [-(-s // 4) for s in size]
            head: nn.Module = nn.Sequential(
                nn.Unflatten(1, (width, *small)),
                *_upsampling_block(width, width, [-(-s // 2) for s in size]),
                *_upsampling_block(width, width // 2, size),
                nn.Conv2d(width // 2, channels, 3, padding=1),
                nn.Sigmoid(),
                nn.Flatten(),
            )
            inner = width * small[0] * small[1]
        else:
            head = nn.Linear(4 * width, num_classes)
            inner = 4 * width
        super().__init__(
            nn.Sequential(nn.Linear(in_channels, inner), nn.LeakyReLU(0.2)), head, inner
        )


def _upsampling_block(in_channels: int, out_channels: int, size: Sequence[int]) -> list[nn.Module]:
    return [
        nn.Upsample(size=tuple(size), mode="nearest"),
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.GroupNorm(8, out_channels),
        nn.LeakyReLU(0.2),
    ]


def preprocess_generated(x: Tensor, view: View) -> Tensor:
    """Convert generated examples `[B, *shape]` to the shape of a model's inputs and normalize them.

    Examples are not normalized if the mean or the standard deviation of the inputs is None.
    """
    shape, mean, std = view
    x = to_shape(x, shape)
    return x if mean is None or std is None else (x - x.new_tensor(mean)) / x.new_tensor(std)


class BatchStatistics(TorchFunctionMode):
    """A context manager that compares a batch with the running statistics of BatchNorm layers.

    The distance is the sum of ‖mean - running mean‖ + ‖variance - running variance‖ over the inputs
    of all BatchNorm layers that are called in the `with` block (DENSE, Zhang et al. 2022). Layers
    without running statistics are ignored.

    Attributes:
        distance: The distance so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.distance: Tensor | float = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            self._compare(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _compare(
        self, x: Tensor, mean: Tensor | None, variance: Tensor | None, *_args: Any, **_kwargs: Any
    ) -> None:
        # The layer tracks no statistics.
        if mean is None or variance is None:
            return
        dims = [d for d in range(x.ndim) if d != 1]
        batch_mean = x.mean(dims)
        batch_variance = x.var(dims, unbiased=False)
        self.distance = (
            self.distance + (batch_mean - mean).norm() + (batch_variance - variance).norm()
        )


@dataclass(frozen=True)
class Synthesis(Objective):
    """The loss of the example generator of DENSE (Zhang et al. 2022).

    The loss is CE(z̄, y) + λ₁·BN - λ₂·ω·KL(z̄ ‖ z_student), where z̄ are the mean logits of the
    teachers, BN is the mean of `BatchStatistics` over the teachers, and ω is 1 if student and
    teachers predict different classes, otherwise 0. The columns of a batch are noise `x` and labels
    `y`. The generator is in the slot `generator`.

    Args:
        shape: Shape of a generated example, `(channels, *size)`.
        teachers: Slot of each teacher, and the shape, mean and standard deviation of the teacher's
            inputs.
        student: Slot of the student, and the shape, mean and standard deviation of the student's
            inputs.
        statistics_weight: Weight λ₁.
        adversarial_weight: Weight λ₂.
    """

    shape: tuple[int, ...]
    teachers: tuple[tuple[str, View], ...]
    student: tuple[str, View]
    statistics_weight: float = 1.0
    adversarial_weight: float = 0.5

    @override
    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        x = nets.generator(batch.x).unflatten(1, self.shape)
        teacher_logits = []
        distances = []
        for slot, view in self.teachers:
            with BatchStatistics() as statistics:
                teacher_logits.append(nets[slot](preprocess_generated(x, view)))
            distances.append(statistics.distance)
        mean = torch.stack(teacher_logits).mean(0)
        student = nets[self.student[0]](preprocess_generated(x, self.student[1]))
        differ = (mean.argmax(-1) != student.argmax(-1)).to(mean.dtype)
        log_p = mean.log_softmax(-1)
        kl = (log_p.exp() * (log_p - student.log_softmax(-1))).sum(-1)
        statistics_distance = sum(distances) / len(distances)
        return (
            F.cross_entropy(mean, batch.y, reduction="none")
            + self.statistics_weight * statistics_distance
            - self.adversarial_weight * differ * kl
        )
