"""DP-SGD, and a backend that adds noise to the results of all steps on private rows.

A step (`hetero_fl.core.plan.Step`) is one operation in the plan of a method, such as a `Fit`. A fit
consists of many training steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from typing_extensions import override

from hetero_fl.config.protection import PrivacyConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import Batch, ModelViews
from hetero_fl.core.participant import Columns, Participant, select_part
from hetero_fl.core.plan import ClassSums, Fit, Predict, Rows, SampledBatches, Step
from hetero_fl.data.federated_data import PUBLIC
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import Backend, DivergedError, Work
from hetero_fl.engine.serial import class_sums, convert_output
from hetero_fl.engine.templates import Templates
from hetero_fl.engine.training import MASK, Batches, FitState, TrainableTensors, run_fit, split_name
from hetero_fl.engine.vectorized_training import (
    TRIAL_RATE,
    StackedOps,
    check_trial,
    strict_vmap,
    trial_value,
)
from hetero_fl.privacy.accounting import PrivacyCharge
from hetero_fl.privacy.noise import NoiseSource
from hetero_fl.utils.errors import UserError
from model_zoo.generators import keyed_generators

# Maximum size in bytes of the per-example gradients that are computed at a time.
MEMORY = 64 * 2**20
# Difference between the dropout seeds of consecutive examples in a training step.
ROW_KEY_STRIDE = 0x85EBCA6B


def sampling_plan(n: int, fit: Fit, rate: float | None = None) -> tuple[float, int]:
    """Return the sampling rate and the number of steps of a private fit.

    Args:
        n: Number of rows.
        fit: Settings of the fit. An epoch consists of round(1 / rate) training steps.
        rate: Sampling rate. If None, the batch size divided by `n` is used.

    Returns:
        The sampling rate and the number of training steps, which is at least 1.

    Example:
        >>> from hetero_fl.core.objectives import Supervised
        >>> from hetero_fl.core.plan import Fit
        >>> from hetero_fl.privacy.dp_sgd import sampling_plan
        >>> sampling_plan(200, Fit({"model": None}, Supervised(), epochs=3, batch_size=20))
        (0.1, 30)
    """
    rate = rate or min(fit.batch_size, n) / n
    steps = fit.steps if fit.steps is not None else fit.epochs * round(1 / rate)
    return rate, max(1, steps)


class PoissonBatches(Batches):
    """Poisson-sampled batches, which contain each row independently with probability `rate`.

    Args:
        participant: Client whose rows are sampled.
        fit: Fit that uses the batches.
        memory: Device to which batches are copied.
        noise: Source of random numbers.
        rate: Sampling rate. If None, the batch size divided by the number of rows is used.
    """

    def __init__(
        self,
        participant: Participant,
        fit: Fit,
        memory: DeviceMemory,
        noise: NoiseSource,
        rate: float | None = None,
    ) -> None:
        assert not isinstance(fit.data, SampledBatches)
        self.noise = noise
        self.rate = rate
        super().__init__(participant, fit, memory)
        self.examples = round(self.expected * self.count)

    def _draw_indices(self, n: int) -> list[Tensor]:
        rate, steps = sampling_plan(n, self.fit, self.rate)
        self.expected = rate * n
        stream = self.noise.stream(*self.stream, "sample")
        return [(stream.uniform(n) < rate).nonzero().squeeze(1) for _ in range(steps)]

    @override
    def augment_batch(self, x: Tensor, i: int) -> Tensor:
        return super().augment_batch(x, i) if len(x) else x


class PrivateGradients:
    """DP-SGD gradients for `run_fit` (Abadi et al. 2016, Algorithm 1), for any objective.

    Per-example gradients are clipped and summed. Noise is added to the sum, which is then divided
    by the expected batch size. Gradients of terms of the objective that do not depend on private
    rows are not clipped. For large models and models that `vmap` does not support, the gradients
    are computed row by row.

    Args:
        clip: Clipping norm of per-example gradients.
        z: Noise multiplier.
        noise: Source of noise.
        rate: Sampling rate. If None, the batch size divided by the number of rows is used.
    """

    def __init__(
        self, clip: float, z: float, noise: NoiseSource, rate: float | None = None
    ) -> None:
        self.clip = clip
        self.z = z
        self.noise = noise
        self.rate = rate
        self._unsupported: set[Any] = set()
        # Keys of the models and objectives whose vectorized gradients have been compared.
        self._tried: set[Any] = set()

    def batches(self, participant: Participant, fit: Fit, memory: DeviceMemory) -> PoissonBatches:
        """Return the Poisson-sampled batches of a fit."""
        return PoissonBatches(participant, fit, memory, self.noise, self.rate)

    def compute(self, state: FitState, step: int, dropout_key: int, batch: Batch) -> Tensor:
        """Set the gradients of the trainable parameters.

        The gradients are (Σ g_i + N(0, (z·clip)²)) / B + g_public, where g_i are the clipped
        gradients of the rows, B is the expected batch size, and g_public is the gradient of the
        terms of the objective that do not depend on private rows.

        Args:
            state: State of the fit.
            step: Index of the training step.
            dropout_key: Seed of the dropout masks in this training step.
            batch: Poisson-sampled batch, which may be empty.

        Returns:
            A loss of 0, because the true loss has no noise and must not be released.
        """
        assert isinstance(state.batches, PoissonBatches)
        total = self._clipped_sum(state, dropout_key, batch)
        stream = self.noise.stream(*state.batches.stream, "noise", step)
        for name, parameter in state.trainable.items():
            parameter.grad = None
            noise = stream.normal(parameter, self.z * self.clip)
            total[name].add_(noise).div_(state.batches.expected)
        if state.has_dropout:
            state.dropout.seed([dropout_key])
        public = state.fit.objective.public_loss(state.nets, batch, state.context)
        public = public + state.fit.objective.penalty(state.nets, state.context)
        if isinstance(public, Tensor) and public.requires_grad:
            public.backward()
        for name, parameter in state.trainable.items():
            parameter.grad = (
                total[name] if parameter.grad is None else parameter.grad.add_(total[name])
            )
        return torch.zeros((), device=next(iter(total.values())).device)

    def _clipped_sum(self, state: FitState, dropout_key: int, batch: Batch) -> TrainableTensors:
        columns = {n: t for n, t in batch.items() if n in state.batches.columns}
        extra = {n: t for n, t in batch.items() if n not in columns}
        count = len(next(iter(columns.values())))
        keys = [(dropout_key + (i + 1) * ROW_KEY_STRIDE) & MASK for i in range(count)]
        total = {
            name: torch.zeros_like(p, requires_grad=False) for name, p in state.trainable.items()
        }
        bytes_per_row = sum(p.numel() * p.element_size() for p in state.trainable.values())
        size = max(1, MEMORY // max(1, bytes_per_row))
        # Whether vmap supports a fit depends on the models and the objective.
        support_key = (tuple(map(id, state.modules.values())), repr(state.fit.objective))
        for begin in range(0, count, size):
            part = {n: t[begin : begin + size] for n, t in columns.items()}
            part_keys = keys[begin : begin + size]
            if len(part_keys) > 1 and support_key not in self._unsupported:
                try:
                    if support_key not in self._tried:
                        _check_stacking(state, part, extra, part_keys)
                        self._tried.add(support_key)
                    self._add_clipped(total, _gradients_vectorized(state, part, extra, part_keys))
                    continue
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, UserWarning):
                    # vmap does not support an operation of the model, or ignores its hooks.
                    self._unsupported.add(support_key)
            for i, key in enumerate(part_keys):
                row = {n: t[i : i + 1] for n, t in part.items()}
                self._add_clipped(total, _gradient_of_row(state, row, extra, key))
        return total

    @torch.no_grad()
    def _add_clipped(self, total: TrainableTensors, each: TrainableTensors) -> None:
        """Clip per-example gradients `[rows, …]` and add their sum to `total`.

        The gradients of a row are clipped by their norm over all tensors.
        """
        squares = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in each.values()]).sum(0)
        factor = (self.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        is_finite = squares.isfinite()
        if not bool(is_finite.all()):
            # Rows with infinite gradients would abort the fit, which reveals their presence.
            factor = factor.where(is_finite, 0)
            each = {n: g.nan_to_num(0.0, 0.0, 0.0) for n, g in each.items()}
        for name, gradients in each.items():
            total[name].add_(torch.tensordot(factor.to(gradients), gradients, 1))


def _check_stacking(
    state: FitState, columns: Mapping[str, Tensor], extra: Mapping[str, Tensor], keys: list[int]
) -> None:
    """Check that user-defined code has the same gradient for a row in a stack and alone.

    Raises:
        RuntimeError: If the gradients of the first row differ, or the code draws from the
            generators of NumPy or Python, which all rows would share.
    """
    is_own = any(template.arch.is_user_defined for template in state.modules.values())
    if not is_own and not state.fit.objective.is_user_defined:
        return
    rows = [{n: t[:count] for n, t in columns.items()} for count in (1, 2)]
    parameters = list(state.trainable.values())
    before = [p.detach().clone() for p in parameters]
    try:
        # Draws of the trial must not change those of the fit.
        with keyed_generators(0, parameters[0].device), strict_vmap():
            for p in parameters:
                p.data.copy_(trial_value(p.data))
            each = _gradients_vectorized(state, rows[1], extra, keys[:2])
            alone = _gradient_of_row(state, rows[0], extra, keys[0])
        moved = [
            [p.data - TRIAL_RATE * gradients[n][0] for n, p in state.trainable.items()]
            for gradients in (each, alone)
        ]
    finally:
        for p, values in zip(parameters, before, strict=True):
            p.data.copy_(values)
    check_trial(*moved)


def _gradients_vectorized(
    state: FitState,
    columns: Mapping[str, Tensor],
    extra_batch: Mapping[str, Tensor],
    keys: list[int],
) -> TrainableTensors:
    """Return the gradients of all rows, `[rows, …]`, computed with `vmap`.

    Each row has separate leaf tensors, as in `hetero_fl.engine.vectorized_training`.
    """
    device = next(iter(state.trainable.values())).device
    leaves = {
        name: p.detach().expand(len(keys), *p.shape).requires_grad_()
        for name, p in state.trainable.items()
    }
    fixed = {
        slot: {n: t.detach() for n, t in template.tensors.items() if f"{slot}:{n}" not in leaves}
        for slot, template in state.modules.items()
    }

    if state.has_dropout:
        state.dropout.seed(keys)

    def loss(trainable: TrainableTensors, row: Mapping[str, Tensor], index: Tensor) -> Tensor:
        tensors = {slot: dict(rest) for slot, rest in fixed.items()}
        for name, tensor in trainable.items():
            slot, parameter = split_name(name)
            tensors[slot][parameter] = tensor
        nets = ModelViews(
            {slot: state.modules[slot].view_of(tensors[slot]) for slot in state.modules}
        )
        batch = Batch({**{n: t[None] for n, t in row.items()}, **extra_batch})
        with StackedOps(), state.dropout.stacked(index):
            return state.fit.objective.private_loss(nets, batch, state.context).mean()

    with warnings.catch_warnings():
        # Without a batching rule for an operation, vmap would loop over the rows.
        warnings.filterwarnings("error", message="There is a performance drop")
        losses = vmap(loss, randomness="error")(
            leaves, dict(columns), torch.arange(len(keys), device=device)
        )
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), gradients, strict=True)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in pairs}


def _gradient_of_row(
    state: FitState, columns: Mapping[str, Tensor], extra_batch: Mapping[str, Tensor], key: int
) -> TrainableTensors:
    """Return the gradients of a single row, `[1, …]`."""
    if state.has_dropout:
        state.dropout.seed([key])
    batch = Batch({**columns, **extra_batch})
    loss = state.fit.objective.private_loss(state.nets, batch, state.context).mean()
    gradients = torch.autograd.grad(loss, list(state.trainable.values()), allow_unused=True)
    pairs = zip(state.trainable.items(), gradients, strict=True)
    return {name: (torch.zeros_like(p) if g is None else g)[None] for (name, p), g in pairs}


# With `privacy.unit: record`, the results of all steps on private rows are noisy: fits use DP-SGD,
# and noise is added to clipped class sums. Any other access to private rows raises an error.

PREDICTS_PRIVATE_ROWS = (
    "privacy.unit=record cannot be combined with a method that predicts private rows"
)
# Returns the columns of a data set, given its name and the preprocessing.
StepData = Callable[[str, Any], Columns]


def is_private(step: Step) -> bool:
    """Return whether a step reads rows that are not public."""
    return isinstance(step.data, Rows) and step.data.name not in PUBLIC


def step_charge(participant: Participant, step: Step, privacy: PrivacyConfig) -> PrivacyCharge:
    """Return the privacy charge of a step on private rows.

    Args:
        participant: Client that runs the step.
        step: A `Fit` or `ClassSums` step.
        privacy: The `privacy` section of the configuration.

    Raises:
        UserError: If the step returns predictions for single rows, which would be useless with
            noise.
    """
    assert isinstance(step.data, Rows)
    n = len(next(iter(step.data.columns(participant).values())))
    if isinstance(step, Fit):
        rate, steps = sampling_plan(n, step, privacy.sample_rate)
        return PrivacyCharge(rate, steps)
    if isinstance(step, ClassSums):
        return PrivacyCharge(1.0, scale=privacy.statistics_noise)
    raise UserError(PREDICTS_PRIVATE_ROWS)


class PrivacyBackend(Backend):
    """Backend that runs steps on private rows with noise and delegates all other steps.

    Args:
        backend: Backend that runs steps on public rows.
        privacy: The `privacy` section of the configuration.
        noise: Source of noise.
        clients: Clients whose plans are run. Their `data` functions are replaced, so that only
            steps can read private rows.
    """

    def __init__(
        self,
        backend: Backend,
        privacy: PrivacyConfig,
        noise: NoiseSource,
        clients: Sequence[Participant],
    ) -> None:
        self.backend = backend
        self.privacy = privacy
        self.noise = noise
        assert not isinstance(privacy.clip, Mapping)
        self._gradients = PrivateGradients(
            privacy.clip, privacy.known_noise_multiplier, noise, privacy.sample_rate
        )
        self._data: dict[str, StepData] = {}
        for client in clients:
            self._data[client.participant_id] = client.data
            client.data = without_private_data(client.data)

    @property
    @override
    def templates(self) -> Templates:
        return self.backend.templates

    @override
    def run(self, work: Work) -> list[Any]:
        public = [(participant, step) for participant, step in work if not is_private(step)]
        results = iter(self.backend.run(public) if public else ())
        return [self._run_private(p, s) if is_private(s) else next(results) for p, s in work]

    def _run_private(self, participant: Participant, step: Step) -> Any:
        participant = replace(participant, data=self._data[participant.participant_id])
        if isinstance(step, ClassSums):
            return self._class_sums(participant, step)
        if not isinstance(step, Fit):
            raise UserError(PREDICTS_PRIVATE_ROWS)
        before = dict(participant.models)
        try:
            report = run_fit(participant, step, self.templates, self._gradients)
        except DivergedError as failure:
            return failure
        for slot in step.train:
            arch, after = participant.arch[slot], participant.models[slot]
            noised = select_part(after, step.train[slot]).keys() & arch.trained_names
            others = {name: t for name, t in after.items() if name not in noised}
            _check_unchanged(arch, before[slot], others)
        # The true loss has no noise and must not be released.
        return replace(report, loss=math.nan)

    def _class_sums(self, participant: Participant, step: ClassSums) -> tuple[Tensor, Tensor]:
        """Return the noisy sum of clipped outputs and the noisy number of rows for each class.

        A row adds a vector v of norm at most C to the sum of its class and 1 to the count. The
        norm of (v/C, 1), and therefore the sensitivity, is at most √2.
        """
        clip = self.privacy.statistics_clip
        classes = participant.task.outputs
        readout = step.readout if step.readout == "features" else "logits"
        predict = Predict(step.slot, step.data, readout, step.batch_size)
        (raw,) = self.backend.run([(participant, predict)])
        values = convert_output(step, raw)
        # A row with infinite outputs would make the sum infinite, which reveals its presence.
        values = values.where(values.norm(dim=-1, keepdim=True).isfinite(), 0)
        values = values * (clip / values.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
        sums, counts = class_sums(values, step.data.columns(participant)["y"], classes)
        key = (*participant.stream("class sums"), "noise")
        deviation = (
            math.sqrt(2) * self.privacy.statistics_noise * self.privacy.known_noise_multiplier
        )
        noisy_counts = counts + self.noise.normal(counts, deviation, *key, "counts")
        noisy_sums = sums + self.noise.normal(sums, deviation * clip, *key, "sums")
        return noisy_sums, noisy_counts.clamp(min=0)


def _check_unchanged(
    arch: ModelSpec, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> None:
    """Check that training has not changed tensors to whose gradients it adds no noise."""
    for name, tensor in after.items():
        if not torch.equal(tensor, before[name]):
            raise UserError(
                f"privacy.unit=record: the forward pass of model {arch.display_name} writes "
                f"'{name}' from private rows without noise; choose a model that changes in "
                "training only by its gradients"
            )


def without_private_data(data: StepData) -> StepData:
    """Wrap a client's data function so that reading a private data set raises a `UserError`."""

    def public_data(name: str, preprocess: Any) -> Columns:
        if name not in PUBLIC:
            raise UserError(
                f"privacy.unit=record cannot be combined with a method that reads '{name}' rows "
                "outside of its steps, as that adds no noise"
            )
        return data(name, preprocess)

    return public_data
