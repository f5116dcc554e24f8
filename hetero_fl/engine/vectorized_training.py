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
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import Batch, ModelViews
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit, FitReport
from hetero_fl.engine.batches import Batches
from hetero_fl.engine.driver import DivergedError
from hetero_fl.engine.templates import Templates, mixes_rows
from hetero_fl.engine.training import (
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


def stack_batches(batches: Sequence[Batch]) -> tuple[Tensors, Tensor | None]:
    """Stack the batches of several participants.

    Shorter batches are padded with copies of their first row. The copies have weight 0.

    Returns:
        The columns, keyed by name, shape `[K, B, ...]` each, and the weights of the rows, shape
        `[K, B]`. If all batches have the same size, None is returned instead of the weights.

    Raises:
        RuntimeError: If the names or dtypes of the columns differ.
    """
    dtypes = [{name: tensor.dtype for name, tensor in batch.items()} for batch in batches]
    if any(other != dtypes[0] for other in dtypes):
        raise RuntimeError("batches with different columns or dtypes cannot be stacked")
    columns: Tensors = {}
    for name in dtypes[0]:
        parts = [batch[name] for batch in batches]
        longest = max(map(len, parts))
        columns[name] = torch.stack([_pad(rows, longest) for rows in parts])
    sizes = [_num_rows(batch) for batch in batches]
    if min(sizes) == max(sizes):
        return columns, None
    weight = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    return columns, weight.to(parts[0].device, torch.get_default_dtype())


def _num_rows(batch: Batch) -> int:
    # The columns of extra batches, which may have other sizes, come last.
    return len(next(iter(batch.values())))


def _pad(rows: Tensor, size: int) -> Tensor:
    """Append copies of the first row."""
    if len(rows) == size:
        return rows
    return torch.cat([rows, rows[:1].expand(size - len(rows), *rows.shape[1:])])


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
        self.runs = runs
        self.counts = [run.count for run in runs]
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
        iterators = [iter(run) for run in self.runs]
        for step in range(self.counts[0]):
            remaining = sum(count > step for count in self.counts)
            if remaining != active:
                self._narrow(remaining)
                active = remaining
            self._gradients([next(iterator) for iterator in iterators[:active]])
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

    def _gradients(self, drawn: Sequence[tuple[int, Batch]]) -> None:
        """Set the gradients of the leaf tensors, and add the losses to the totals.

        Args:
            drawn: Dropout key and batch of each participant that is still training.
        """
        for leaf in self.leaves.values():
            leaf.grad = None
        sizes = [_num_rows(batch) for _, batch in drawn]
        if not self.equal_sizes or len(set(sizes)) == 1:
            self._backward(slice(0, len(drawn)), drawn, self.active_tensors)
            return
        for size in sorted(set(sizes)):
            members = [i for i, s in enumerate(sizes) if s == size]
            who = torch.tensor(members, device=self.device)
            tensors = {
                s: {n: t.index_select(0, who) for n, t in own.items()}
                for s, own in self.active_tensors.items()
            }
            self._backward(who, [drawn[i] for i in members], tensors)
            # The selection has copied the buffers, so their new values are written back.
            for s in self.fit.train:
                for n in tensors[s].keys() - self.templates[s].parameters.keys():
                    self.tensors[s][n][who] = tensors[s][n]

    def _backward(
        self,
        who: Tensor | slice,
        drawn: Sequence[tuple[int, Batch]],
        tensors: Mapping[str, Any],
    ) -> None:
        """Compute the losses of the selected participants and the gradients of leaf tensors."""
        columns, weight = stack_batches([batch for _, batch in drawn])
        if self.has_dropout:
            self.dropout.seed([key for key, _ in drawn], self.fit.batch_size)
        participant_idx = torch.arange(len(drawn), device=self.device)
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
            steps = self.counts[i]
            if not finite[i]:
                results.append(divergence_error(fit, totals[i] / steps))
                continue
            participant.models.update(models[i])
            results.append(FitReport(steps, self.runs[i].examples, totals[i] / steps))
        return results
