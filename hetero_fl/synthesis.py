"""Examples made from models alone: a generator, and the objective that DENSE trains it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hetero_fl.mutual import as_shape
from hetero_fl.nets import Batch, Given, Nets
from hetero_fl.objectives import Objective
from model_zoo import SplitModel

Number = float | tuple[float, ...] | None
View = tuple[tuple[int, ...], Number, Number]  # the shape in which a model takes examples, their mean and std (or none)


class Generator(SplitModel):
    """Noise `[B, z]` to flattened examples. Images: a quarter of the size, twice doubled, values in 0…1; else a perceptron.

    GroupNorm and no BatchNorm, so that what is used is what was trained.

    Args:
        num_classes: numbers in an example.
        in_channels: z, width of the noise.
        shape: of an example, (channels, *size).
        width: channels inside.
    """

    def __init__(self, num_classes: int, in_channels: int, shape: Sequence[int], width: int = 64) -> None:
        channels, *size = shape
        if len(size) == 2:
            small = [-(-s // 4) for s in size]
            head: nn.Module = nn.Sequential(
                nn.Unflatten(1, (width, *small)),
                *_doubled(width, width, [-(-s // 2) for s in size]),
                *_doubled(width, width // 2, size),
                nn.Conv2d(width // 2, channels, 3, padding=1),
                nn.Sigmoid(),
                nn.Flatten(),
            )
            inner = width * small[0] * small[1]
        else:
            head, inner = nn.Linear(4 * width, num_classes), 4 * width
        super().__init__(nn.Sequential(nn.Linear(in_channels, inner), nn.LeakyReLU(0.2)), head, inner)


def _doubled(before: int, after: int, size: Sequence[int]) -> list[nn.Module]:
    up = nn.Upsample(size=tuple(size), mode="nearest")
    return [up, nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]


def seen(x: Tensor, view: View) -> Tensor:
    """Generated examples `[B, *shape]` as a model with this view takes them."""
    shape, mean, std = view
    x = as_shape(x, shape)
    return x if mean is None or std is None else (x - x.new_tensor(mean)) / x.new_tensor(std)


class BatchStatistics(TorchFunctionMode):
    """While active, sums over BatchNorm layers how far a batch is from what the layer has seen in training:
    ‖mean − running mean‖ + ‖variance − running variance‖ of its input (Zhang et al. 2022, DENSE)."""

    def __init__(self) -> None:
        super().__init__()
        self.apart: Tensor | float = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            self._compare(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _compare(self, input: Tensor, mean: Tensor | None, variance: Tensor | None, *rest: Any, **named: Any) -> None:
        if mean is None or variance is None:  # a layer that keeps none
            return
        over = [d for d in range(input.ndim) if d != 1]
        ours = input.mean(over), input.var(over, unbiased=False)
        self.apart = self.apart + (ours[0] - mean).norm() + (ours[1] - variance).norm()


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

    def loss(self, nets: Nets, batch: Batch, given: Given) -> Tensor:
        x = nets.generator(batch.x).logits.unflatten(1, self.shape)
        said, apart = [], []
        for slot, view in self.teachers:
            with BatchStatistics() as statistics:
                said.append(nets[slot](seen(x, view)).logits)
            apart.append(statistics.apart)
        mean = torch.stack(said).mean(0)
        student = nets[self.student[0]](seen(x, self.student[1])).logits
        differ = (mean.argmax(-1) != student.argmax(-1)).to(mean.dtype)
        log_p = mean.log_softmax(-1)
        kl = (log_p.exp() * (log_p - student.log_softmax(-1))).sum(-1)
        statistics_apart = sum(apart) / len(apart)
        return (
            F.cross_entropy(mean, batch.y, reduction="none")
            + self.statistics_weight * statistics_apart
            - self.adversarial_weight * differ * kl
        )
