"""Training loop for models of equal architecture, stacked along a client dimension.

Only the forward pass runs under `torch.vmap`. The backward pass and the elementwise optimizer use
stacked tensors `[K, ...]` of K participants, because the loss of a participant depends only on the
participant's own slice. In this module, a step is an optimizer step of a `Fit`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from hetero_fl.core.mapped_tensors import mapped_file
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import Batch, ModelViews
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit, FitReport
from hetero_fl.engine.driver import DivergedError
from hetero_fl.engine.templates import Templates, mixes_rows
from hetero_fl.engine.training import (
    Batches,
    TrainableTensors,
    divergence_error,
    is_trained,
    make_optimizer,
    move_to_device,
)
from model_zoo.generators import generator_hash, keyed_generators


def stack_trees(trees: Sequence[Any]) -> tuple[Any, Any]:
    """Stack the tensors of trees (nested dictionaries) with equal structure.

    Returns:
        The stacked tree, and a tree with the `in_dims` of `torch.vmap`. If all trees contain the
        same tensor, this tensor is not stacked and its dimension is None.
    """
    first = trees[0]
    if isinstance(first, Mapping):
        parts = {k: stack_trees([t[k] for t in trees]) for k in first}
        return {k: p[0] for k, p in parts.items()}, {k: p[1] for k, p in parts.items()}
    if not isinstance(first, Tensor) or all(t is first for t in trees):
        return first, None
    return torch.stack(list(trees)), 0


def select_participants(tree: Any, dims: Any, who: Tensor | slice) -> Any:
    """Select the slices of some participants from a stacked tree.

    Args:
        tree: The stacked tree.
        dims: The dimensions of the tree, from `stack_trees`.
        who: Indices of the participants.
    """
    if isinstance(tree, Mapping):
        return {k: select_participants(v, dims[k], who) for k, v in tree.items()}
    return tree if dims is None else tree[who]


# Minimum number of weights for which a linear layer uses `_Linear`.
MIN_LINEAR_WEIGHTS = 2**14


class StackedOps(TorchFunctionMode):
    """Context manager that replaces `F.linear` by `linear`."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear` with a backward pass that is faster under `torch.vmap`.

    The batching rule of PyTorch returns a transposed gradient of stacked weights, and copying this
    gradient takes as long as computing the gradient. Layers with fewer than `MIN_LINEAR_WEIGHTS`
    weights use `F.linear`, because the overhead of this function would be larger.

    Args:
        x: Inputs, shape `[..., in]`.
        weight: Weights, shape `[out, in]`.
        bias: Bias, shape `[out]`.

    Returns:
        Outputs, shape `[..., out]`.
    """
    if weight.numel() < MIN_LINEAR_WEIGHTS:
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight)
    out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


class _Linear(torch.autograd.Function):
    """The product x Wᵀ, whose weights have a contiguous gradient under `torch.vmap`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], _output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return grad @ weight if needs_x else None, grad.t() @ x if needs_weight else None


def _rows_on(column: Tensor, rows: Tensor) -> Tensor:
    """Return rows of a column, which may be on the CPU, on the device of the indices."""
    return column[rows.to(column.device)].to(rows.device)


class StackedBatches:
    """Batches of equal fits of several participants, stacked to one batch per step.

    Smaller batches of a step are padded with copies of the first row. The copies have weight 0.

    Args:
        runs: The batches of each participant, in descending order of the number of batches. The
            participants that are still training are therefore always a prefix.
    """

    def __init__(self, runs: Sequence[Batches]) -> None:
        self.runs = runs
        self.fit = runs[0].fit
        device = runs[0].device
        self.counts = [run.count for run in runs]
        lengths = torch.tensor([len(b) for run in runs for b in run.indices])
        # Shape [steps of all participants, largest batch].
        table = pad_sequence([b for run in runs for b in run.indices], batch_first=True)
        is_real = torch.arange(table.shape[1]) < lengths[:, None]
        self._sizes = [run.tolist() for run in lengths.split(self.counts)]
        self._starts = (torch.tensor(self.counts).cumsum(0) - torch.tensor(self.counts)).to(device)
        self._table = torch.where(is_real, table, table[:, :1]).to(device)
        self._weights = is_real.to(torch.get_default_dtype()).to(device)
        # Rows of all participants, keyed by column, and whether all participants have the same
        # rows. Mapped rows of several participants are not copied to one tensor.
        self._columns: dict[str, tuple[list[Tensor], bool]] = {}
        for name, first in runs[0].source.items():
            shared = all(run.source[name] is first for run in runs)
            parts = [run.columns[name] for run in (runs[:1] if shared else runs)]
            is_mapped = any(mapped_file(part) is not None for part in parts)
            self._columns[name] = (parts if shared or is_mapped else [torch.cat(parts)], shared)
        n = torch.tensor([len(next(iter(run.source.values()))) for run in runs])
        self._offsets = (n.cumsum(0) - n).to(device)

    def batch_sizes(self, step: int, active: int) -> list[int]:
        """Return the batch sizes of the first `active` participants in a step."""
        return [sizes[step] for sizes in self._sizes[:active]]

    def members(self, who: Tensor | slice) -> Sequence[int]:
        """Return the indices of the selected participants as integers."""
        return range(len(self.runs))[who] if isinstance(who, slice) else who.tolist()

    def dropout_keys(self, step: int, who: Tensor | slice) -> list[int]:
        """Return the dropout key (the seed of the masks) of each selected participant in a step."""
        return [self.runs[i].dropout_key_at(step) for i in self.members(who)]

    def batch_at(
        self, step: int, who: Tensor | slice, sizes: Sequence[int]
    ) -> tuple[Tensors, Tensor | None]:
        """Return the batches of the selected participants in a step.

        Args:
            step: Index of the step, from 0.
            who: Indices of the participants.
            sizes: Batch size of each of these participants.

        Returns:
            The columns, keyed by name, shape `[K, B, ...]` each, and the weights of the rows, shape
            `[K, B]`. If all batch sizes are equal, None is returned instead of the weights.
        """
        members = self.members(who)
        weight = None
        table_rows = self._starts[who] + step
        longest = max(sizes)
        rows = self._table[table_rows, :longest]
        offset_rows = rows + self._offsets[who, None]
        columns = {}
        for name, (parts, shared) in self._columns.items():
            if len(parts) == 1:
                columns[name] = _rows_on(parts[0], rows if shared else offset_rows)
            else:
                own = [_rows_on(parts[i], row) for i, row in zip(members, rows, strict=True)]
                columns[name] = torch.stack(own)
        if min(sizes) < longest:
            weight = self._weights[table_rows, :longest]
        if self.fit.augment is not None:
            for j, (i, size) in enumerate(zip(members, sizes, strict=True)):
                columns["x"][j, :size] = self.runs[i].augment_batch(columns["x"][j, :size], step)
        if self.fit.extra_batches:
            columns |= _stack([self.runs[i].extra_batch(step) for i in members])
        return columns, weight


def _stack(drawn: Sequence[Tensors]) -> Tensors:
    """Stack columns, or raise RuntimeError if the names or dtypes of the columns differ."""
    first = drawn[0]
    for other in drawn:
        if other.keys() != first.keys() or any(other[n].dtype != t.dtype for n, t in first.items()):
            raise RuntimeError("sampled batches with different columns or dtypes cannot be stacked")
    return {n: torch.stack([d[n] for d in drawn]) for n in first}


FitWork = Sequence[tuple[Participant, Fit]]


def fit_stacked(work: FitWork, templates: Templates) -> list[FitReport | DivergedError]:
    """Train models of several participants in place.

    All fits must be equal (see `vectorization_key`).

    Args:
        work: Pairs of participant and fit.
        templates: The modules, keyed by architecture and slot.

    Returns:
        The report of each fit in order. The result of a fit that diverges is a `DivergedError`.

    Raises:
        RuntimeError: If `torch.vmap` does not support the models or the objective. In this case,
            the participants are not changed.
    """
    batches = [Batches(participant, fit, templates.memory) for participant, fit in work]
    order = sorted(range(len(work)), key=lambda i: -batches[i].count)
    try:
        stack = _StackedFits([work[i] for i in order], [batches[i] for i in order], templates)
        with strict_vmap():
            stack.run()
        results = dict(zip(order, stack.finish(), strict=True))
    except RuntimeError:
        for participant, fit in work:
            participant.stream_uses[fit.label] -= 1
        raise
    return [results[i] for i in range(len(work))]


@contextmanager
def strict_vmap() -> Iterator[None]:
    """Raise RuntimeError if `torch.vmap` is slow or gives other results in the `with` block.

    If an operation has no batching rule, `torch.vmap` loops over the participants, which is slower
    than the serial backend. Draws from the generators of NumPy or Python would be equal for all
    participants. Draws from the generator of PyTorch raise an error under `torch.vmap`.
    """
    with warnings.catch_warnings(), keyed_generators(0, brief=True):
        warnings.filterwarnings("error", message="There is a performance drop")
        before = generator_hash()
        try:
            yield
        except UserWarning as warning:
            raise RuntimeError(str(warning)) from warning
        if generator_hash() != before:
            raise RuntimeError("the model or the loss draws from the generators of NumPy or Python")


# Learning rate of a trial step, so large that the gradient dominates the result.
TRIAL_RATE = 100.0
# Relative difference between two computations that rounding does not explain.
TRIAL_TOLERANCE = 0.01


def trial_value(parameter: Tensor) -> Tensor:
    """Return another value of a parameter, without zeros, which would hide the gradients."""
    return parameter * 1.1 + (parameter == 0) * 0.01 * torch.rand_like(parameter)


def check_trial(stacked: Sequence[Tensor], alone: Sequence[Tensor]) -> None:
    """Check that a trial gives the same tensors stacked and alone.

    Under `torch.vmap`, hooks on gradients do not run, and parameters that the forward pass reads
    from a list or a closure are those of another participant.

    Raises:
        RuntimeError: If the tensors differ.
    """
    for one, other in zip(stacked, alone, strict=True):
        if (one.float() - other.float()).norm() > TRIAL_TOLERANCE * other.float().norm():
            raise RuntimeError("its results would differ, for example because of a backward hook")


class _StackedFits:
    """Equal fits in progress, in descending order of the number of steps."""

    def __init__(self, work: FitWork, runs: list[Batches], templates: Templates) -> None:
        self.work = work
        self.fit = work[0][1]
        self.device = templates.device
        self.storage_device = templates.memory.storage_device
        self.batches = StackedBatches(runs)
        first = work[0][0]
        fit = self.fit
        self.templates = {
            slot: templates(first.arch[slot], slot) for slot in (*fit.train, *fit.frozen)
        }
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for slot, template in self.templates.items():
            template.module.train(slot in fit.train)
            self.tensors[slot] = template.stack([p.models[slot] for p, _ in work])
        self.trained = {
            f"{s}:{n}": (s, n)
            for s, template in self.templates.items()
            for n in template.parameters
            if is_trained(fit, s, n)
        }
        # Padding would change the outputs for other rows, so only equal sizes are stacked.
        self.equal_sizes = fit.objective.needs_whole_batches or any(
            mixes_rows(first.arch[slot], slot in fit.train) for slot in self.templates
        )
        self.dropout = templates.dropout
        self.has_dropout = any(t.has_dropout for t in self.templates.values())
        context, self.context_dims = stack_trees([f.context for _, f in work])
        self.context = move_to_device(templates.memory, context)
        self.drift = {
            key: templates.memory.stack([f.drift[s][n] for _, f in work]).to(self.tensors[s][n])
            for key, (s, n) in self.trained.items()
            if n in fit.drift.get(s, {})
        }
        self.totals = torch.zeros(len(work), device=self.device)
        # Tensors of the participants that are still training, and the trained ones among them.
        self.active_tensors: dict[str, dict[str, Tensor]] = {}
        self.leaves: TrainableTensors = {}
        self.optimizer: torch.optim.Optimizer

    def run(self) -> None:
        """Compute all steps of all fits."""
        fit = self.fit
        active = 0
        for step in range(self.batches.counts[0]):
            remaining = sum(count > step for count in self.batches.counts)
            if remaining != active:
                self._narrow(remaining)
                active = remaining
            self._gradients(step, active)
            if fit.optimizer.clip_norm:
                self._clip(fit.optimizer.clip_norm)
            self.optimizer.step()
            if self.drift:
                moved = [self.leaves[key].detach() for key in self.drift]
                torch._foreach_add_(
                    moved, [d[:active] for d in self.drift.values()], alpha=-fit.optimizer.lr
                )

    def _narrow(self, active: int) -> None:
        """Restrict training to the first `active` participants, without copying tensors."""
        old = self.leaves
        self.active_tensors = {
            s: {n: t[:active].detach() for n, t in own.items()} for s, own in self.tensors.items()
        }
        self.leaves = {
            key: self.active_tensors[s][n].requires_grad_() for key, (s, n) in self.trained.items()
        }
        optimizer = make_optimizer(self.fit.optimizer, self.leaves)
        for key, leaf in old.items():
            if leaf in self.optimizer.state:
                optimizer.state[self.leaves[key]] = {
                    n: v[:active] if isinstance(v, Tensor) and v.ndim else v
                    for n, v in self.optimizer.state[leaf].items()
                }
        self.optimizer = optimizer

    def _gradients(self, step: int, active: int) -> None:
        """Set the gradients of the leaf tensors, and add the losses to the totals."""
        for leaf in self.leaves.values():
            leaf.grad = None
        sizes = self.batches.batch_sizes(step, active)
        if not self.equal_sizes or len(set(sizes)) == 1:
            self._backward(step, slice(0, active), sizes, self.active_tensors)
            return
        for size in sorted(set(sizes)):
            who = torch.tensor([i for i, s in enumerate(sizes) if s == size], device=self.device)
            tensors = {
                s: {n: t.index_select(0, who) for n, t in own.items()}
                for s, own in self.active_tensors.items()
            }
            self._backward(step, who, [size] * len(who), tensors)
            # The selection has copied the buffers, so their new values are written back.
            for s in self.fit.train:
                for n in tensors[s].keys() - self.templates[s].parameters.keys():
                    self.tensors[s][n][who] = tensors[s][n]

    def _backward(
        self, step: int, who: Tensor | slice, sizes: Sequence[int], tensors: Mapping[str, Any]
    ) -> None:
        """Compute the losses of the selected participants and the gradients of leaf tensors."""
        columns, weight = self.batches.batch_at(step, who, sizes)
        if self.has_dropout:
            self.dropout.seed(self.batches.dropout_keys(step, who), self.fit.batch_size)
        participant_idx = torch.arange(len(sizes), device=self.device)
        context = select_participants(self.context, self.context_dims, who)
        dims = (0, 0, 0, self.context_dims, None if weight is None else 0)
        losses = vmap(self._loss, dims, randomness="error")(
            tensors, columns, participant_idx, context, weight
        )
        losses.sum().backward()
        self.totals[who] += losses.detach()

    def _loss(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        columns: Mapping[str, Tensor],
        participant_idx: Tensor,
        context: Mapping[str, Any],
        weight: Tensor | None,
    ) -> Tensor:
        """Return the loss of one participant, as the function to which vmap is applied."""
        nets = ModelViews(
            {slot: self.templates[slot].view_of(own) for slot, own in tensors.items()}
        )
        batch = Batch(columns)
        batch.weight = weight
        with StackedOps(), self.dropout.stacked(participant_idx):
            return self.fit.objective.total_loss(nets, batch, context)

    def _clip(self, norm: float) -> None:
        """Clip the gradient norm of each participant, as `torch.nn.utils.clip_grad_norm_` does."""
        grads = [leaf.grad for leaf in self.leaves.values() if leaf.grad is not None]
        each = torch.stack([torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in grads])
        factor = (norm / (torch.linalg.vector_norm(each, dim=0) + 1e-6)).clamp(max=1.0)
        for g in grads:
            g.mul_(factor.view(-1, *[1] * (g.ndim - 1)))

    def finish(self) -> list[FitReport | DivergedError]:
        """Update the participants and return the results in the order of the work."""
        trained = [self.tensors[s][n] for s, n in self.trained.values()]
        norms = [torch.linalg.vector_norm(t.reshape(len(t), -1), dim=1) for t in trained]
        finite = torch.stack([self.totals.to(norms[0]), *norms]).isfinite().all(0).tolist()
        totals = self.totals.tolist()
        for slot in self.fit.train:
            if written := self.templates[slot].written_attributes():
                raise RuntimeError(f"its forward pass changes '{min(written)}'")
        tensors = {
            s: {n: t.to(self.storage_device) for n, t in self.tensors[s].items()}
            for s in self.fit.train
        }
        # The participants are changed last, because a fit that runs out of memory is repeated.
        models = [
            {s: {n: t[i].clone() for n, t in own.items()} for s, own in tensors.items()}
            for i in range(len(self.work))
        ]
        results: list[FitReport | DivergedError] = []
        for i, (participant, fit) in enumerate(self.work):
            steps = self.batches.counts[i]
            if not finite[i]:
                results.append(divergence_error(fit, totals[i] / steps))
                continue
            participant.models.update(models[i])
            results.append(FitReport(steps, self.batches.runs[i].examples, totals[i] / steps))
        return results
