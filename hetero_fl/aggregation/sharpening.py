"""Making a mean of probabilities more decided than it is."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from hetero_fl.task import Task

Sharpening = Literal["era", "power", "none"]
TINY = 1e-12  # of a probability, before its logarithm
CERTAIN = 1e-6  # how near to nought or one that of a label may be: nearer, float32 knows no difference


def sharpened(task: Task, p: Tensor, how: Sharpening, strength: float) -> Tensor:
    """Logits `[N, C]` of the sharpened probabilities.

    era: softmax(p / T), entropy reduction on probabilities (Itahara et al. 2020, DS-FL); power: p^β / Σ p^β (Azuma et al.
    2025, SCARLET); none: p. `strength` is T or β. A label of several is a distribution over yes and no.
    """
    if how == "era":
        return (2 * p - 1 if task.kind == "multilabel" else p) / strength
    logits = p.logit(eps=CERTAIN) if task.kind == "multilabel" else p.clamp(min=TINY).log()
    return strength * logits if how == "power" else logits
