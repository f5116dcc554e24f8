"""Consensus teachers: what each client says of the public rows, with the weight that its word has.

Under label skew the plain mean of logits is ruled by whoever over-predicts its own majority. The contrast-weighted teacher
lets a client speak on a class as far as it has seen both the class and something else.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.payload import Item
from hetero_fl.task import Task

TeacherKind = Literal["mean", "samples", "contrast"]
CLIP = -8.0  # keeps one client's certainty about a class that it has never met from deciding
FLOOR = 0.1  # a class on which nobody has contrast falls back to the plain mean


def contrast(counts: Tensor) -> Tensor:
    """a_c = n_c·(1 − n_c/n), `[C]`: large where a client has seen the class and other classes too."""
    n = counts.to(torch.get_default_dtype())
    return n * (1 - n / n.sum().clamp(min=1)) + FLOOR


def opinion(task: Task, kind: TeacherKind, logits: Tensor, counts: Tensor | None, n: int) -> Item:
    """A client's predictions `[N, C]` as an item of the consensus.

    mean: logits, weight 1; samples: logits, weight n; contrast: max(log p, −8) with weight a_c by class (multi-label and
    regression have no exclusive classes: there contrast is `samples`). A client that does not release its label counts
    (None) speaks as if its n rows were spread evenly over the classes.
    """
    if kind == "contrast" and task.kind == "multiclass":
        counts = torch.full((task.outputs,), n / task.outputs) if counts is None else counts
        return Item(F.log_softmax(logits, -1).clamp(min=CLIP), contrast(counts), "rows")
    return Item(logits, 1.0 if kind == "mean" else float(n), "rows")
