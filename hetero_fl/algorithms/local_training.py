"""Local training of a client: the training step, the objective, and adjustments of logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hetero_fl.config.clients import AugmentConfig, ClientSettings
from hetero_fl.core.objectives import LossFunction, Objective, Supervised, log_prior
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit, Rows
from hetero_fl.core.task import Task
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.registry import import_reference


def local_fit(
    client: Participant,
    objective: Objective | None = None,
    data: Rows | None = None,
    *,
    context: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Fit:
    """Create the `Fit` step that trains a client's model with the client's own settings.

    The supervised loss applies the client's `objective`, `logit_adjustment` and `class_weights`.

    Args:
        client: The client.
        objective: Objective to minimize, in which the client's setting `objective` replaces the
            supervised loss. If None, this setting is minimized itself.
        data: Rows to train on. If None, the client's training rows are used.
        context: Tensors that the objective needs in addition to the batch.
        **changes: Values of other fields of `Fit`, such as `train`, `epochs` or `label`.

    Returns:
        The step, to be yielded by the method's plan.

    Example:
        >>> from hetero_fl.algorithms import local_fit
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.core.participant import Participant
        >>> from hetero_fl.core.task import Task
        >>> settings = ClientSettings(epochs=2, batch_size=16)
        >>> client = Participant("a", Task("multiclass", 2), {}, {}, None, settings, None)
        >>> step = local_fit(client)
        >>> step.epochs, step.batch_size, step.train
        (2, 16, {'model': None})
        >>> local_fit(client, train={"model": ("head.",)}, epochs=5).epochs
        5
    """
    settings = client.settings
    objective = load_objective(settings.objective, client.task, objective)
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
    # Read the label counts only if they are used, because reading them may spend privacy budget.
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


def load_objective(
    reference: str | None, task: Task, objective: Objective | None = None
) -> Objective:
    """Return the objective that a reference names, or an objective with the loss that it names.

    Args:
        reference: Reference to a loss function, an `Objective` or a subclass of `Objective`. If
            None, the supervised loss is not replaced.
        task: The learning task. Its kind is passed to the objective.
        objective: Objective of the method. If None, the supervised loss.

    Raises:
        UserError: If the reference cannot be imported or is not an objective, or is not a loss
            function although the method has an objective.
    """
    own = Supervised(task.kind) if objective is None else objective
    if reference is None or not isinstance(own, Supervised):
        return own
    found = import_reference(reference, "objective", Objective, takes="logits, y")
    is_class = isinstance(found, type) and issubclass(found, Objective)
    if not is_class and not isinstance(found, Objective):
        return replace(own, function=LossFunction(found, task))
    if objective is not None:
        raise UserError(
            f"objective: the method combines the local loss with {type(own).__name__}, so it needs "
            f"a function of logits and targets, got the objective {reference}"
        )
    create: Callable[..., Objective] = found
    return create(task.kind) if is_class else found


def objective_context(task: Task, counts: Tensor, settings: ClientSettings) -> dict[str, Tensor]:
    """Return the tensors that the supervised loss needs in addition to the batch.

    Args:
        task: The task.
        counts: Label counts of the training rows, shape `[C]`.
        settings: Settings of the client, of which `logit_adjustment` and `class_weights` are used.

    Returns:
        A dictionary with the entries "log_prior" and "class_weights", each of shape `[C]`. Entries
        that the settings do not require are left out.
    """
    context = {}
    prior = log_prior(task, counts) if settings.logit_adjustment else None
    if prior is not None:
        context["log_prior"] = prior
    weights = settings.class_weights
    if weights is not None and task.kind == "multiclass":
        n = counts.to(torch.get_default_dtype())
        w = 1 / n.clamp(min=1) if weights == "balanced" else n.new_tensor(weights)
        # Scale the weights so that their mean over the training rows is one.
        context["class_weights"] = w * n.sum() / (w * n).sum()
    return context


def augmentation(settings: ClientSettings) -> AugmentConfig | None:
    """Return the augmentation of training images, or None if nothing is augmented."""
    return None if settings.augment == AugmentConfig() else settings.augment


def uses_local_prior(settings: ClientSettings) -> bool:
    """Return whether the log class prior is added to the logits of a client's own rows."""
    if settings.local_prior is None:
        return bool(settings.logit_adjustment)
    return settings.local_prior


def add_log_prior(client: Participant, logits: Tensor) -> Tensor:
    """Add the client's log class prior to logits, if the client's settings require it.

    The class prior consists of the relative label frequencies in the training rows, smoothed by
    adding 1 to each count. The logits are returned unchanged if the task is not multiclass.

    Example:
        >>> import torch
        >>> from hetero_fl.algorithms import add_log_prior
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.core.participant import Participant
        >>> from hetero_fl.core.task import Task
        >>> settings = ClientSettings(logit_adjustment=True)
        >>> counts = lambda: torch.tensor([2.0, 0.0])  # counts are smoothed by one
        >>> client = Participant("a", Task("multiclass", 2), {}, {}, None, settings, counts)
        >>> add_log_prior(client, torch.zeros(1, 2)).exp()
        tensor([[0.7500, 0.2500]])
    """
    prior = _log_prior_if(client, uses_local_prior(client.settings))
    return logits if prior is None else logits + prior


def subtract_log_prior(client: Participant, logits: Tensor) -> Tensor:
    """Subtract the client's log class prior from logits if `prior_correction` is set.

    The result approximates the logits of a model that was trained on balanced classes (Menon et al.
    2021, section 4.1). The correction suits models that the client has trained on its own rows. The
    logits are returned unchanged if the task is not multiclass.

    Args:
        client: The client.
        logits: Logits for rows of another label distribution, shape `[N, C]`.
    """
    prior = _log_prior_if(client, bool(client.settings.prior_correction))
    return logits if prior is None else logits - prior


def _log_prior_if(client: Participant, is_used: bool) -> Tensor | None:
    """Return the log class prior if it is used and the task is multiclass, otherwise None."""
    # Read the label counts only if they are used, because reading them may spend privacy budget.
    if not is_used or client.task.kind != "multiclass":
        return None
    return log_prior(client.task, client.counts)
