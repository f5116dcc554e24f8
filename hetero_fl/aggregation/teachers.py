"""Consensus teachers: weighted and sharpened means of clients' predictions on the proxy set.

Contrast weights depend on a client's label counts, and entropy weights on the confidence of each
prediction. `align_to_labels` raises the logits of classes that the consensus predicts too rarely.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.core.objectives import MIN_PROBABILITY
from hetero_fl.core.payload import Item
from hetero_fl.core.task import Task

TeacherKind = Literal["mean", "samples", "contrast", "entropy"]
Sharpening = Literal["era", "power", "none"]
# Minimum log-probability, which limits the influence of a client on classes without examples.
MIN_LOG_PROBABILITY = -8.0
# Minimum contrast weight. If all clients have this weight for a class, the mean is unweighted.
MIN_CONTRAST_WEIGHT = 0.1
# Minimum distance of a label probability from 0 and 1, the resolution of float32.
LOGIT_EPSILON = 1e-6


def contrast_weights(counts: Tensor) -> Tensor:
    """Return the weight of a client for each class, `n_c * (1 - n_c / n) + 0.1`.

    The client has n examples, of which n_c belong to class c. The weight is large if the client has
    many examples of the class and many examples of other classes.

    Args:
        counts: Number of examples n_c of each class, shape `[C]`.

    Returns:
        Weights, shape `[C]`.
    """
    n = counts.to(torch.get_default_dtype())
    return n * (1 - n / n.sum().clamp(min=1)) + MIN_CONTRAST_WEIGHT


def proxy_predictions(
    task: Task, kind: TeacherKind, logits: Tensor, counts: Tensor | None, n: int
) -> Item:
    """Return an item with a client's predictions and their weight in the consensus.

    The values and weights depend on `kind`:

    - "mean": logits with weight 1.
    - "samples": logits with weight `n`.
    - "contrast": log-probabilities, at least -8, with `contrast_weights`. For multi-label tasks and
      regression, which have no exclusive classes, the same as "samples".
    - "entropy": logits with `certainty_weights`. For regression, the same as "mean".

    Args:
        task: The task.
        kind: Type of the weights (see above).
        logits: Logits, shape `[N, C]`.
        counts: Number of the client's examples of each class, shape `[C]`. If None, the classes are
            assumed to be balanced. Used only if `kind` is "contrast".
        n: Number of the client's examples.
    """
    if kind == "contrast" and task.kind == "multiclass":
        if counts is None:
            counts = logits.new_full((task.outputs,), n / task.outputs)
        log_p = F.log_softmax(logits, -1).clamp(min=MIN_LOG_PROBABILITY)
        return Item(log_p, contrast_weights(counts), "rows")
    if kind == "entropy" and task.kind != "regression":
        return Item(logits, certainty_weights(task, logits), "rows")
    return Item(logits, 1.0 if kind in ("mean", "entropy") else float(n), "rows")


def certainty_weights(task: Task, logits: Tensor) -> Tensor:
    """Return `exp(-H(p))` for the entropy H of each prediction.

    The weight is 1 for a certain prediction and 1 / C for a uniform distribution over C classes.

    Args:
        task: The task.
        logits: Logits, shape `[N, C]`.

    Returns:
        Weights, shape `[N, 1]`. In multi-label tasks, one weight per label, shape `[N, C]`.
    """
    if task.kind == "multilabel":
        pairs = torch.stack([logits, torch.zeros_like(logits)], -1)
        return _exp_negative_entropy(pairs)
    return _exp_negative_entropy(logits)[:, None]


def align_to_labels(teacher: Tensor, log_q: Tensor, strength: float, balanced: bool) -> Tensor:
    """Align the mean prediction of a teacher with the label frequencies.

    The bias `strength * (log q_c - log p_c)` is added to each class, where p is the mean prediction
    over all rows and q are the label frequencies. Without alignment, clients do not learn the
    classes that the teacher predicts too rarely, and the next teacher predicts these classes even
    more rarely. The function resembles distribution alignment (Berthelot et al., ICLR 2020, section
    3.1), which scales probabilities and has strength 1. The state p = q is also a fixed point of
    the EM algorithm of Saerens et al. (Neural Computation 2002).

    Args:
        teacher: Logits, shape `[N, C]`.
        log_q: Logarithms of the label frequencies, shape `[C]`.
        strength: Factor of the bias.
        balanced: Whether the logits do not include the class prior, as after training with logit
            adjustment. `log_q` is then added to the logits to compute p.

    Returns:
        Logits, shape `[N, C]`.
    """
    log_p = (teacher + log_q if balanced else teacher).log_softmax(-1)
    return teacher + strength * (log_q - (log_p.logsumexp(0) - math.log(len(log_p))))


def _exp_negative_entropy(logits: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, -1)
    return (log_p.exp() * log_p).sum(-1).exp()


def sharpen(task: Task, p: Tensor, method: Sharpening, strength: float) -> Tensor:
    """Return the logits of sharpened probabilities.

    The sharpened probabilities depend on `method`:

    - "era": softmax(p / T), entropy reduction aggregation (Itahara et al. 2020, DS-FL).
    - "power": p^β / Σ p^β (Azuma et al. 2025, SCARLET).
    - "none": p.

    In multi-label tasks, each label is treated as a distribution over two outcomes.

    Args:
        task: The task.
        p: Probabilities, shape `[N, C]`.
        method: "era", "power" or "none" (see above).
        strength: Temperature T of "era" or exponent β of "power". Not used by "none".

    Returns:
        Logits, shape `[N, C]`.
    """
    if method == "era":
        return (2 * p - 1 if task.kind == "multilabel" else p) / strength
    if task.kind == "multilabel":
        logits = p.logit(eps=LOGIT_EPSILON)
    else:
        logits = p.clamp(min=MIN_PROBABILITY).log()
    return strength * logits if method == "power" else logits
