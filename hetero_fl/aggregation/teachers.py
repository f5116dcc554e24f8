"""Consensus teachers from clients' predictions, averaged and sharpened."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.core.payload import Item
from hetero_fl.core.task import Task

# Consensus teachers: what each client says of the public rows, with the weight that its word has.
#
# Under label skew the plain mean of logits is ruled by whoever over-predicts its own majority. The
# contrast-weighted teacher lets a client speak on a class as far as it has seen both the class and
# something else; the entropy-weighted one lets it speak on an example as far as it is sure.
# Whatever the weights, a class that only weak models know can be lost in the consensus; `align_to_labels`
# brings it back.

TeacherKind = Literal["mean", "samples", "contrast", "entropy"]
CLIP = -8.0  # keeps one client's certainty about a class that it has never met from deciding
FLOOR = 0.1  # a class on which nobody has contrast falls back to the plain mean


def contrast_weights(counts: Tensor) -> Tensor:
    """a_c = n_c·(1 − n_c/n), `[C]`: large where a client has seen the class and other classes too."""
    n = counts.to(torch.get_default_dtype())
    return n * (1 - n / n.sum().clamp(min=1)) + FLOOR


def proxy_predictions(
    task: Task, kind: TeacherKind, logits: Tensor, counts: Tensor | None, n: int
) -> Item:
    """A client's predictions `[N, C]` as an item of the consensus.

    mean: logits, weight 1; samples: logits, weight n; contrast: max(log p, −8) with weight a_c by class (multi-label and
    regression have no exclusive classes: there contrast is `samples`); entropy: logits, with weight `certainty_weights` by row (by
    row and label where labels exclude nothing; regression has no entropy: there it is `mean`). A client that does not
    release its label counts (None) speaks as if its n rows were spread evenly over the classes.
    """
    if kind == "contrast" and task.kind == "multiclass":
        if counts is None:
            counts = logits.new_full((task.outputs,), n / task.outputs)
        return Item(F.log_softmax(logits, -1).clamp(min=CLIP), contrast_weights(counts), "rows")
    if kind == "entropy" and task.kind != "regression":
        return Item(logits, certainty_weights(task, logits), "rows")
    return Item(logits, 1.0 if kind in ("mean", "entropy") else float(n), "rows")


def certainty_weights(task: Task, logits: Tensor) -> Tensor:
    """exp(−H(p)) of each prediction, `[N, 1]`: 1 for certainty, 1/C for an even guess (C labels apart: `[N, C]`, of each
    label's Bernoulli). One over the number of classes that the prediction still wavers between."""
    if task.kind == "multilabel":
        pairs = torch.stack([logits, torch.zeros_like(logits)], -1)
        return _exp_negative_entropy(pairs)
    return _exp_negative_entropy(logits)[:, None]


def align_to_labels(teacher: Tensor, log_q: Tensor, strength: float, balanced: bool) -> Tensor:
    """The teacher `[N, C]` with b_c = strength·(log q_c − log p̄_c) added to each class: p̄, its mean prediction over all rows,
    moves towards the label frequencies q (`log_q`: `[C]`). `balanced`: the teacher has no prior in it, as after logit-adjusted
    training, and is read with log q added; else it is read as it is.

    A class that is lost in the consensus is learned by nobody, whose next words then are worse still: the bias breaks that
    circle (distribution alignment: Berthelot et al., ICLR 2020, section 3.1, there of probabilities with strength 1; p̄ = q is
    where the EM of Saerens et al., Neural Computation 2002, stands still).
    """
    log_p = (teacher + log_q if balanced else teacher).log_softmax(-1)
    return teacher + strength * (log_q - (log_p.logsumexp(0) - math.log(len(log_p))))


def _exp_negative_entropy(logits: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, -1)
    return (log_p.exp() * log_p).sum(-1).exp()


# Making a mean of probabilities more decided than it is.

Sharpening = Literal["era", "power", "none"]
TINY = 1e-12  # of a probability, before its logarithm
# how near to nought or one that of a label may be: nearer, float32 knows no difference
CERTAIN = 1e-6


def sharpen(task: Task, p: Tensor, method: Sharpening, strength: float) -> Tensor:
    """Logits `[N, C]` of the sharpened probabilities.

    era: softmax(p / T), entropy reduction on probabilities (Itahara et al. 2020, DS-FL); power: p^β / Σ p^β (Azuma et al.
    2025, SCARLET); none: p. `strength` is T or β. A label of several is a distribution over yes and no.
    """
    if method == "era":
        return (2 * p - 1 if task.kind == "multilabel" else p) / strength
    logits = p.logit(eps=CERTAIN) if task.kind == "multilabel" else p.clamp(min=TINY).log()
    return strength * logits if method == "power" else logits
