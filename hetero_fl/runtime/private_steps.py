"""The steps of a client's plan that read its private rows, where records are to stay private: a guard around the performer.

Whatever such a step gives back has noise on it: fits are DP-SGD, class sums are clipped and noised. Each is charged. Nothing
else may read these rows: predictions on them are refused, and so is reading them between the steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from hetero_fl.channel.privacy.accounting import Charge
from hetero_fl.channel.privacy.noise import Noise
from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.data.federated import PUBLIC
from hetero_fl.errors import UserError
from hetero_fl.plan import ClassSums, Fit, Predict, Rows, Step
from hetero_fl.runtime.outputs import class_sums, readout
from hetero_fl.runtime.plans import Diverged, Performer, Work
from hetero_fl.runtime.private_fit import PrivateGradients, sampling
from hetero_fl.runtime.templates import Templates
from hetero_fl.runtime.training import fit_on_live_modules
from hetero_fl.state import Columns, Participant
from model_zoo import Outputs

Data = Callable[[str, Any], Columns]


def is_private(step: Step) -> bool:
    """Whether a step reads rows that are not public."""
    return isinstance(step.data, Rows) and step.data.name not in PUBLIC


def charge_of(participant: Participant, step: Step, privacy: PrivacyConfig) -> Charge:
    """What a private step costs. Raises UserError for a prediction: a row's own output cannot be noised and be of use."""
    n = len(next(iter(step.data.columns(participant).values())))  # type: ignore[union-attr]  # it is on Rows
    if isinstance(step, Fit):
        rate, steps = sampling(n, step, participant.work, privacy.sample_rate)
        return Charge(rate, steps)
    if isinstance(step, ClassSums):
        return Charge(1.0, scale=privacy.statistics_noise)
    raise UserError("predicts on private rows, one by one")


class Tally:
    """Hands every step on, and notes what private ones cost. Around a dry performer: the price of a plan in ε."""

    def __init__(self, performer: Performer, privacy: PrivacyConfig) -> None:
        self.performer, self.privacy = performer, privacy
        self.charges: dict[str, list[Charge]] = defaultdict(list)

    @property
    def templates(self) -> Templates:
        """The other's."""
        return self.performer.templates

    def perform(self, work: Work) -> list[Any]:
        """The results in order."""
        self._note(work)
        return self.performer.perform(work)

    def _note(self, work: Work) -> None:
        for participant, step in work:
            if is_private(step):
                self.charges[participant.id].append(charge_of(participant, step, self.privacy))


class Guard(Tally):
    """Performs private steps with noise, hands the others on.

    Args:
        clients: whose plans are carried out. Their private rows are readable from now on inside of steps only.
    """

    def __init__(
        self, performer: Performer, privacy: PrivacyConfig, noise: Noise, clients: Sequence[Participant]
    ) -> None:
        super().__init__(performer, privacy)
        self.noise = noise
        assert not isinstance(privacy.clip, Mapping)
        self._gradients = PrivateGradients(privacy.clip, privacy.z, noise, privacy.sample_rate)
        self._data: dict[str, Data] = {}
        for client in clients:
            self._data[client.id], client.data = client.data, closed(client.data)

    def perform(self, work: Work) -> list[Any]:
        inside = [(replace(p, data=self._data[p.id]) if is_private(s) else p, s) for p, s in work]
        self._note(inside)
        public = [i for i, (_, step) in enumerate(work) if not is_private(step)]
        found = self.performer.perform([work[i] for i in public]) if public else []
        results = dict(zip(public, found, strict=True))
        for i, (participant, step) in enumerate(inside):
            if i not in results:
                results[i] = self._private(participant, step)
        return [results[i] for i in range(len(work))]

    def _private(self, participant: Participant, step: Step) -> Any:
        if isinstance(step, ClassSums):
            return self._class_sums(participant, step)
        assert isinstance(step, Fit)
        try:
            report = fit_on_live_modules(participant, step, self.templates, self._gradients)
        except Diverged as failure:
            return failure
        return replace(report, loss=math.nan)  # nobody noised it

    def _class_sums(self, participant: Participant, step: ClassSums) -> tuple[Tensor, Tensor]:
        """A row adds a vector of norm up to C to its class's sum and one to its count: (v/C, 1) has a norm up to √2."""
        clip, classes = self.privacy.statistics_clip, participant.task.outputs
        of = step.readout if step.readout == "features" else "logits"
        asked = Predict(step.slot, step.data, of, step.batch_size)
        (raw,) = self.performer.perform([(participant, asked)])
        values = readout(step, Outputs(logits=raw, features=raw))
        values = values.where(
            values.norm(dim=-1, keepdim=True).isfinite(), 0
        )  # else one row could spoil the sum, and tell
        values = values * (clip / values.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
        sums, counts = class_sums(values, step.data.columns(participant)["y"], classes)
        draws = (*participant.stream("class sums"), "noise")
        deviation = math.sqrt(2) * self.privacy.statistics_noise * self.privacy.z
        noised = counts + self.noise.normal(counts, deviation, *draws, "counts")
        return sums + self.noise.normal(sums, deviation * clip, *draws, "sums"), noised.clamp(min=0)


def closed(data: Data) -> Data:
    """The same data, of which private sets cannot be read. Raises UserError for them."""

    def public(name: str, through: Any) -> Columns:
        if name not in PUBLIC:
            raise UserError(
                f"privacy.unit: record: the method reads '{name}' outside of its steps, where nothing is noised"
            )
        return data(name, through)

    return public
