"""Number of floating-point operations of compute steps, counted without computing the steps."""

from __future__ import annotations

from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit, Recalibrate, SampledBatches, Step
from hetero_fl.engine.batches import step_count
from hetero_fl.engine.templates import (
    example_flops,
    forward_flops,
    has_batch_norm,
    step_model_spec,
)


def step_flops(participant: Participant, step: Step) -> int:
    """Count the floating-point operations of a step as examples times operations per example.

    Training a model on an example counts as three forward passes, because the backward pass takes
    about twice the operations of the forward pass. Models that an objective uses without training
    them, predictions and recalibrations count as one forward pass. The loss, the optimizer and
    aggregation are not counted.

    Args:
        participant: The participant that computes the step.
        step: The step.
    """
    if not isinstance(step, Fit):
        arch = step_model_spec(participant, step)
        if isinstance(step, Recalibrate) and not has_batch_norm(arch):
            return 0
        return len(step.data.columns(participant)["x"]) * forward_flops(arch)
    trained = sum(example_flops(participant.arch[slot]) for slot in step.train)
    frozen = sum(forward_flops(participant.arch[slot]) for slot in step.frozen)
    num_steps, num_examples = _fit_size(participant, step)
    extra = num_steps * sum(draws.size for draws in step.extra_batches.values())
    return num_examples * (trained + frozen) + extra * trained


def _fit_size(participant: Participant, fit: Fit) -> tuple[int, int]:
    """Return the number of steps and the total number of examples of a fit."""
    if isinstance(fit.data, SampledBatches):
        num_steps = step_count(fit.data.size, fit)
        return num_steps, num_steps * fit.data.size
    num_rows = len(next(iter(fit.data.columns(participant).values())))
    if num_rows == 0:
        # A dry run has no class means of the clients.
        return 0, 0
    num_steps = step_count(num_rows, fit)
    if fit.steps is None:
        return num_steps, fit.epochs * num_rows
    return num_steps, num_steps * min(fit.batch_size, num_rows)
