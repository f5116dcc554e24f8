"""Backend that computes equal steps of several participants at once with `torch.vmap`.

A step is a compute step of a plan (`hetero_fl.core.plan`). Steps are equal if they have the same
`vectorization_key`, that is, the same architectures, objective, optimizer and shapes. The number of
rows may differ. Steps that `torch.vmap` does not support run serially: recurrent networks, dropout
of whole channels or paths, and branches that depend on data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.utils.rnn import pad_sequence

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import (
    ClassSums,
    Fit,
    Predict,
    Recalibrate,
    SampledBatches,
    Step,
    forward_batch_size,
)
from hetero_fl.core.stored_rows import StoredRows, require_tensor, targets
from hetero_fl.engine.batches import step_count
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import Backend, Work, model_slots
from hetero_fl.engine.serial import (
    SerialBackend,
    class_sums,
    prediction_key,
    select_output,
)
from hetero_fl.engine.templates import (
    OutputStep,
    Templates,
    mixes_rows,
    step_model_spec,
    with_integers,
)
from hetero_fl.engine.vectorized_training import (
    TRIAL_RATE,
    check_trial,
    fit_stacked,
    refused_draws,
    trial_value,
)
from model_zoo.generators import keyed_generators
from model_zoo.registry import is_user_defined

T = TypeVar("T")
OutputWork = Sequence[tuple[Participant, Predict | ClassSums]]


@torch.no_grad()
def run_stacked_outputs(work: OutputWork, templates: Templates) -> list[Any]:
    """Compute equal `Predict` or `ClassSums` steps together and return the results in order.

    Args:
        work: Pairs of participant and step.
        templates: The modules, keyed by architecture and slot.

    Raises:
        RuntimeError: If `torch.vmap` does not support the model.
    """
    columns = [step.data.columns(participant) for participant, step in work]
    inputs = [require_tensor(c["x"], "runtime.chunk > 1") for c in columns]
    outputs = _forward(work, inputs, templates)
    if isinstance(work[0][1], Predict):
        return outputs
    return [
        class_sums(v, targets(c), p.task.outputs)
        for v, c, (p, _) in zip(outputs, columns, work, strict=True)
    ]


def _forward(work: OutputWork, inputs: Sequence[Tensor], templates: Templates) -> list[Tensor]:
    """Return the outputs of each participant's model on the rows of the step, shape `[N, ...]`."""
    step = work[0][1]
    device = templates.device
    template = templates(step_model_spec(*work[0]), "")
    template.module.eval()
    # Models with the most rows come first, so that the models with remaining rows are always a
    # prefix.
    order = sorted(range(len(work)), key=lambda i: -len(inputs[i]))
    models = [with_integers(*work[i]) for i in order]
    stacked = {
        n: templates.memory.stack([m[n] for m in models]).to(mine)
        for n, mine in template.tensors.items()
    }

    def outputs(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return select_output(step, template.view_of(tensors)(x))

    x = [templates.memory.keep(inputs[i]) for i in order]
    batches: list[list[Tensor]] = [[] for _ in order]
    size = forward_batch_size(step.batch_size, x[0], device)
    with refused_draws():
        for begin in range(0, len(x[0]), size):
            active = sum(len(rows) > begin for rows in x)
            parts = [rows[begin : begin + size].to(device) for rows in x[:active]]
            # Shorter batches are padded with zeros, because rows do not affect each other in
            # evaluation mode.
            batch = pad_sequence(parts, batch_first=True)
            tensors = {n: t[:active] for n, t in stacked.items()}
            out = vmap(outputs, randomness="error")(tensors, batch)
            for i in range(active):
                batches[i].append(out[i, : len(x[i]) - begin])
    whole = [torch.cat(parts).to(templates.memory.storage_device) for parts in batches]
    outputs_by_index = {i: whole[position] for position, i in enumerate(order)}
    return [outputs_by_index[i] for i in range(len(work))]


# Time relative to the serial backend on one CPU thread, for 5 / 20 clients with 100 rows each (SGD,
# batch size 10):
#
#                     8x8 pixels      28x28 pixels
#     linear          0.95 / 0.31     0.94 / 0.49
#     mlp             0.94 / 0.33     1.43 / 0.47     (100 clients with 60 rows: 0.16, 0.42)
#     cnn_bn_small    0.62 / 0.22     0.76 / 0.53
#     cnn_gn_small    0.53 / 0.23     0.70 / 0.45
#     lenet                           0.94 / 0.57
#     fedavg_cnn      0.98 / 0.57     0.99 / 1.13
#
# With batch size 32, images of 28x28 pixels use the whole CPU even without vectorization
# (cnn_bn_small 0.94 / 0.75, cnn_gn_small 0.79 / 0.86). Groups of two clients are mostly slower (0.9
# to 3.3), and so are models of more than a million parameters, which together exceed the CPU cache.
# There were few measurements on a shared machine, so the second digit is not reliable.

# Maximum bytes of a stacked tensor on a CPU. Above 32 MB, glibc requests new memory from the system
# for every gradient, and the page faults take longer than the computation: 100 perceptrons on 28x28
# pixels took 0.74 of the serial time in one group, but 0.60 in several.
MAX_STACK_BYTES = 16 * 2**20


class VectorizedBackend:
    """Backend that computes equal steps of several participants together, on one device.

    Args:
        memory: The device and its cached tensors.
        log: Function that is called with a message if steps cannot be vectorized or do not fit into
            memory together.
        precision: "float32" or "bfloat16".
    """

    def __init__(
        self,
        memory: DeviceMemory,
        log: Callable[[str], None],
        precision: str = "float32",
    ) -> None:
        self.serial = SerialBackend(memory, precision)
        self.log = log
        self.templates = self.serial.templates
        self._unsupported: set[Any] = set()
        # Keys of the steps that have been compared with the serial backend.
        self._tried: set[Any] = set()
        self._logged: set[str] = set()
        # Largest number of participants whose steps fit into device memory at once.
        self._max_group_sizes: dict[Any, int] = {}

    def run(self, work: Work) -> list[Any]:
        """Compute steps and return their results in order.

        Args:
            work: Pairs of participant and step.

        Returns:
            The result of each step. The result of a fit that diverges is a `DivergedError`.
        """
        groups: dict[Any, list[int]] = {}
        seen: dict[tuple[int, str], int] = {}
        results: dict[int, Any] = {}
        for i, (participant, step) in enumerate(work):
            if isinstance(step, Recalibrate):
                results[i] = self.serial.recalibrate(participant, step)
                continue
            # Predictions on public rows are computed for one model at a time (see `engine.serial`).
            key = prediction_key(participant, step)
            if key is not None:
                assert isinstance(step, Predict)
                results[i] = self.serial.predict_public(key, participant, step)
                continue
            # Fits of one participant with the same label draw from one random stream in the order
            # of the work. Such fits must run one after the other, in successive waves.
            wave = 0
            if isinstance(step, Fit):
                wave = seen[id(participant), step.label] = (
                    seen.get((id(participant), step.label), -1) + 1
                )
            equal: Any = vectorization_key(participant, step)
            try:
                hash(equal)
            except TypeError:
                # A user-defined objective that is not hashable counts as different from all others.
                equal = i
            groups.setdefault((wave, equal), []).append(i)
        for _, members in sorted(groups.items(), key=lambda group: group[0][0]):
            for piece in self._split_by_size(members, work):
                results.update(
                    zip(piece, self._run_vectorized([work[i] for i in piece]), strict=True)
                )
        return [results[i] for i in range(len(work))]

    def _split_by_size(self, members: Sequence[int], work: Work) -> list[Sequence[int]]:
        """Split a group so that no stacked tensor on a CPU exceeds MAX_STACK_BYTES."""
        if self.templates.device.type != "cpu":
            return [members]
        participant, step = work[members[0]]
        tensors = [
            t
            for arch in architectures(participant, step)
            for t in self.templates(arch).tensors.values()
        ]
        largest = max(t.numel() * t.element_size() for t in tensors)
        return _split_evenly(members, max(2, MAX_STACK_BYTES // max(1, largest)))

    def _run_vectorized(self, work: Work) -> list[Any]:
        participant, step = work[0]
        assert not isinstance(step, Recalibrate)
        support_key = _vmap_support_key(participant, step)
        if len(work) == 1 or support_key in self._unsupported:
            return self.serial.run(work)
        size_key = (support_key, getattr(step, "batch_size", 0))
        max_size = self._max_group_sizes.get(size_key, len(work))
        if len(work) > max_size:
            pieces = _split_evenly(work, max_size)
            return [result for piece in pieces for result in self._run_vectorized(piece)]
        uses = [dict(p.stream_uses) for p, _ in work]
        try:
            with warnings.catch_warnings():
                # If an operation has no batching rule, vmap loops over the participants, which is
                # slower than the serial backend.
                warnings.filterwarnings("error", message="There is a performance drop")
                if support_key not in self._tried:
                    _check_stacking(participant, step, self.templates.memory)
                    self._tried.add(support_key)
                # All steps are of the type of the first one.
                if isinstance(step, Fit):
                    return fit_stacked(work, self.templates)  # type: ignore[arg-type]
                return run_stacked_outputs(work, self.templates)  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            if self.templates.memory.has_copies:
                self.templates.memory.disable_cache()
            else:
                half = self._max_group_sizes[size_key] = -(-len(work) // 2)
                self._log_once(
                    f"{_model_names(participant, step)}: the memory of {self.templates.device} "
                    f"is too small for {len(work)} participants at once; "
                    f"continuing with at most {half}"
                )
        except (RuntimeError, UserWarning) as error:
            self._unsupported.add(support_key)
            reason = str(error).strip().split("\n")[0].split(". ")[0]
            self._log_once(
                f"{_model_names(participant, step)}: cannot be vectorized over clients, "
                f"running them one after the other: {reason}"
            )
        for (p, _), before in zip(work, uses, strict=True):
            p.stream_uses.clear()
            p.stream_uses.update(before)
        return self._run_vectorized(work)

    def _log_once(self, line: str) -> None:
        if line not in self._logged:
            self._logged.add(line)
            self.log(line)


def _check_stacking(participant: Participant, step: Fit | OutputStep, memory: DeviceMemory) -> None:
    """Check that a step of user-defined code gives the same result stacked and alone.

    The trial uses copies of the participant with other parameters. A fit makes one optimizer step.

    Raises:
        RuntimeError: If the results differ.
    """
    is_fit = isinstance(step, Fit)
    is_own = any(is_user_defined(arch.name) for arch in architectures(participant, step))
    if not is_own and not (isinstance(step, Fit) and step.objective.is_user_defined):
        return
    if isinstance(step, Fit):
        optimizer = OptimizerConfig(name="sgd", lr=TRIAL_RATE)
        step = replace(step, steps=1, optimizer=optimizer, keep=None)
    serial = SerialBackend(memory)
    templates = serial.templates
    run: Callable[..., list[Any]] = fit_stacked if is_fit else run_stacked_outputs
    # Draws of the trial must not change those of the run.
    with keyed_generators(0, memory.device):
        models = {
            slot: {
                n: trial_value(t) if n in templates(participant.arch[slot], slot).parameters else t
                for n, t in participant.models[slot].items()
            }
            for slot in model_slots(step)
        }
        trials = [
            replace(participant, models=dict(models), state={}, stream_uses={}) for _ in range(3)
        ]
        results = [
            run([(trial, step) for trial in trials[:2]], templates)[0],
            serial.run([(trials[2], step)])[0],
        ]
    if is_fit:
        results = [[t for m in p.models.values() for t in m.values()] for p in trials[1:]]
    check_trial(*([r] if isinstance(r, Tensor) else r for r in results))


def _model_names(participant: Participant, step: Step) -> str:
    return " + ".join(arch.name for arch in architectures(participant, step))


def _split_evenly(members: Sequence[T], max_size: int) -> list[Sequence[T]]:
    count = -(-len(members) // max_size)
    return [
        members[i * len(members) // count : (i + 1) * len(members) // count] for i in range(count)
    ]


def architectures(participant: Participant, step: Step) -> list[ModelSpec]:
    """Return the architectures of all models that a step uses, in the order of the slots."""
    if isinstance(step, Fit):
        return [participant.arch[slot] for slot in (*step.train, *step.frozen)]
    return [step_model_spec(participant, step)]


def vectorization_key(participant: Participant, step: Fit | OutputStep) -> Any:
    """Return a key that is equal for steps that can be computed together.

    Steps that must be computed alone, such as fits with a user-defined optimizer, have unique keys.
    The key is not hashable if the objective is not hashable.
    """
    if not isinstance(step, Fit):
        x = step.data.columns(participant)["x"]
        if isinstance(x, StoredRows):
            return object()
        plain = [step.readout, step.batch_size, getattr(step, "at_least", None)]
        # Without rows there is no output to compute together, and padding must not change outputs.
        if not len(x) or mixes_rows(step_model_spec(participant, step), training=False):
            return object()
        return (type(step), step_model_spec(participant, step), *plain, _tree_structure(x[:0]))
    if step.optimizer.is_custom:
        # A user's optimizer may combine the elements of a tensor, for example in a norm.
        return object()
    data: Any
    if isinstance(step.data, SampledBatches):
        rows = data = step.data.size
    else:
        columns = step.data.columns(participant)
        if any(isinstance(column, StoredRows) for column in columns.values()):
            # Rows in files are read for one participant at a time.
            return object()
        rows = len(next(iter(columns.values())))
        data = _tree_structure({name: column[:0] for name, column in columns.items()})
    kept = participant.state.get("optimizers", {}).get(step.keep, {}) if step.keep else {}
    steps = tuple(
        (k, *((n, float(v) if n == "step" else None) for n, v in s.items()))
        for k, s in kept.items()
    )
    count = step_count(rows, step) if step.anneal else None
    plain = [
        getattr(step, name)
        for name in ("epochs", "steps", "batch_size", "optimizer", "augment", "anneal")
    ]
    extra_batches = tuple((name, draws.size) for name, draws in step.extra_batches.items())
    trees = (_tree_structure(step.context), _tree_structure(step.drift))
    return (
        _vmap_support_key(participant, step),
        *plain,
        step.keep,
        step.label,
        data,
        steps,
        count,
        extra_batches,
        trees,
    )


def _vmap_support_key(participant: Participant, step: Fit | OutputStep) -> Any:
    """Return a key such that vmap supports either all steps with this key or none."""
    if not isinstance(step, Fit):
        return type(step), step_model_spec(participant, step), step.readout
    archs = tuple((s, participant.arch[s]) for s in (*step.train, *step.frozen))
    return Fit, archs, tuple(step.train.items()), step.objective, tuple(step.extra_batches)


def _tree_structure(tree: Any) -> Any:
    """Return a tree in which tensors are replaced by their shapes and dtypes."""
    if isinstance(tree, Mapping):
        return tuple((k, _tree_structure(v)) for k, v in sorted(tree.items()))
    return ("tensor", tuple(tree.shape), tree.dtype) if isinstance(tree, Tensor) else tree


def make_backend(
    memory: DeviceMemory,
    chunk: int = 1,
    precision: str = "float32",
    log: Callable[[str], None] = lambda _line: None,
) -> Backend:
    """Create a serial or a vectorized backend.

    Args:
        memory: The device and its cached tensors.
        chunk: Number of clients that are processed together. If 1, the serial backend is created.
        precision: "float32" or "bfloat16".
        log: Function that is called with a message if steps cannot be vectorized or do not fit into
            memory together.
    """
    if chunk == 1:
        return SerialBackend(memory, precision)
    return VectorizedBackend(memory, log, precision)
