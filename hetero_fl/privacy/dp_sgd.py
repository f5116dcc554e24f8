"""DP-SGD, and the guard around steps that read private rows."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.core.objectives import Batch, ModelViews
from hetero_fl.core.participant import Columns, Participant
from hetero_fl.core.plan import ClassSums, Fit, Predict, Rows, SampledBatches, Step
from hetero_fl.data.federated_data import PUBLIC
from hetero_fl.engine.batches import MASK, Batches
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import Backend, DivergedError, Work
from hetero_fl.engine.serial import class_sums, select_output
from hetero_fl.engine.templates import Templates
from hetero_fl.engine.training import FitState, TrainableTensors, run_fit, split_name
from hetero_fl.engine.vectorized_training import StackedOps
from hetero_fl.privacy.accounting import PrivacyCharge
from hetero_fl.privacy.mechanisms import NoiseSource
from hetero_fl.utils.errors import UserError
from model_zoo import Outputs

# DP-SGD: gradients of single examples, clipped, summed and noised (Abadi et al. 2016, Algorithm 1),
# for any objective.
#
# Each step sees a Poisson sample of the rows; the sum is divided by the expected number, never by
# the number that came. What reads no private row is not clipped: the objective's penalty, and what
# it makes of columns drawn beside the rows.

# bytes of single gradients at a time; a model of which that holds one alone runs row by row
MEMORY = 64 * 2**20
ROW_KEY_STRIDE = 0x85EBCA6B  # between the dropout keys of one step's examples


def sampling_plan(
    n: int, fit: Fit, work: float = 1.0, rate: float | None = None
) -> tuple[float, int]:
    """(q, steps) of a private fit on n rows: q = batch / n unless given, and an epoch is round(1 / q) steps."""
    rate = rate or min(fit.batch_size, n) / n
    steps = fit.steps if fit.steps is not None else fit.epochs * round(1 / rate)
    return rate, max(1, int(steps * work))


class PoissonBatches(Batches):
    """Each step takes each row with probability q, on its own."""

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

    def _draw_indices(self, n: int, work: float) -> list[Tensor]:
        rate, steps = sampling_plan(n, self.fit, work, self.rate)
        self.expected = rate * n
        draws = self.noise.stream(*self.stream, "sample")
        return [(draws.uniform(n) < rate).nonzero().squeeze(1) for _ in range(steps)]

    def augment_batch(self, x: Tensor, i: int) -> Tensor:
        return super().augment_batch(x, i) if len(x) else x


class PrivateGradients:
    """Gradients for `run_fit` of which no row can be read: noise of z·clip on their sum.

    Models that `vmap` refuses, and large ones, are run row by row.
    """

    def __init__(
        self, clip: float, z: float, noise: NoiseSource, rate: float | None = None
    ) -> None:
        self.clip = clip
        self.z = z
        self.noise = noise
        self.rate = rate
        self._refused: set[Any] = set()

    def batches(self, participant: Participant, fit: Fit, memory: DeviceMemory) -> PoissonBatches:
        return PoissonBatches(participant, fit, memory, self.noise, self.rate)

    def compute(self, state: FitState, step: int, dropout_key: int, batch: Batch) -> Tensor:
        """(Σ clipped + N(0, (z·clip)²)) / expected, and the gradient of what is public. The loss would be a release: 0."""
        assert isinstance(state.batches, PoissonBatches)
        total = self._clipped_sum(state, dropout_key, batch)
        draws = self.noise.stream(*state.batches.stream, "noise", step)
        for name, parameter in state.trainable.items():
            parameter.grad = None
            total[name].add_(draws.normal(parameter, self.z * self.clip)).div_(
                state.batches.expected
            )
        if state.uses_dropout:
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

    def _clipped_sum(self, live: FitState, dropout_key: int, batch: Batch) -> TrainableTensors:
        columns = {n: t for n, t in batch.items() if n in live.batches.columns}
        beside = {n: t for n, t in batch.items() if n not in columns}
        count = len(next(iter(columns.values())))
        keys = [(dropout_key + (i + 1) * ROW_KEY_STRIDE) & MASK for i in range(count)]
        total = {
            name: torch.zeros_like(p, requires_grad=False) for name, p in live.trainable.items()
        }
        one = sum(p.numel() * p.element_size() for p in live.trainable.values())
        size = max(1, MEMORY // max(1, one))
        family = _vmap_support_key(live)
        for begin in range(0, count, size):
            part = {n: t[begin : begin + size] for n, t in columns.items()}
            some = keys[begin : begin + size]
            if len(some) > 1 and family not in self._refused:
                try:
                    self._add_clipped(total, _gradients_vectorized(live, part, beside, some))
                    continue
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, UserWarning):  # no rule under vmap
                    self._refused.add(family)
            for i, key in enumerate(some):
                self._add_clipped(
                    total,
                    _gradient_of_row(live, {n: t[i : i + 1] for n, t in part.items()}, beside, key),
                )
        return total

    @torch.no_grad()
    def _add_clipped(self, total: TrainableTensors, each: TrainableTensors) -> None:
        """Clip gradients `[rows, …]`, over all that is trained together, and add them up."""
        squares = torch.stack([g.flatten(1).square().sum(1) for g in each.values()]).sum(0)
        factor = (self.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        if not bool(
            (here := squares.isfinite()).all()
        ):  # such a row would end the fit, and so tell of itself: it counts nought
            factor = factor.where(here, 0)
            each = {n: g.where(_broadcast_rows(here, g), 0) for n, g in each.items()}
        for name, gradients in each.items():
            if len(factor) == 1:
                total[name].add_(gradients[0] * factor[0])
            else:
                total[name].add_(torch.tensordot(factor.to(gradients), gradients, 1))


def _gradients_vectorized(
    live: FitState,
    columns: Mapping[str, Tensor],
    extra_batch: Mapping[str, Tensor],
    keys: list[int],
) -> TrainableTensors:
    """Gradients of all rows, `[rows, …]`, in one computation: each has a leaf of its own (see vectorized_training.py)."""
    device = next(iter(live.trainable.values())).device
    leaves = {
        name: p.detach().expand(len(keys), *p.shape).requires_grad_()
        for name, p in live.trainable.items()
    }
    fixed = {
        slot: {n: t.detach() for n, t in template.tensors.items() if f"{slot}:{n}" not in leaves}
        for slot, template in live.modules.items()
    }

    if live.uses_dropout:
        live.dropout.seed(keys)

    def loss(own: TrainableTensors, row: Mapping[str, Tensor], place: Tensor) -> Tensor:
        tensors = {slot: dict(rest) for slot, rest in fixed.items()}
        for name, tensor in own.items():
            slot, parameter = split_name(name)
            tensors[slot][parameter] = tensor
        nets = ModelViews(
            {slot: live.modules[slot].view_of(tensors[slot]) for slot in live.modules}
        )
        batch = Batch({**{n: t[None] for n, t in row.items()}, **extra_batch})
        with StackedOps(), live.dropout.stacked(place):
            return live.fit.objective.private_loss(nets, batch, live.context).sum()

    with warnings.catch_warnings():
        # Where an operation has no batching rule, vmap may loop over the rows.
        warnings.filterwarnings("error", message="There is a performance drop")
        losses = vmap(loss, randomness="error")(
            leaves, dict(columns), torch.arange(len(keys), device=device)
        )
    found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in pairs}


def _gradient_of_row(
    live: FitState, columns: Mapping[str, Tensor], extra_batch: Mapping[str, Tensor], key: int
) -> TrainableTensors:
    """The gradient of one row, `[1, …]`, on the live modules."""
    if live.uses_dropout:
        live.dropout.seed([key])
    loss = live.fit.objective.private_loss(
        live.nets, Batch({**columns, **extra_batch}), live.context
    ).sum()
    found = torch.autograd.grad(loss, list(live.trainable.values()), allow_unused=True)
    pairs = zip(live.trainable.items(), found, strict=True)
    return {name: (torch.zeros_like(p) if g is None else g)[None] for (name, p), g in pairs}


def _broadcast_rows(rows: Tensor, like: Tensor) -> Tensor:
    """`[rows]` in a shape that broadcasts against `[rows, …]`."""
    return rows.reshape(-1, *[1] * (like.ndim - 1))


def _vmap_support_key(live: FitState) -> Any:
    """What decides whether vmap can take a fit."""
    return tuple(map(id, live.modules.values())), repr(live.fit.objective)


# The steps of a client's plan that read its private rows, where records are to stay private: a
# guard around the backend.
#
# Whatever such a step gives back has noise on it: fits are DP-SGD, class sums are clipped and
# noised. Each is charged. Nothing else may read these rows: predictions on them are refused, and so
# is reading them between the steps.

StepData = Callable[[str, Any], Columns]


def is_private(step: Step) -> bool:
    """Whether a step reads rows that are not public."""
    return isinstance(step.data, Rows) and step.data.name not in PUBLIC


def step_charge(participant: Participant, step: Step, privacy: PrivacyConfig) -> PrivacyCharge:
    """What a private step costs. Raises UserError for a prediction: a row's own output cannot be noised and be of use."""
    n = len(next(iter(step.data.columns(participant).values())))  # type: ignore[union-attr]  # it is on Rows
    if isinstance(step, Fit):
        rate, steps = sampling_plan(n, step, participant.step_share, privacy.sample_rate)
        return PrivacyCharge(rate, steps)
    if isinstance(step, ClassSums):
        return PrivacyCharge(1.0, scale=privacy.statistics_noise)
    raise UserError("predicts on private rows, one by one")


class PrivacyLedger:
    """Hands every step on, and notes what private ones cost. Around a dry backend: the price of a plan in ε."""

    def __init__(self, backend: Backend, privacy: PrivacyConfig) -> None:
        self.backend = backend
        self.privacy = privacy
        self.charges: dict[str, list[PrivacyCharge]] = defaultdict(list)

    @property
    def templates(self) -> Templates:
        """The other's."""
        return self.backend.templates

    def run(self, work: Work) -> list[Any]:
        """The results in order."""
        self._record(work)
        return self.backend.run(work)

    def _record(self, work: Work) -> None:
        for participant, step in work:
            if is_private(step):
                self.charges[participant.participant_id].append(
                    step_charge(participant, step, self.privacy)
                )


class PrivacyBackend(PrivacyLedger):
    """Performs private steps with noise, hands the others on.

    Args:
        clients: whose plans are carried out. Their private rows are readable from now on inside of steps only.
    """

    def __init__(
        self,
        backend: Backend,
        privacy: PrivacyConfig,
        noise: NoiseSource,
        clients: Sequence[Participant],
    ) -> None:
        super().__init__(backend, privacy)
        self.noise = noise
        assert not isinstance(privacy.clip, Mapping)
        self._gradients = PrivateGradients(
            privacy.clip, privacy.known_noise_multiplier, noise, privacy.sample_rate
        )
        self._data: dict[str, StepData] = {}
        for client in clients:
            self._data[client.participant_id] = client.data
            client.data = without_private_data(client.data)

    def run(self, work: Work) -> list[Any]:
        inside = [
            (replace(p, data=self._data[p.participant_id]) if is_private(s) else p, s)
            for p, s in work
        ]
        self._record(inside)
        public = [i for i, (_, step) in enumerate(work) if not is_private(step)]
        found = self.backend.run([work[i] for i in public]) if public else []
        results = dict(zip(public, found, strict=True))
        for i, (participant, step) in enumerate(inside):
            if i not in results:
                results[i] = self._run_private(participant, step)
        return [results[i] for i in range(len(work))]

    def _run_private(self, participant: Participant, step: Step) -> Any:
        if isinstance(step, ClassSums):
            return self._class_sums(participant, step)
        assert isinstance(step, Fit)
        try:
            report = run_fit(participant, step, self.templates, self._gradients)
        except DivergedError as failure:
            return failure
        return replace(report, loss=math.nan)  # nobody noised it

    def _class_sums(self, participant: Participant, step: ClassSums) -> tuple[Tensor, Tensor]:
        """A row adds a vector of norm up to C to its class's sum and one to its count: (v/C, 1) has a norm up to √2."""
        clip = self.privacy.statistics_clip
        classes = participant.task.outputs
        of = step.readout if step.readout == "features" else "logits"
        asked = Predict(step.slot, step.data, of, step.batch_size)
        (raw,) = self.backend.run([(participant, asked)])
        values = select_output(step, Outputs(logits=raw, features=raw))
        values = values.where(
            values.norm(dim=-1, keepdim=True).isfinite(), 0
        )  # else one row could spoil the sum, and tell
        values = values * (clip / values.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
        sums, counts = class_sums(values, step.data.columns(participant)["y"], classes)
        draws = (*participant.stream("class sums"), "noise")
        deviation = (
            math.sqrt(2) * self.privacy.statistics_noise * self.privacy.known_noise_multiplier
        )
        noised = counts + self.noise.normal(counts, deviation, *draws, "counts")
        return sums + self.noise.normal(sums, deviation * clip, *draws, "sums"), noised.clamp(min=0)


def without_private_data(data: StepData) -> StepData:
    """The same data, of which private sets cannot be read. Raises UserError for them."""

    def public(name: str, through: Any) -> Columns:
        if name not in PUBLIC:
            raise UserError(
                f"privacy.unit: record: the method reads '{name}' outside of its steps, where nothing is noised"
            )
        return data(name, through)

    return public
