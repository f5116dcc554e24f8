"""Steps computed one after the other on live modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.plan import ClassSums, Fit, Predict, Step
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
        if isinstance(step, Predict):
            return self._predict(participant, step)
        return self._class_sums(participant, step)

    @torch.no_grad()
    def _predict(self, participant: Participant, step: Predict) -> Tensor:
        module = self._module(participant, step)
        x = step.data.columns(participant)["x"]
        outputs = [getattr(module(b.to(self.templates.device)), step.readout) for b in x.split(step.batch_size)]
        return torch.cat(outputs).cpu()

    @torch.no_grad()
    def _class_sums(self, participant: Participant, step: ClassSums) -> tuple[Tensor, Tensor]:
        module = self._module(participant, step)
        columns = step.data.columns(participant)
        outputs = []
        for batch in columns["x"].split(step.batch_size):
            result = module(batch.to(self.templates.device))
            out = (
                F.log_softmax(result.logits, -1)
                if step.readout == "log_probabilities"
                else getattr(result, step.readout)
            )
            outputs.append((out if step.at_least is None else out.clamp(min=step.at_least)).cpu())
        values, y = torch.cat(outputs), columns["y"]
        classes = participant.task.outputs
        sums = torch.zeros(classes, values.shape[1], dtype=values.dtype).index_add_(0, y, values)
        return sums, torch.bincount(y, minlength=classes).to(values.dtype)

    def _module(self, participant: Participant, step: Predict | ClassSums) -> torch.nn.Module:
        sent = getattr(step, "tensors", None)
        arch = getattr(step, "arch", None) or participant.arch[step.slot]
        template = self.templates(arch, "" if sent is not None else step.slot)
        stored = participant.models[step.slot] if sent is None else sent
        return template.load({**_counters(template.tensors), **stored}).eval()


def _counters(tensors: Any) -> dict[str, Tensor]:
    return {
        n: t for n, t in tensors.items() if not t.is_floating_point()
    }  # they do not travel, and evaluation ignores them
