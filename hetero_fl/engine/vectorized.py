"""The backend that computes equal steps of many participants at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pad_sequence

from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import ClassSums, Fit, Predict, SampledBatches, Step
from hetero_fl.engine.batches import step_count
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import Backend, Work
from hetero_fl.engine.serial import (
    SerialBackend,
    class_sums,
    prediction_key,
    select_output,
)
from hetero_fl.engine.templates import Templates, step_model_spec, step_tensors
from hetero_fl.engine.vectorized_training import fit_stacked

# Outputs of many models of one architecture in one computation, in evaluation mode.

T = TypeVar("T")
OutputWork = Sequence[tuple[Participant, Predict | ClassSums]]


@torch.no_grad()
def run_stacked_outputs(work: OutputWork, templates: Templates) -> list[Any]:
    """Results of equal `Predict` or `ClassSums` steps, in order. Raises RuntimeError where the model cannot be batched."""
    columns = [step.data.columns(participant) for participant, step in work]
    outputs = _forward(work, [c["x"] for c in columns], templates)
    if isinstance(work[0][1], Predict):
        return outputs
    return [
        class_sums(v, c["y"], p.task.outputs)
        for v, c, (p, _) in zip(outputs, columns, work, strict=True)
    ]


def _forward(work: OutputWork, inputs: Sequence[Tensor], templates: Templates) -> list[Tensor]:
    """Each model's output `[N, …]` on its own rows; those who have fewer rows drop out earlier, the most rows first."""
    step = work[0][1]
    device = templates.device
    template = templates(step_model_spec(*work[0]), "")
    module = template.module.eval()
    order = sorted(range(len(work)), key=lambda i: -len(inputs[i]))
    models = [step_tensors(*work[i]) for i in order]
    stacked = {
        n: templates.memory.stack([m[n] for m in models]).to(mine)
        for n, mine in template.tensors.items()
        if mine.is_floating_point()  # counters do not travel, and evaluation ignores them
    }

    def outputs(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return select_output(step, functional_call(module, dict(tensors), (x,)))

    x = [templates.memory.keep(inputs[i]) for i in order]
    found: list[list[Tensor]] = [[] for _ in order]
    for begin in range(0, len(x[0]), step.batch_size):
        active = sum(len(rows) > begin for rows in x)
        parts = [rows[begin : begin + step.batch_size].to(device) for rows in x[:active]]
        # Shorter batches are padded with zeros; in evaluation mode no row sees another.
        batch = pad_sequence(parts, batch_first=True)
        tensors = {n: t[:active] for n, t in stacked.items()}
        out = vmap(outputs, randomness="error")(tensors, batch)
        for i in range(active):
            found[i].append(out[i, : len(x[i]) - begin])
    whole = [torch.cat(parts).to(templates.memory.storage_device) for parts in found]
    back = {i: whole[place] for place, i in enumerate(order)}
    return [back[i] for i in range(len(work))]


# The batched backend: equal steps of many participants in one computation, everything else one by
# one.
#
# What makes steps equal is their signature: the same architectures, objective, optimizer, shapes.
# The number of rows may differ. What `vmap` refuses (recurrent networks, dropout of whole channels
# or paths, data-dependent branches) runs serially.
#
# Where it pays on one CPU thread (benchmarks/speed/batched.py, SGD, 100 rows a client; batched time over
# serial time, 5 / 20 clients):
#
#     batch 10                  8x8 pixels      28x28 pixels
#     linear                    0.95 / 0.31     0.94 / 0.49
#     mlp                       0.94 / 0.33     1.43 / 0.47     (100 clients of 60 rows: 0.16 and 0.42)
#     cnn_bn_small              0.62 / 0.22     0.76 / 0.53
#     cnn_gn_small              0.53 / 0.23     0.70 / 0.45
#     lenet                                     0.94 / 0.57
#     fedavg_cnn                0.98 / 0.57     0.99 / 1.13
#
# With a batch of 32, images of 28x28 keep the processor busy by themselves: cnn_bn_small 0.94 /
# 0.75, cnn_gn_small 0.79 / 0.86. Groups of two lose nearly everywhere (0.9 to 3.3), and so do
# models of more than a million parameters, which no longer fit the cache together. The pairs were
# few and the machine was shared: the second digit is not to be relied on.

# Bytes. Beyond 32 MB (glibc) every gradient is fresh memory from the system, whose page faults cost more than the product
# that fills it: a hundred perceptrons on 28x28 pixels took 0.74 of the serial time in one piece, 0.60 in pieces.
LARGEST = 16 * 2**20


class VectorizedBackend:
    """Performs steps on one device, equal ones together; `say` is told once of each architecture that cannot be batched."""

    def __init__(
        self,
        memory: DeviceMemory,
        say: Callable[[str], None],
        precision: str = "float32",
    ) -> None:
        self.serial = SerialBackend(memory, precision)
        self.say = say
        self.templates = self.serial.templates
        self._refused: set[Any] = set()
        self._explained: set[str] = set()
        # By kind of step: participants that fit into the device's memory together.
        self._most_together: dict[Any, int] = {}

    def run(self, work: Work) -> list[Any]:
        """The results in order; where a fit diverged, the `DivergedError` stands in place of its result."""
        groups: dict[Any, list[int]] = {}
        seen: dict[tuple[int, str], int] = {}
        results: dict[int, Any] = {}
        for i, (participant, step) in enumerate(work):
            # One by one: what is known already must not decide with whom the others are computed.
            key = prediction_key(participant, step)
            if key is not None:
                results[i] = self.serial.predict_public(key, participant, step)  # type: ignore[arg-type]
                continue
            # A participant's fits of one label draw from one stream, in the order of the work: one after the other.
            wave = 0
            if isinstance(step, Fit):
                wave = seen[id(participant), step.label] = (
                    seen.get((id(participant), step.label), -1) + 1
                )
            equal: Any = vectorization_key(participant, step)
            try:
                hash(equal)
            except TypeError:  # somebody's own objective: nothing is known to be equal to it
                equal = i
            groups.setdefault((wave, equal), []).append(i)
        for _, members in sorted(groups.items(), key=lambda group: group[0][0]):
            for piece in self._split_by_size(members, work):
                results.update(
                    zip(piece, self._run_vectorized([work[i] for i in piece]), strict=True)
                )
        return [results[i] for i in range(len(work))]

    def _split_by_size(self, members: Sequence[int], work: Work) -> list[Sequence[int]]:
        """On a CPU, groups of equal size whose largest stacked tensor stays within LARGEST."""
        if self.templates.device.type != "cpu":
            return [members]
        participant, step = work[members[0]]
        tensors = [
            t
            for arch in architectures(participant, step)
            for t in self.templates(arch).tensors.values()
        ]
        each = max(t.numel() * t.element_size() for t in tensors)
        return _cut(members, max(2, LARGEST // max(1, each)))

    def _run_vectorized(self, work: Work) -> list[Any]:
        participant, step = work[0]
        family = _vmap_support_key(participant, step)
        if len(work) == 1 or family in self._refused:
            return self.serial.run(work)
        size = (family, getattr(step, "batch_size", 0))
        most = self._most_together.get(size, len(work))
        if len(work) > most:
            return [result for piece in _cut(work, most) for result in self._run_vectorized(piece)]
        uses = [dict(p.stream_uses) for p, _ in work]
        try:
            with warnings.catch_warnings():
                # Where an operation has no batching rule, vmap may loop over the participants: serial is faster.
                warnings.filterwarnings("error", message="There is a performance drop")
                if isinstance(step, Fit):
                    return fit_stacked(work, self.templates)  # type: ignore[arg-type]  # all are fits
                return run_stacked_outputs(work, self.templates)  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            if self.templates.memory.has_copies:
                self.templates.memory.give_up()
            else:
                half = self._most_together[size] = -(-len(work) // 2)
                self._say_once(
                    f"{_names(participant, step)}: {len(work)} participants together do not fit "
                    f"into the memory of {self.templates.device}; at most {half} from here on"
                )
        except (RuntimeError, UserWarning) as refusal:
            self._refused.add(family)
            reason = str(refusal).strip().split("\n")[0].split(". ")[0]
            self._say_once(
                f"{_names(participant, step)} runs one participant after the other: {reason}"
            )
        for (p, _), before in zip(work, uses, strict=True):
            p.stream_uses.clear()
            p.stream_uses.update(before)
        return self._run_vectorized(work)

    def _say_once(self, line: str) -> None:
        if line not in self._explained:
            self._explained.add(line)
            self.say(line)


def _names(participant: Participant, step: Step) -> str:
    return " + ".join(arch.name for arch in architectures(participant, step))


def _cut(members: Sequence[T], most: int) -> list[Sequence[T]]:
    """Cut into pieces of about equal size, of at most so many."""
    count = -(-len(members) // most)
    return [
        members[i * len(members) // count : (i + 1) * len(members) // count] for i in range(count)
    ]


def architectures(participant: Participant, step: Step) -> list[ModelSpec]:
    """Of all models that the step computes with."""
    if isinstance(step, Fit):
        return [participant.arch[slot] for slot in (*step.train, *step.frozen)]
    return [step_model_spec(participant, step)]


def vectorization_key(participant: Participant, step: Step) -> Any:
    """Hashable; equal for steps that may be computed together."""
    if not isinstance(step, Fit):
        x = step.data.columns(participant)["x"]
        plain = [step.readout, step.batch_size, getattr(step, "at_least", None)]
        if not len(x):
            return object()  # nothing to compute, together or alone
        return (type(step), step_model_spec(participant, step), *plain, _tree_structure(x[:0]))
    data: Any
    if isinstance(step.data, SampledBatches):
        rows = data = step.data.size
    else:
        columns = step.data.columns(participant)
        rows = len(next(iter(columns.values())))
        data = _tree_structure({name: column[:0] for name, column in columns.items()})
    kept = participant.state.get("optimizers", {}).get(step.keep, {}) if step.keep else {}
    steps = tuple(
        (k, *((n, float(v) if n == "step" else None) for n, v in s.items()))
        for k, s in kept.items()
    )
    count = step_count(rows, step, participant.step_share) if step.anneal else None
    plain = [
        getattr(step, name)
        for name in ("epochs", "steps", "batch_size", "optimizer", "augment", "anneal")
    ]
    beside = tuple((name, draws.size) for name, draws in step.extra_batches.items())
    trees = (_tree_structure(step.context), _tree_structure(step.drift))
    return (
        _vmap_support_key(participant, step),
        *plain,
        step.keep,
        step.label,
        data,
        steps,
        count,
        beside,
        trees,
    )


def _vmap_support_key(participant: Participant, step: Step) -> Any:
    """What decides whether vmap can take a step."""
    if not isinstance(step, Fit):
        return type(step), step_model_spec(participant, step), step.readout
    archs = tuple((s, participant.arch[s]) for s in (*step.train, *step.frozen))
    return Fit, archs, tuple(step.train.items()), step.objective, tuple(step.extra_batches)


def _tree_structure(tree: Any) -> Any:
    """Names, shapes and dtypes of a tree of tensors; anything else stands for itself."""
    if isinstance(tree, Mapping):
        return tuple((k, _tree_structure(v)) for k, v in sorted(tree.items()))
    return ("tensor", tuple(tree.shape), tree.dtype) if isinstance(tree, Tensor) else tree


def make_backend(
    memory: DeviceMemory,
    chunk: int = 1,
    precision: str = "float32",
    say: Callable[[str], None] = lambda line: None,
) -> Backend:
    """Return a backend for chunks of so many clients.

    Args:
        memory: Of the device that computes.
        chunk: Clients that are computed together; 1: one step after the other.
        precision: Of training.
        say: Called with a line for each architecture that cannot be vectorized.
    """
    if chunk == 1:
        return SerialBackend(memory, precision)
    return VectorizedBackend(memory, say, precision)
