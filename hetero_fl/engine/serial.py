"""The backend that computes one step after the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import ClassSums, Fit, Predict, Rows, Step, TensorRows
from hetero_fl.engine.driver import DivergedError, Work
from hetero_fl.engine.prediction_cache import PredictionCache, prediction_key
from hetero_fl.engine.templates import OutputStep, Templates, step_model_spec, step_tensors
from hetero_fl.engine.training import run_fit
from model_zoo import Outputs


def select_output(step: OutputStep, outputs: Outputs) -> Tensor:
    """The output that the step asks for, `[B, …]`."""
    log = step.readout == "log_probabilities"
    found = F.log_softmax(outputs.logits, -1) if log else getattr(outputs, step.readout)
    least = getattr(step, "at_least", None)
    return found if least is None else found.clamp(min=least)


def class_sums(values: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum and count by class, `[C, …]` and `[C]`."""
    sums = torch.zeros(classes, values.shape[1], dtype=values.dtype).index_add_(0, y, values)
    return sums, torch.bincount(y, minlength=classes).to(values.dtype)


# Steps computed one after the other on live modules.


class SerialBackend:
    """One step after the other, on one device."""

    def __init__(self, device: torch.device, precision: str = "float32") -> None:
        self.templates = Templates(device, precision)
        self._cache = PredictionCache()

    def run(self, work: Work) -> list[Any]:
        """Return the results in order.

        Several outputs of one model on the same rows, one after the other, take one pass. Equal
        models are evaluated on public rows once; their predictions are one tensor.
        """
        results: list[Any] = []
        while len(results) < len(work):
            begin = len(results)
            participant, step = work[begin]
            if isinstance(step, Fit):
                try:
                    results.append(run_fit(participant, step, self.templates))
                except DivergedError as failure:
                    results.append(failure)
            elif (key := prediction_key(participant, step)) is not None:
                results.append(self.predict_public(key, participant, step))  # type: ignore[arg-type]
            else:
                end = begin + 1
                while end < len(work) and share_forward_pass(work[begin], work[end]):
                    end += 1
                results += self._output_results(work[begin:end])
        return results

    def predict_public(self, key: Any, participant: Participant, step: Predict) -> Tensor:
        """Return a prediction on public rows, remembered under `key`."""
        return self._cache.get(
            key, participant, step, lambda: self._outputs(participant, [step])[0]
        )

    def _output_results(self, work: Work) -> list[Any]:
        participant = work[0][0]
        steps: list[Predict | ClassSums] = [step for _, step in work]  # type: ignore[misc]  # no fits
        return [
            outputs
            if isinstance(step, Predict)
            else class_sums(outputs, step.data.columns(participant)["y"], participant.task.outputs)
            for step, outputs in zip(steps, self._outputs(participant, steps), strict=True)
        ]

    @torch.no_grad()
    def _outputs(self, participant: Participant, steps: list[Predict | ClassSums]) -> list[Tensor]:
        first = steps[0]
        own = getattr(first, "tensors", None) is None
        template = self.templates(step_model_spec(participant, first), first.slot if own else "")
        # Counters do not travel, and evaluation ignores them.
        counters = {n: t for n, t in template.tensors.items() if not t.is_floating_point()}
        module = template.load({**counters, **step_tensors(participant, first)})
        template.set_mode(training=False)
        found: list[list[Tensor]] = [[] for _ in steps]
        for batch in first.data.columns(participant)["x"].split(first.batch_size):
            out = module(batch.to(self.templates.device))
            for parts, step in zip(found, steps, strict=True):
                parts.append(select_output(step, out).cpu())
        return [torch.cat(parts) for parts in found]


def share_forward_pass(one: tuple[Participant, Step], other: tuple[Participant, Step]) -> bool:
    """Whether both steps want outputs of the same model on the very same rows."""
    (participant, a), (another, b) = one, other
    if participant is not another or isinstance(a, Fit) or isinstance(b, Fit):
        return False
    if (
        a.slot != b.slot
        or a.batch_size != b.batch_size
        or step_tensors(participant, a) is not step_tensors(another, b)
    ):
        return False
    if isinstance(a.data, Rows) and isinstance(b.data, Rows):
        return (a.data.name, a.data.preprocess) == (
            b.data.name,
            b.data.preprocess,
        ) and a.data.rows is b.data.rows
    return (
        isinstance(a.data, TensorRows)
        and isinstance(b.data, TensorRows)
        and a.data.tensors["x"] is b.data.tensors["x"]
    )
