"""The backend that computes one step after the other, and evaluates equal models once."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from cachetools import FIFOCache
from torch import Tensor

from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import ClassSums, Fit, FitReport, Predict, Rows, Step, TensorRows
from hetero_fl.data.federated_data import PUBLIC
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import DivergedError, Work
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
    if values.is_cuda:  # where `index_add_` and `bincount` add in any order
        numbers = torch.arange(classes, device=values.device)
        members = (y.to(values.device)[:, None] == numbers).to(values.dtype)
        return members.t() @ values, members.sum(0)
    sums = torch.zeros(classes, values.shape[1], dtype=values.dtype).index_add_(0, y, values)
    return sums, torch.bincount(y, minlength=classes).to(values.dtype)


# One evaluation of equal models: after FedAvg every client holds the same one, and the common test
# set is predicted once.
#
# Predictions on public rows are kept for each (architecture, rows, view) with the model that made
# them, and reused where the next model has equal tensors. A comparison costs at most one pass over
# the model and stops at the first difference. These predictions are computed one by one: whether a
# prediction is cached must not decide which others are computed together, because the batch changes
# the last bits. A model that was received is known by its slot too: every member of an ensemble is
# evaluated once.

CACHED_PREDICTIONS = 16  # each with its model
# Predictions of received models: the participant that evaluates them holds all of them anyway.
CACHED_RECEIVED = 128


class CachedOutputs:
    """Outputs of a model on some rows.

    The rows are not kept alive, and a tensor that was changed in place no longer matches.
    """

    def __init__(self, x: Tensor, tensors: Mapping[str, Tensor], outputs: Tensor) -> None:
        self._x = weakref.ref(x)
        self.outputs = outputs
        self._version = outputs._version
        self._tensors = {n: (t, t._version) for n, t in tensors.items() if t.is_floating_point()}

    def matches(self, x: Tensor, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether these rows and an equal model made the outputs.

        Integer buffers are not compared: evaluation does not read them.
        """
        if self._x() is not x or self.outputs._version != self._version:
            return False
        if any(t._version != version for t, version in self._tensors.values()):
            return False
        names = [n for n, t in tensors.items() if t.is_floating_point()]
        return all(
            n in self._tensors and _are_equal(self._tensors[n][0], tensors[n]) for n in names
        )


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Compare tensors; the same memory is not read."""
    return one.is_set_to(other) or torch.equal(one, other)


def prediction_key(participant: Participant, step: Step) -> Any:
    """Return what decides a prediction besides rows and tensors; None if it is not on public rows."""
    if not isinstance(step, Predict) or not isinstance(step.data, Rows):
        return None
    rows = step.data
    if rows.name not in PUBLIC or rows.rows is not None:
        return None
    shape = tuple(participant.data(rows.name, rows.preprocess)["x"].shape)
    sent = None if step.tensors is None else step.slot
    return (
        step_model_spec(participant, step),
        rows.name,
        shape,
        step.readout,
        step.batch_size,
        sent,
    )


# Steps computed one after the other on live modules.


class SerialBackend:
    """One step after the other, on one device."""

    def __init__(self, memory: DeviceMemory, precision: str = "float32") -> None:
        self.templates = Templates(memory, precision)
        self._predictions: FIFOCache[Any, CachedOutputs] = FIFOCache(CACHED_PREDICTIONS)
        self._received: FIFOCache[Any, CachedOutputs] = FIFOCache(CACHED_RECEIVED)

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
                    results.append(self._fit(participant, step))
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

    def _fit(self, participant: Participant, fit: Fit) -> FitReport:
        """Train; where copies of other tensors leave too little memory, again without them."""
        uses = dict(participant.stream_uses)
        try:
            return run_fit(participant, fit, self.templates)
        except torch.OutOfMemoryError:
            if not self.templates.memory.has_copies:
                raise
        self.templates.memory.give_up()
        participant.stream_uses.clear()
        participant.stream_uses.update(uses)
        return run_fit(participant, fit, self.templates)

    def predict_public(self, key: Any, participant: Participant, step: Predict) -> Tensor:
        """Return a prediction on public rows; several participants may get the same tensor.

        Args:
            key: What `prediction_key` returns for the step.
            participant: Whose model predicts.
            step: The prediction.
        """
        x = step.data.columns(participant)["x"]
        tensors = step_tensors(participant, step)
        cache = self._predictions if step.tensors is None else self._received
        cached = cache.get(key)
        if cached is None or not cached.matches(x, tensors):
            cached = CachedOutputs(x, tensors, self._outputs(participant, [step])[0])
            cache[key] = cached
        return cached.outputs

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
        rows = self.templates.memory.keep(first.data.columns(participant)["x"])
        for batch in rows.split(first.batch_size):
            out = module(batch.to(self.templates.device))
            for parts, step in zip(found, steps, strict=True):
                parts.append(select_output(step, out))
        return [torch.cat(parts).to(self.templates.memory.storage_device) for parts in found]


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
