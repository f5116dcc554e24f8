"""Steps computed one after the other on live modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetero_fl.plan import ClassSums, Fit, Predict, Step
from hetero_fl.runtime.outputs import architecture_of, class_sums, readout, tensors_of
from hetero_fl.runtime.plans import Diverged, Work
from hetero_fl.runtime.templates import Templates
from hetero_fl.runtime.training import fit_on_live_modules
from hetero_fl.state import Participant


class Serial:
    """One step after the other, on one device."""

    def __init__(self, device: torch.device, precision: str = "float32") -> None:
        self.templates = Templates(device, precision)

    def perform(self, work: Work) -> list[Any]:
        """The results in order."""
        return [self._perform(participant, step) for participant, step in work]

    def _perform(self, participant: Participant, step: Step) -> Any:
        if isinstance(step, Fit):
            try:
                return fit_on_live_modules(participant, step, self.templates)
            except Diverged as failure:
                return failure
        outputs = self._outputs(participant, step)
        if isinstance(step, Predict):
            return outputs
        return class_sums(outputs, step.data.columns(participant)["y"], participant.task.outputs)

    @torch.no_grad()
    def _outputs(self, participant: Participant, step: Predict | ClassSums) -> Tensor:
        own = getattr(step, "tensors", None) is None
        template = self.templates(architecture_of(participant, step), step.slot if own else "")
        # Counters do not travel, and evaluation ignores them.
        counters = {n: t for n, t in template.tensors.items() if not t.is_floating_point()}
        module = template.load({**counters, **tensors_of(participant, step)}).eval()
        batches = step.data.columns(participant)["x"].split(step.batch_size)
        return torch.cat([readout(step, module(batch.to(self.templates.device))).cpu() for batch in batches])
