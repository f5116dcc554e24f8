"""The serial executor: a plan is carried out to its end, step by step, on live modules (memory: one client)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.plan import ClassSums, Fit, FitReport, Plan, Predict, Step
from hetero_fl.runtime.running import Running
from hetero_fl.runtime.templates import Templates
from hetero_fl.runtime.training import fit_on_live_modules
from hetero_fl.state import Participant

T = TypeVar("T")


class Performer(Protocol):
    """Whoever computes single steps."""

    def perform(self, participant: Participant, step: Step) -> Any:
        """The result of one step; it may change the participant's models."""
        ...


class Serial:
    """One step after the other, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.templates = Templates(device)

    def perform(self, participant: Participant, step: Step) -> Any:
        """Raises Diverged if a fit does."""
        if isinstance(step, Fit):
            return fit_on_live_modules(participant, step, self.templates)
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


def carry_out(
    plan: Plan[T], participant: Participant, performer: Performer, watch: Callable[[str], None] | None = None
) -> tuple[T, list[tuple[str, FitReport]]]:
    """Run a plan to its end. Returns what it returned, and the reports of its fits with their labels."""
    reports: list[tuple[str, FitReport]] = []
    running = Running(plan)

    def perform(step: Step) -> Any:
        if watch is not None and isinstance(step, Fit):
            watch(step.label)
        result = performer.perform(participant, step)
        if isinstance(result, FitReport) and isinstance(step, Fit):
            reports.append((step.label, result))
        return result

    answer: Any = None
    go_on: Callable[[Any], Step | list[Step]] = running.send
    while True:
        try:
            asked = go_on(answer)
        except StopIteration as stop:
            return stop.value, reports
        try:
            answer = [perform(s) for s in asked] if isinstance(asked, list) else perform(asked)
            go_on = running.send
        except Exception as error:  # raised where the step was yielded: the traceback shows which it was
            answer, go_on = error, running.throw


def training_loss(reports: list[tuple[str, FitReport]]) -> float | None:
    """The loss that a client reports: of its last fit on its own rows."""
    losses = [report.loss for label, report in reports if label == "train"]
    return losses[-1] if losses else None
