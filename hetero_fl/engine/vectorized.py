"""Backend that computes equal steps of several participants at once with `torch.vmap`.

A step is a compute step of a plan (`hetero_fl.core.plan`). Steps are equal if they have the same
`vectorization_key`, that is, the same architectures, objective, optimizer and shapes. The number of
rows may differ. Steps that `torch.vmap` does not support run serially: recurrent networks, dropout
of whole channels or paths, and branches that depend on data.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.utils.rnn import pad_sequence

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import Columns, Participant
from hetero_fl.core.plan import (
    ClassSums,
    Fit,
    Predict,
    Recalibrate,
    SampledBatches,
    Step,
    forward_batch_size,
)
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import Backend, Work, model_slots
from hetero_fl.engine.serial import (
    SerialBackend,
    convert_output,
    is_cached,
    step_result,
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
    strict_vmap,
    trial_value,
)
from model_zoo.generators import keyed_generators

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
    step = work[0][1]
    device = templates.device
    template = templates(step_model_spec(*work[0]), "")
    template.module.eval()
    inputs = [step.data.columns(participant)["x"] for participant, step in work]
    # Models with the most rows come first, so that the models with remaining rows are always a
    # prefix.
    order = sorted(range(len(work)), key=lambda i: -len(inputs[i]))
    stacked = template.stack([with_integers(*work[i]) for i in order])

    def outputs(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        model = template.view_of(tensors)
        output = model.forward_features(x) if step.readout == "features" else model(x)
        return convert_output(step, output)

    x = [templates.memory.keep(inputs[i]) for i in order]
    batches: list[list[Tensor]] = [[] for _ in order]
    size = forward_batch_size(step.batch_size, x[0], device)
    with strict_vmap():
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
    results = {
        i: step_result(*work[i], torch.cat(parts).to(templates.memory.storage_device))
        for i, parts in zip(order, batches, strict=True)
    }
    return [results[i] for i in range(len(work))]


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
        uses: Counter[tuple[int, str]] = Counter()
        for i, (participant, step) in enumerate(work):
            # Fits of one participant with the same label draw from one random stream in the order
            # of the work. Such fits must run one after the other, in successive waves.
            wave = 0
            if isinstance(step, Fit):
                wave = uses[id(participant), step.label]
                uses[id(participant), step.label] += 1
            groups.setdefault((wave, vectorization_key(participant, step)), []).append(i)
        results: dict[int, Any] = {}
        for _, members in sorted(groups.items(), key=lambda group: group[0][0]):
            found = self._run_equal([work[i] for i in members])
            results.update(zip(members, found, strict=True))
        return [results[i] for i in range(len(work))]

    def _run_equal(self, work: Work) -> list[Any]:
        """Compute equal steps, in several groups if they do not fit into memory together."""
        participant, step = work[0]
        if len(work) == 1:
            return self.serial.run(work)
        key = _vmap_support_key(participant, step)
        if key in self._unsupported:
            return self.serial.run(work)
        size_key = (key, getattr(step, "batch_size", 0))
        if size_key not in self._max_group_sizes:
            self._max_group_sizes[size_key] = self._max_group_size(participant, step)
        max_size = self._max_group_sizes[size_key]
        if len(work) > max_size:
            count = -(-len(work) // max_size)
            ends = [i * len(work) // count for i in range(count + 1)]
            return [r for a, b in pairwise(ends) for r in self._run_equal(work[a:b])]
        try:
            if key not in self._tried:
                _check_stacking(participant, step, self.templates.memory)
                self._tried.add(key)
            run: Any = fit_stacked if isinstance(step, Fit) else run_stacked_outputs
            return list(run(work, self.templates))
        except torch.OutOfMemoryError:
            half = self._max_group_sizes[size_key] = -(-len(work) // 2)
            problem = (
                f"the memory of {self.templates.device} is too small for {len(work)} participants "
                f"at once; continuing with at most {half}"
            )
        except RuntimeError as error:
            self._unsupported.add(key)
            reason = str(error).strip().split("\n")[0].split(". ")[0]
            problem = (
                f"cannot be vectorized over clients, running them one after the other: {reason}"
            )
        names = " + ".join(arch.name for arch in architectures(participant, step))
        line = f"{names}: {problem}"
        if line not in self._logged:
            self._logged.add(line)
            self.log(line)
        return self._run_equal(work)

    def _max_group_size(self, participant: Participant, step: Step) -> int:
        """Return the largest number of participants whose steps are computed together."""
        if self.templates.device.type != "cpu":
            return sys.maxsize
        archs = architectures(participant, step)
        largest = max(t.nbytes for arch in archs for t in self.templates(arch).tensors.values())
        return max(2, MAX_STACK_BYTES // max(1, largest))


def _check_stacking(participant: Participant, step: Step, memory: DeviceMemory) -> None:
    """Check that a step of user-defined code gives the same result stacked and alone.

    The trial uses copies of the participant with other parameters. A fit makes one optimizer step.

    Raises:
        RuntimeError: If the results differ.
    """
    is_own = any(arch.is_user_defined for arch in architectures(participant, step))
    run: Any = run_stacked_outputs
    if isinstance(step, Fit):
        is_own = is_own or step.objective.is_user_defined
        run = fit_stacked
        step = replace(step, steps=1, optimizer=OptimizerConfig(name="sgd", lr=TRIAL_RATE))
    if not is_own:
        return
    serial = SerialBackend(memory)
    # Draws of the trial must not change those of the run.
    with keyed_generators(0, memory.device):
        models = {
            slot: {
                n: trial_value(t) if n in participant.arch[slot].trained_names else t
                for n, t in participant.models[slot].items()
            }
            for slot in model_slots(step)
        }
        trials = [replace(participant, models=dict(models), stream_uses={}) for _ in range(3)]
        stacked = run([(trial, step) for trial in trials[:2]], serial.templates)[0]
        alone = serial.run([(trials[2], step)])[0]
    if isinstance(step, Fit):
        stacked, alone = ([t for m in p.models.values() for t in m.values()] for p in trials[1:])
    check_trial(*([r] if isinstance(r, Tensor) else r for r in (stacked, alone)))


def architectures(participant: Participant, step: Step) -> list[ModelSpec]:
    """Return the architectures of all models that a step uses, in the order of the slots."""
    if isinstance(step, Fit):
        return [participant.arch[slot] for slot in (*step.train, *step.frozen)]
    return [step_model_spec(participant, step)]


# Fields of a `Fit` that need not be equal, or of which only a part is compared.
UNCOMPARED = {"data", "extra_batches", "stream_id", "key"}


def vectorization_key(participant: Participant, step: Step) -> Any:
    """Return a hashable key that is equal for steps that can be computed together.

    Steps that must be computed alone have unique keys.
    """
    if isinstance(step, Recalibrate) or isinstance(step.data, SampledBatches):
        return object()
    columns = step.data.columns(participant)
    if _runs_alone(participant, step, columns):
        return object()
    structure = _tree_structure({name: column[:0] for name, column in columns.items()})
    support_key = _vmap_support_key(participant, step)
    if not isinstance(step, Fit):
        return support_key, step.batch_size, getattr(step, "at_least", None), structure
    settings = {name: v for name, v in vars(step).items() if name not in UNCOMPARED}
    extra_batches = tuple((name, draws.size) for name, draws in step.extra_batches.items())
    key = (support_key, _tree_structure(settings), structure, extra_batches)
    try:
        hash(key)
    except TypeError:
        # A user-defined objective that is not hashable counts as different from all others.
        return object()
    return key


def _runs_alone(participant: Participant, step: Fit | OutputStep, columns: Columns) -> bool:
    """Return whether a step is computed for one participant at a time."""
    if isinstance(step, Fit):
        # A user's optimizer may combine the elements of a tensor, for example in a norm.
        return step.optimizer.is_custom or step.anneal or step.keep is not None
    # The results of stacked models differ in the last bits, and must not depend on cache hits.
    # Without rows there is no output to compute together, and padding must not change outputs.
    is_mixed = mixes_rows(step_model_spec(participant, step), training=False)
    return is_cached(step) or is_mixed or not len(columns["x"])


def _vmap_support_key(participant: Participant, step: Step) -> Any:
    """Return a key such that vmap supports either all steps with this key or none."""
    if not isinstance(step, Fit):
        return type(step), step_model_spec(participant, step), getattr(step, "readout", None)
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
