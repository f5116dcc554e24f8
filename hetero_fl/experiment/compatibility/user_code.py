"""Checks of user-defined losses, optimizers, metrics and transforms before a run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hetero_fl.algorithms.local_training import load_objective
from hetero_fl.core.image_transforms import apply_transform
from hetero_fl.core.metrics import apply_metric, metric_names
from hetero_fl.core.objectives import Batch, LossFunction
from hetero_fl.core.task import Task
from hetero_fl.engine.training import make_optimizer
from hetero_fl.federation.federation import FederationSpec, load_metric
from hetero_fl.utils.errors import UserError, one_line
from model_zoo import Outputs

TRIAL_ROWS = 4
"""Number of examples with which user-defined functions are called."""


def check_user_code(federation: FederationSpec) -> None:
    """Check user-defined functions by calling each function with a few examples.

    Losses, optimizers and transforms are checked for each set of clients with equal settings.

    Args:
        federation: The federation.

    Raises:
        UserError: If a function does not exist, raises an exception, or returns an invalid value,
            or if a metric has the name of a built-in metric.
    """
    for profile in federation.client_infos.profiles:
        settings = profile.settings
        where = f"clients: '{profile.first}': "
        try:
            _check_objective(settings.objective, federation.task)
            if settings.optimizer.is_custom:
                weight = torch.zeros(1, requires_grad=True)
                make_optimizer(settings.optimizer, {"model:weight": weight})
            inputs = torch.zeros(TRIAL_ROWS, *profile.arch.input_shape)
            if settings.preprocess.transform is not None:
                apply_transform(settings.preprocess.transform, inputs, "preprocess.transform")
            if settings.augment.transform is not None:
                apply_transform(settings.augment.transform, inputs, "augment.transform")
        except UserError as error:
            raise UserError(f"{where}{error}") from error
    _check_metrics(federation.metrics, federation.task)


def _check_objective(reference: str | None, task: Task) -> None:
    objective = load_objective(reference, task)
    if not isinstance(objective, LossFunction):
        return
    logits, y = _trial_outputs(task)
    try:
        objective.loss_of_outputs(Outputs(logits, logits), Batch(y=y), {})
    # A user's function may raise any exception.
    except Exception as error:
        raise UserError(f"objective: {one_line(error)}") from error


def _check_metrics(metrics: Mapping[str, str], task: Task) -> None:
    for name, reference in metrics.items():
        where = f"evaluation.metrics.{name}"
        if name in metric_names(task):
            raise UserError(f"{where}: built-in metric; choose another name")
        function = load_metric(name, reference)
        try:
            apply_metric(function, task, *_trial_outputs(task))
        # A user's function may raise any exception.
        except Exception as error:
            raise UserError(f"{where}: {one_line(error)}") from error


def _trial_outputs(task: Task) -> tuple[Tensor, Tensor]:
    """Return model outputs and targets for a few examples, with all classes of the task."""
    rows = max(TRIAL_ROWS, task.outputs) if task.kind == "multiclass" else TRIAL_ROWS
    logits = torch.zeros(rows, task.outputs)
    if task.kind == "multiclass":
        return logits, torch.arange(rows) % task.outputs
    return logits, (torch.arange(rows)[:, None] % 2).expand(rows, task.outputs).float()
