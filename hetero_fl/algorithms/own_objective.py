"""The local objective of a client: the supervised loss with what it reads besides the batch, or a class of the user's own."""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_fl.config.clients import ClientSettings
from hetero_fl.objectives import Objective, Supervised, log_prior
from hetero_fl.registry import imported
from hetero_fl.task import Task


def own_objective(reference: str | None, task: Task) -> Objective:
    """The supervised loss, or what `python:package.module:Name` names, made with the kind of task.

    Raises UserError if there is no such class.
    """
    if reference is None:
        return Supervised(task.kind)
    made: Objective = imported(reference, "objective", Objective)(task.kind)
    return made


def local_given(task: Task, counts: Tensor, settings: ClientSettings, logit_adjustment: bool) -> dict[str, Tensor]:
    """What the supervised loss on rows with these label counts reads besides the batch."""
    prior = log_prior(task, counts) if logit_adjustment else None
    given = {} if prior is None else {"log_prior": prior}
    weights = settings.class_weights
    if weights is not None and task.kind == "multiclass":
        n = counts.to(torch.get_default_dtype())
        w = 1 / n.clamp(min=1) if weights == "balanced" else torch.tensor(weights, dtype=n.dtype)
        given["class_weights"] = w * n.sum() / (w * n).sum()  # the mean over the training rows is one
    return given
