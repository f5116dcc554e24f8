"""Backend that computes one step of a plan after the other.

Predictions on public rows are cached. After FedAvg, for example, all clients have equal models, and
the global test set is predicted once. Cached predictions are computed for one model at a time,
because the outputs of stacked models differ in the last bits, and results must not depend on cache
hits.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from cachetools import FIFOCache
from torch import Tensor

from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import (
    ClassSums,
    Fit,
    FitReport,
    Predict,
    Recalibrate,
    Rows,
    Step,
    TensorRows,
    forward_batch_size,
)
from hetero_fl.core.stored_rows import Column, split_rows, targets
from hetero_fl.data.federated_data import PUBLIC
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import DivergedError, Work
from hetero_fl.engine.templates import (
    OutputStep,
    Templates,
    step_model_spec,
    step_tensors,
    with_integers,
)
from hetero_fl.engine.training import run_fit
from hetero_fl.utils.seeding import stream_key
from model_zoo import Outputs, is_batch_norm
from model_zoo.generators import keyed_generators


def select_output(step: OutputStep, outputs: Outputs) -> Tensor:
    """Select the model output that a step requests, shape `[B, ...]`.

    The output is clipped if the step has a lower bound (`ClassSums.at_least`).

    Args:
        step: The step.
        outputs: Outputs of the model for a batch.
    """
    is_log = step.readout == "log_probabilities"
    selected = F.log_softmax(outputs.logits, -1) if is_log else getattr(outputs, step.readout)
    minimum = getattr(step, "at_least", None)
    return selected if minimum is None else selected.clamp(min=minimum)


def class_sums(values: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Compute the sum of the values and the number of rows of each class.

    Args:
        values: Values, shape `[N, D]`.
        y: Class indices, shape `[N]`.
        num_classes: Number of classes C.

    Returns:
        Sums, shape `[C, D]`, and counts, shape `[C]`.
    """
    # On a GPU, `index_add_` and `bincount` add values in an undefined order.
    if values.is_cuda:
        classes = torch.arange(num_classes, device=values.device)
        members = (y.to(values.device)[:, None] == classes).to(values.dtype)
        return members.t() @ values, members.sum(0)
    sums = torch.zeros(num_classes, values.shape[1], dtype=values.dtype).index_add_(0, y, values)
    return sums, torch.bincount(y, minlength=num_classes).to(values.dtype)


def prediction_generators(
    participant: Participant, step: OutputStep | Recalibrate, templates: Templates
) -> AbstractContextManager[None]:
    """Return a context manager that seeds the global generators for predictions of a model.

    All participants draw equal numbers, so that results do not depend on cached predictions, and
    saved models predict what a run evaluated.
    """
    spec_id = step_model_spec(participant, step).spec_id
    return keyed_generators(stream_key("predict", spec_id), templates.device, brief=True)


# Maximum number of cached predictions. Each entry keeps the tensors of the model in memory.
CACHED_PREDICTIONS = 16
# Maximum number of cached predictions of received models, which participants keep in memory anyway.
CACHED_RECEIVED = 128


class CachedOutputs:
    """Outputs of a model, and the rows and tensors from which the outputs were computed.

    The rows are referenced weakly. After one of the model's tensors or the outputs have been
    modified in place, `matches` returns False.

    Args:
        x: Inputs, shape `[N, ...]`.
        tensors: The model's tensors, keyed by name.
        outputs: The outputs, shape `[N, ...]`.
    """

    def __init__(self, x: Column, tensors: Mapping[str, Tensor], outputs: Tensor) -> None:
        self._x = weakref.ref(x)
        self.outputs = outputs
        self._version = outputs._version
        self._tensors = {n: (t, t._version) for n, t in tensors.items()}

    def matches(self, x: Column, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether the outputs were computed from these rows and an equal model.

        Args:
            x: Inputs, shape `[N, ...]`, which are compared by identity.
            tensors: The model's tensors, keyed by name, which are compared by value.
        """
        if self._x() is not x or self.outputs._version != self._version:
            return False
        if any(t._version != version for t, version in self._tensors.values()):
            return False
        if self._tensors.keys() != tensors.keys():
            return False
        return all(_are_equal(self._tensors[n][0], tensor) for n, tensor in tensors.items())


def _are_equal(one: Tensor, other: Tensor) -> bool:
    # `is_set_to` does not read the values.
    return one.is_set_to(other) or torch.equal(one, other)


def prediction_key(participant: Participant, step: Step) -> Any:
    """Return the cache key of a prediction on a whole public data set, or None for other steps.

    The key contains neither the values of the rows nor the tensors of the model.
    """
    if not isinstance(step, Predict) or not isinstance(step.data, Rows):
        return None
    rows = step.data
    if rows.name not in PUBLIC or rows.rows is not None:
        return None
    shape = tuple(participant.data(rows.name, rows.preprocess)["x"].shape)
    # The slot distinguishes the members of a received ensemble.
    received_slot = None if step.tensors is None else step.slot
    return (
        step_model_spec(participant, step),
        rows.name,
        shape,
        step.readout,
        step.batch_size,
        received_slot,
    )


class SerialBackend:
    """Backend that computes one step after the other on one device.

    Args:
        memory: The device and its cached tensors.
        precision: "float32" or "bfloat16".
    """

    def __init__(self, memory: DeviceMemory, precision: str = "float32") -> None:
        self.templates = Templates(memory, precision)
        self._predictions: FIFOCache[Any, CachedOutputs] = FIFOCache(CACHED_PREDICTIONS)
        self._received: FIFOCache[Any, CachedOutputs] = FIFOCache(CACHED_RECEIVED)

    def run(self, work: Work) -> list[Any]:
        """Compute steps and return their results in order.

        Args:
            work: Pairs of participant and step.

        Returns:
            The result of each step. The result of a fit that diverges is a `DivergedError`.
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
            elif isinstance(step, Recalibrate):
                results.append(self.recalibrate(participant, step))
            elif (key := prediction_key(participant, step)) is not None:
                assert isinstance(step, Predict)
                results.append(self.predict_public(key, participant, step))
            else:
                # Consecutive steps with the same model and rows share one forward pass.
                end = begin + 1
                while end < len(work) and share_forward_pass(work[begin], work[end]):
                    end += 1
                results += self._output_results(work[begin:end])
        return results

    def _fit(self, participant: Participant, fit: Fit) -> FitReport:
        """Run a fit, and repeat it without cached copies if the device runs out of memory."""
        uses = dict(participant.stream_uses)
        try:
            return run_fit(participant, fit, self.templates)
        except torch.OutOfMemoryError:
            if not self.templates.memory.has_copies:
                raise
        self.templates.memory.disable_cache()
        participant.stream_uses.clear()
        participant.stream_uses.update(uses)
        return run_fit(participant, fit, self.templates)

    def predict_public(self, key: Any, participant: Participant, step: Predict) -> Tensor:
        """Return the cached result of a prediction on public rows, or compute and cache the result.

        Several participants may receive the same tensor, which must not be modified in place.

        Args:
            key: The return value of `prediction_key`.
            participant: The participant whose model predicts.
            step: The step.

        Returns:
            Outputs of the model, shape `[N, ...]`.
        """
        x = step.data.columns(participant)["x"]
        tensors = step_tensors(participant, step)
        cache = self._predictions if step.tensors is None else self._received
        cached = cache.get(key)
        if cached is None or not cached.matches(x, tensors):
            cached = CachedOutputs(x, tensors, self._outputs(participant, [step])[0])
            cache[key] = cached
        return cached.outputs

    @torch.no_grad()
    def recalibrate(self, participant: Participant, step: Recalibrate) -> Tensors:
        """Compute the running means and variances of BatchNorm layers on the rows of a step.

        Args:
            participant: The participant whose model is used.
            step: The step.

        Returns:
            The means and variances, keyed by tensor name. The dictionary is empty if the model has
            no BatchNorm layers or there are fewer than two rows.
        """
        template = self.templates(step_model_spec(participant, step))
        layers = {n: m for n, m in template.module.named_modules() if is_batch_norm(m)}
        rows = step.data.columns(participant)["x"]
        if not layers or min(len(rows), step.batch_size) < 2:
            return {}
        module = template.load(with_integers(participant, step))
        template.set_mode(training=False)
        momenta = {name: layer.momentum for name, layer in layers.items()}
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        with prediction_generators(participant, step, self.templates):
            for batch in split_rows(rows, step.batch_size):
                if len(batch) > 1:
                    module(self.templates.memory.keep(batch).to(self.templates.device))
        for name, layer in layers.items():
            layer.momentum = momenta[name]
            layer.eval()
        names = [f"{n}.{kind}" for n in layers for kind in ("running_mean", "running_var")]
        device = self.templates.memory.storage_device
        return {n: template.tensors[n].detach().to(device, copy=True) for n in names}

    def _output_results(self, work: Work) -> list[Any]:
        participant = work[0][0]
        # `run` passes neither fits nor recalibrations to this method.
        steps: list[Predict | ClassSums] = [step for _, step in work]  # type: ignore[misc]
        results: list[Any] = []
        for step, outputs in zip(steps, self._outputs(participant, steps), strict=True):
            if isinstance(step, Predict):
                results.append(outputs)
            else:
                y = targets(step.data.columns(participant))
                results.append(class_sums(outputs, y, participant.task.outputs))
        return results

    @torch.no_grad()
    def _outputs(self, participant: Participant, steps: list[Predict | ClassSums]) -> list[Tensor]:
        first = steps[0]
        is_received = getattr(first, "tensors", None) is not None
        slot = "" if is_received else first.slot
        template = self.templates(step_model_spec(participant, first), slot)
        module = template.load(with_integers(participant, first))
        template.set_mode(training=False)
        batches: list[list[Tensor]] = [[] for _ in steps]
        rows = first.data.columns(participant)["x"]
        if isinstance(rows, Tensor):
            rows = self.templates.memory.keep(rows)
        size = forward_batch_size(first.batch_size, rows, self.templates.device)
        with prediction_generators(participant, first, self.templates):
            for batch in split_rows(rows, size):
                out = module(batch.to(self.templates.device))
                for parts, step in zip(batches, steps, strict=True):
                    parts.append(select_output(step, out))
        return [torch.cat(parts).to(self.templates.memory.storage_device) for parts in batches]


def share_forward_pass(one: tuple[Participant, Step], other: tuple[Participant, Step]) -> bool:
    """Return whether one forward pass can compute two steps: equal model, rows and batch size."""
    participant, a = one
    other_participant, b = other
    if participant is not other_participant or isinstance(a, Fit) or isinstance(b, Fit):
        return False
    if (
        a.slot != b.slot
        or a.batch_size != b.batch_size
        or step_tensors(participant, a) is not step_tensors(other_participant, b)
    ):
        return False
    return _are_same_rows(a.data, b.data)


def _are_same_rows(a: Rows | TensorRows, b: Rows | TensorRows) -> bool:
    if isinstance(a, Rows) and isinstance(b, Rows):
        return (a.name, a.preprocess) == (b.name, b.preprocess) and a.rows is b.rows
    return (
        isinstance(a, TensorRows) and isinstance(b, TensorRows) and a.tensors["x"] is b.tensors["x"]
    )
