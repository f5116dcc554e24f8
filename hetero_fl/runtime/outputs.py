"""What the two ways of computing outputs, live and stacked, have in common: which model, which output, what is summed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.architecture import Architecture
from hetero_fl.plan import ClassSums, Predict
from hetero_fl.state import Participant
from model_zoo import Outputs

Step = Predict | ClassSums


def architecture_of(participant: Participant, step: Step) -> Architecture:
    """What the step's model is."""
    return getattr(step, "arch", None) or participant.arch[step.slot]


def tensors_of(participant: Participant, step: Step) -> Mapping[str, Tensor]:
    """The step's model: one that somebody sent, or what is in the slot."""
    sent: Mapping[str, Tensor] | None = getattr(step, "tensors", None)
    return participant.models[step.slot] if sent is None else sent


def readout(step: Step, outputs: Outputs) -> Tensor:
    """The output that the step asks for, `[B, …]`."""
    log = step.readout == "log_probabilities"
    found = F.log_softmax(outputs.logits, -1) if log else getattr(outputs, step.readout)
    least = getattr(step, "at_least", None)
    return found if least is None else found.clamp(min=least)


def class_sums(values: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum and count by class, `[C, …]` and `[C]`."""
    sums = torch.zeros(classes, values.shape[1], dtype=values.dtype).index_add_(0, y, values)
    return sums, torch.bincount(y, minlength=classes).to(values.dtype)
