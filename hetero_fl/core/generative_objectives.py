"""Objectives that train prototypes, feature generators and example generators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hetero_fl.core.objectives import (
    Batch,
    Context,
    ModelViews,
    Objective,
    Supervised,
    distillation_loss,
    to_shape,
)
from model_zoo import SplitModel

# Objectives in the space of features: prototypes that are trained, and generators of features.

# a squared distance: below it the root has no gradient to speak of, and at nought none at all
NEAREST = 1e-12


@dataclass(frozen=True)
class AdaptiveMargin(Objective):
    """−log softmax_y(−(‖x − P̂_c‖ + δ·[c = y])) of a client's prototype x of class y (Zhang et al. 2024, FedTGP).

    P̂ = F(P̆): the rows of the slot `vectors` (a linear map of one-hot classes) through the network of the slot `slot`.
    given `one_hot` `[C, C]`, the identity, and `margin`, the number δ.
    """

    slot: str = "prototypes"
    vectors: str = "vectors"

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        prototypes = nets[self.slot](nets[self.vectors](context["one_hot"]).logits).logits
        squares = (batch.x[:, None] - prototypes[None]).square().sum(-1)
        distances = (
            squares.clamp(min=NEAREST).sqrt() + context["margin"] * context["one_hot"][batch.y]
        )
        return F.cross_entropy(-distances, batch.y, reduction="none")


@dataclass(frozen=True)
class GeneratorObjective(Objective):
    """Σ_k a_k(y)·CE(head_k(G(y, ε)), y) + η·exp(−mean_ij(mean|z_i − z_j| · mean(ε_i − ε_j)²)), z = G(y, ε) (Zhu et al. 2021,
    FedGen, in the form of the authors' code: teachers weighted one by one, and features that differ where noise does).

    Columns `x` `[B, C + noise]`, one-hot class beside noise, and `y`. given `heads`, the teachers' `weight` `[K, C, d]` and
    `bias` `[K, C]`, and `say` `[K, C]`, the weight of each teacher's word on a class.
    """

    diversity: float = 1.0
    slot: str = "generator"

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        z = nets[self.slot](batch.x).logits
        heads = context["heads"]
        logits = torch.einsum("kcd,bd->kbc", heads["weight"], z) + heads["bias"][:, None]
        wrong = -logits.log_softmax(-1)[:, torch.arange(len(z), device=z.device), batch.y]  # [K, B]
        noise = batch.x[:, heads["bias"].shape[-1] :]
        far = (z[:, None] - z[None]).abs().mean(-1) * (noise[:, None] - noise[None]).square().mean(
            -1
        )
        return (context["say"][:, batch.y] * wrong).sum(0) + self.diversity * torch.exp(-far.mean())


@dataclass(frozen=True)
class GeneratedFeatures(Supervised):
    """The task plus α·CE(head(G(ŷ, ε)), ŷ) on drawn classes ŷ (Zhu et al. 2021, FedGen), and, as the authors' code adds,
    β·KL(head(G(y, ε)) ‖ model(x)) on the batch's own.

    Columns `fake_x` and `fake_y` as `GeneratorObjective` has them; with β `noise_x` `[at least B, noise]` too, and given `one_hot`.
    """

    weight: float = 1.0
    latent_weight: float = 0.0
    generator: str = "generator"

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        return self.private_loss(nets, batch, context) + self.public_loss(nets, batch, context)

    def public_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        features = nets[self.generator](batch.fake_x).logits
        return self.weight * F.cross_entropy(nets[self.slot].head(features), batch.fake_y)

    def private_loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        net = nets[self.slot]
        generator = nets[self.generator]
        outputs = net(batch.x)
        loss = self.loss_of_outputs(outputs, batch, context)
        if self.latent_weight:
            noise = batch.noise_x[: len(batch.y)]
            alike = generator(torch.cat([context["one_hot"][batch.y], noise], 1)).logits
            loss = loss + self.latent_weight * distillation_loss(
                self.kind, outputs.logits, net.head(alike)
            )
        return loss


# Examples made from models alone: a generator, and the objective that DENSE trains it with.

Number = float | tuple[float, ...] | None
# the shape in which a model takes examples, their mean and std (or none)
View = tuple[tuple[int, ...], Number, Number]


class Generator(SplitModel):
    """Noise `[B, z]` to flattened examples. Images: a quarter of the size, twice doubled, values in 0…1; else a perceptron.

    GroupNorm and no BatchNorm, so that what is used is what was trained.

    Args:
        num_classes: numbers in an example.
        in_channels: z, width of the noise.
        shape: of an example, (channels, *size).
        width: channels inside.
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


def _upsampling_block(before: int, after: int, size: Sequence[int]) -> list[nn.Module]:
    up = nn.Upsample(size=tuple(size), mode="nearest")
    return [up, nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]


def preprocess_generated(x: Tensor, view: View) -> Tensor:
    """Generated examples `[B, *shape]` as a model with this view takes them."""
    shape, mean, std = view
    x = to_shape(x, shape)
    return x if mean is None or std is None else (x - x.new_tensor(mean)) / x.new_tensor(std)


class BatchStatistics(TorchFunctionMode):
    """While active, sums over BatchNorm layers how far a batch is from what the layer has seen in training:
    ‖mean − running mean‖ + ‖variance − running variance‖ of its input (Zhang et al. 2022, DENSE)."""

    def __init__(self) -> None:
        super().__init__()
        self.distance: Tensor | float = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            self._compare(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _compare(
        self, input: Tensor, mean: Tensor | None, variance: Tensor | None, *rest: Any, **named: Any
    ) -> None:
        if mean is None or variance is None:  # a layer that keeps none
            return
        over = [d for d in range(input.ndim) if d != 1]
        ours = input.mean(over), input.var(over, unbiased=False)
        self.distance = self.distance + (ours[0] - mean).norm() + (ours[1] - variance).norm()


@dataclass(frozen=True)
class Synthesis(Objective):
    """CE(z̄, y) + λ₁·BN − λ₂·ω·KL(z̄ ‖ z_student), z̄ the mean logits of the teachers (Zhang et al. 2022, DENSE).

    BN is the teachers' mean of `BatchStatistics`; ω is 1 where student and teachers name different classes, else 0. Columns:
    noise `x`, labels `y`. Slots: `generator`, the student's and the teachers', each with its view.
    """

    shape: tuple[int, ...]
    teachers: tuple[tuple[str, View], ...]
    student: tuple[str, View]
    statistics_weight: float = 1.0
    adversarial_weight: float = 0.5

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        x = nets.generator(batch.x).logits.unflatten(1, self.shape)
        said = []
        distances = []
        for slot, view in self.teachers:
            with BatchStatistics() as statistics:
                said.append(nets[slot](preprocess_generated(x, view)).logits)
            distances.append(statistics.distance)
        mean = torch.stack(said).mean(0)
        student = nets[self.student[0]](preprocess_generated(x, self.student[1])).logits
        differ = (mean.argmax(-1) != student.argmax(-1)).to(mean.dtype)
        log_p = mean.log_softmax(-1)
        kl = (log_p.exp() * (log_p - student.log_softmax(-1))).sum(-1)
        statistics_distance = sum(distances) / len(distances)
        return (
            F.cross_entropy(mean, batch.y, reduction="none")
            + self.statistics_weight * statistics_distance
            - self.adversarial_weight * differ * kl
        )
