"""Backend that computes one step of a plan after the other.

Predictions on public rows are cached. After FedAvg, for example, all clients have equal models, and
the global test set is predicted once. Cached predictions are computed for one model at a time,
because the outputs of stacked models differ in the last bits, and results must not depend on cache
hits.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from cachetools import FIFOCache
from torch import Tensor

from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import (
    Fit,
    Predict,
    Recalibrate,
    Rows,
    Step,
    forward_batch_size,
)
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
from model_zoo import is_batch_norm
from model_zoo.generators import keyed_generators


def convert_output(step: OutputStep, output: Tensor) -> Tensor:
    """Convert features or logits of a model to the values that a step requests.

    The values are clipped if the step has a lower bound (`ClassSums.at_least`).

    Args:
        step: The step.
        output: The features if the step requests features, otherwise the logits, shape `[B, ...]`.
    """
    if step.readout == "log_probabilities":
        output = F.log_softmax(output, -1)
    minimum = getattr(step, "at_least", None)
    return output if minimum is None else output.clamp(min=minimum)


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


def step_result(participant: Participant, step: OutputStep, outputs: Tensor) -> Any:
    """Return the result of a step.

    Args:
        participant: The participant.
        step: The step.
        outputs: Selected outputs of the model for all rows, shape `[N, ...]`.
    """
    if isinstance(step, Predict):
        return outputs
    return class_sums(outputs, step.data.columns(participant)["y"], participant.task.outputs)


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
CACHED_PREDICTIONS = 128


class CachedOutputs:
    """Outputs of a model, and the rows and tensors from which the outputs were computed.

    The rows are referenced weakly. After one of the model's tensors or the outputs have been
    modified in place, `matches` returns False.

    Args:
        x: Inputs, shape `[N, ...]`.
        tensors: The model's tensors, keyed by name.
        outputs: The outputs, shape `[N, ...]`.
    """

    def __init__(self, x: Tensor, tensors: Mapping[str, Tensor], outputs: Tensor) -> None:
        self.outputs = outputs
        self._x = weakref.ref(x)
        self._tensors = dict(tensors)
        self._versions = self._read_versions()

    def _read_versions(self) -> list[int]:
        return [t._version for t in (self.outputs, *self._tensors.values())]

    def matches(self, x: Tensor, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether the outputs were computed from these rows and an equal model.

        Args:
            x: Inputs, shape `[N, ...]`, which are compared by identity.
            tensors: The model's tensors, keyed by name, which are compared by value.
        """
        is_same = self._x() is x and self._tensors.keys() == tensors.keys()
        # `is_set_to` does not read the values.
        return (is_same and self._versions == self._read_versions()) and all(
            mine.is_set_to(tensors[n]) or torch.equal(mine, tensors[n])
            for n, mine in self._tensors.items()
        )


def is_cached(step: Step) -> bool:
    """Return whether the result of a step is cached: a prediction on a whole public data set."""
    if not isinstance(step, Predict) or not isinstance(step.data, Rows):
        return False
    return step.data.name in PUBLIC and step.data.rows is None


class SerialBackend:
    """Backend that computes one step after the other on one device.

    Args:
        memory: The device and its cached tensors.
        precision: "float32" or "bfloat16".
    """

    def __init__(self, memory: DeviceMemory, precision: str = "float32") -> None:
        self.templates = Templates(memory, precision)
        self._predictions: FIFOCache[Any, CachedOutputs] = FIFOCache(CACHED_PREDICTIONS)

    def run(self, work: Work) -> list[Any]:
        """Compute steps and return their results in order.

        Args:
            work: Pairs of participant and step.

        Returns:
            The result of each step. The result of a fit that diverges is a `DivergedError`.
        """
        results: list[Any] = []
        # Consecutive steps with the same model and rows share one forward pass.
        for _, group in groupby(work, lambda pair: _forward_pass_key(*pair)):
            pairs = list(group)
            participant, step = pairs[0]
            if isinstance(step, Fit):
                use = participant.stream_uses.get(step.label, -1)
                try:
                    results.append(run_fit(participant, step, self.templates))
                except DivergedError as failure:
                    results.append(failure)
                except torch.OutOfMemoryError:
                    # Repeat the fit without cached copies.
                    if not self.templates.memory.has_copies:
                        raise
                    self.templates.memory.disable_cache()
                    participant.stream_uses[step.label] = use
                    results += self.run(pairs)
            elif isinstance(step, Recalibrate):
                results.append(self._recalibrate(participant, step))
            elif isinstance(step, Predict) and is_cached(step):
                results.append(self._predict_public(participant, step))
            else:
                results += self._outputs(participant, [step for _, step in pairs])
        return results

    def _predict_public(self, participant: Participant, step: Predict) -> Tensor:
        """Return the outputs on public rows, which are computed unless they are in the cache.

        Several participants may receive the same tensor, which must not be modified in place.
        """
        assert isinstance(step.data, Rows)
        x = step.data.columns(participant)["x"]
        tensors = step_tensors(participant, step)
        # The slot distinguishes the members of a received ensemble.
        slot = None if step.tensors is None else step.slot
        spec = step_model_spec(participant, step)
        key = (spec, step.data.name, step.readout, step.batch_size, slot)
        cached = self._predictions.get(key)
        if cached is None or not cached.matches(x, tensors):
            cached = CachedOutputs(x, tensors, self._outputs(participant, [step])[0])
            self._predictions[key] = cached
        return cached.outputs

    @torch.no_grad()
    def _recalibrate(self, participant: Participant, step: Recalibrate) -> Tensors:
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
            for batch in rows.split(step.batch_size):
                if len(batch) > 1:
                    module(self.templates.memory.keep(batch).to(self.templates.device))
        for name, layer in layers.items():
            layer.momentum = momenta[name]
            layer.eval()
        names = [f"{n}.{kind}" for n in layers for kind in ("running_mean", "running_var")]
        device = self.templates.memory.storage_device
        return {n: template.tensors[n].detach().to(device, copy=True) for n in names}

    @torch.no_grad()
    def _outputs(self, participant: Participant, steps: Sequence[Any]) -> list[Any]:
        """Return the results of `Predict` and `ClassSums` steps with the same model and rows."""
        first: OutputStep = steps[0]
        is_received = getattr(first, "tensors", None) is not None
        slot = "" if is_received else first.slot
        template = self.templates(step_model_spec(participant, first), slot)
        module = template.load(with_integers(participant, first))
        template.set_mode(training=False)
        batches: list[list[Tensor]] = [[] for _ in steps]
        rows = self.templates.memory.keep(first.data.columns(participant)["x"])
        size = forward_batch_size(first.batch_size, rows, self.templates.device)
        with prediction_generators(participant, first, self.templates):
            for batch in rows.split(size):
                features = module.forward_features(batch.to(self.templates.device))
                logits = module.forward_head(features)
                for parts, step in zip(batches, steps, strict=True):
                    output = features if step.readout == "features" else logits
                    parts.append(convert_output(step, output))
        results: list[Any] = []
        for step, parts in zip(steps, batches, strict=True):
            outputs = torch.cat(parts).to(self.templates.memory.storage_device)
            results.append(step_result(participant, step, outputs))
        return results


def _forward_pass_key(participant: Participant, step: Step) -> Any:
    """Return a key that is equal for steps that one forward pass can compute."""
    if isinstance(step, Fit | Recalibrate) or is_cached(step):
        return object()
    rows: Any = step.data
    if isinstance(rows, Rows):
        rows_key = (rows.name, rows.preprocess, id(rows.rows))
    else:
        rows_key = ("tensors", None, id(rows.tensors["x"]))
    tensors = step_tensors(participant, step)
    return id(participant), step.slot, step.batch_size, id(tensors), rows_key
