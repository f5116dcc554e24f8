"""Local training with a client's own settings: steps, options that any method can take, predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hetero_fl.config.clients import AugmentConfig, ClientSettings
from hetero_fl.core.objectives import Objective, Supervised, log_prior
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit, Rows
from hetero_fl.core.task import Task
from hetero_fl.utils.registry import import_reference


def local_fit(
    client: Participant,
    objective: Objective | None = None,
    data: Rows | None = None,
    *,
    context: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Fit:
    """Create the step that trains a client's model with the client's own settings.

    The supervised loss reads the client's label frequencies if its settings have
    `logit_adjustment`, and its `class_weights`.

    Args:
        client: The client.
        objective: What is minimized; None: the client's `objective`, else the supervised loss.
        data: The rows; None: the client's training rows.
        context: Tensors that the objective reads in addition to the batch.
        **changes: Other fields of `Fit`, such as `train`, `epochs` or `label`.

    Returns:
        The step, to be yielded.
    """
    settings = client.settings
    objective = objective or load_objective(settings.objective, client.task)
    data = data or Rows()
    fields: dict[str, Any] = {
        "train": {"model": None},
        "batch_size": settings.batch_size,
        "optimizer": client.optimizer,
    }
    if "epochs" not in changes:
        fields |= {"epochs": settings.epochs, "steps": settings.steps}
    if data.name == "train":
        fields["augment"] = augmentation(settings)
    # The counts are read only where they are used: with private rows, reading them is accounted.
    extra = {}
    is_weighted = bool(settings.logit_adjustment) or settings.class_weights is not None
    if is_weighted and client.task.kind == "multiclass" and isinstance(objective, Supervised):
        extra = objective_context(client.task, client.counts, settings)
    return Fit(
        objective=objective,
        data=data,
        context={**extra, **(context or {})},
        **{**fields, **changes},
    )


def load_objective(reference: str | None, task: Task) -> Objective:
    """Return the supervised loss, or the objective that `python:package.module:Name` names.

    Raises:
        UserError: If there is no such class.
    """
    if reference is None:
        return Supervised(task.kind)
    objective: Objective = import_reference(reference, "objective", Objective)(task.kind)
    return objective


def objective_context(task: Task, counts: Tensor, settings: ClientSettings) -> dict[str, Tensor]:
    """Return what the supervised loss reads in addition to the batch.

    Args:
        task: The task.
        counts: Label counts of the rows that are trained on, shape `[C]`.
        settings: The client's settings: `logit_adjustment` and `class_weights`.
    """
    context = {}
    prior = log_prior(task, counts) if settings.logit_adjustment else None
    if prior is not None:
        context["log_prior"] = prior
    weights = settings.class_weights
    if weights is not None and task.kind == "multiclass":
        n = counts.to(torch.get_default_dtype())
        w = 1 / n.clamp(min=1) if weights == "balanced" else n.new_tensor(weights)
        # the mean over the training rows is one
        context["class_weights"] = w * n.sum() / (w * n).sum()
    return context


def augmentation(settings: ClientSettings) -> AugmentConfig | None:
    """Return the random changes of training images; None if there are none."""
    return None if settings.augment == AugmentConfig() else settings.augment


def add_log_prior(client: Participant, logits: Tensor) -> Tensor:
    """Add the log of the client's label frequencies if it trains with logit adjustment."""
    prior = log_prior(client.task, client.counts) if client.settings.logit_adjustment else None
    return logits if prior is None else logits + prior
