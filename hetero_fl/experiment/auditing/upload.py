"""What the server holds of one client after a single step on a few rows: made by the run's own machinery, not imitated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from hetero_fl.algorithms import Algorithm
from hetero_fl.architecture import Architecture, Tensors
from hetero_fl.config.optimizer import OptimizerConfig
from hetero_fl.errors import UserError
from hetero_fl.experiment.course import start_from
from hetero_fl.experiment.prepared import Prepared
from hetero_fl.nets import Given
from hetero_fl.objectives import Objective
from hetero_fl.payload import Payload
from hetero_fl.plan import Fit, Plan, Rows, Step
from hetero_fl.state import Participant, own

MODEL = "model"


@dataclass(frozen=True)
class Upload:
    """What an attacker at the server starts from.

    `model` are the tensors at which the step was taken, as far as they travelled those that the server sent, and else the
    initial ones; `gradient` is what the upload gives away of the loss's gradient, parameters only; `objective` and `given` are
    the client's loss, which the attacker is granted.
    """

    arch: Architecture
    model: Tensors
    gradient: Tensors
    objective: Objective
    given: Given


class OneStep:
    """A method whose clients take a single step of SGD on some of their training rows; all else is the method's own."""

    def __init__(self, method: Algorithm, rows: Tensor, rate: float) -> None:
        self.method, self.rows, self.rate = method, rows, rate
        self.rounds: list[
            list[Fit]
        ] = []  # the fits of each time that it was carried out, the server's dry runs included

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def train(self, client: Participant, got: Payload) -> Plan[Any]:
        """The method's round of a client, its fits on own rows cut to one step."""
        plan, answer = self.method.train(client, got), None
        self.rounds.append([])
        while True:
            try:
                asked = plan.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = yield [self._short(s) for s in asked] if isinstance(asked, list) else self._short(asked)

    def _short(self, step: Step) -> Step:
        if not (isinstance(step, Fit) and isinstance(step.data, Rows) and step.data.name == "train"):
            return step
        beside = {name: column[self.rows] for name, column in step.data.beside.items()}
        data = replace(step.data, rows=self.rows, beside=beside)
        short = replace(
            step, data=data, epochs=1, steps=1, batch_size=len(self.rows), augment=None, anneal=False, keep=None, drift={},
            optimizer=OptimizerConfig(name="sgd", lr=self.rate),
        )  # fmt: skip
        self.rounds[-1].append(short)
        return short


def refusal(prepared: Prepared, client: str) -> str | None:
    """Why no image can be sought in this client's upload; None if one can."""
    method, card = prepared.method, prepared.federation.cards[client]
    spec, shape = method.uploads.get(MODEL), card.arch.input_shape
    sends = method.sends(card.settings, card.settings.share_every - 1) != ()
    if spec is None or spec.kind != "params" or not method.counted or not sends:
        return f"{prepared.name}: '{client}' sends no parameters of its model; there is no gradient to invert"
    if prepared.data.vocabulary is not None:
        return f"{prepared.data.name}: examples are tokens; inversion is for images"
    if len(shape) != 3:
        return f"{prepared.data.name}: '{client}' sees examples of shape {shape}; inversion is for images"
    return None


def upload(
    prepared: Prepared, client: str, rows: Tensor, protect: Callable[[Tensors], Tensors] | None = None
) -> Upload:
    """What arrives from a client that has taken one step on these of its training rows (int64 `[B]`), in the first round in
    which it sends, with whatever the run does to an upload on its way.

    Args:
        protect: what becomes of the update (sent minus received) besides, by a function of one's own.

    Raises:
        UserError: no update came of the step.
    """
    card = prepared.federation.cards[client]
    rate, index = card.settings.optimizer.lr, card.settings.share_every - 1
    method = OneStep(prepared.method, rows, rate)
    runtime = prepared.config.runtime.model_copy(update={"executor": "serial", "precision": "float32"})
    config = prepared.config.model_copy(update={"runtime": runtime})
    rounds = replace(prepared, config=config, method=cast(Algorithm, method)).rounds()
    try:
        start_from(prepared.inherited, rounds)
        received, sent = rounds.ask(client, index)
    finally:
        rounds.executor.close()
    fits = [fit for fit in method.rounds[0] if MODEL in fit.train]
    if MODEL not in sent or not fits:
        raise UserError(f"--clients: '{client}' sends nothing of a step on its own rows under {prepared.name}")
    before = own(prepared.federation.initial(card.arch))
    before |= received.get(MODEL, {})
    update = {n: t - before[n] for n, t in sent[MODEL].items() if n in card.arch.parameter_names}
    if protect is not None:
        update = protect(update)
    gradient = {n: -t / rate for n, t in update.items()}
    if not any(bool(g.any()) for g in gradient.values()):
        raise UserError(f"--clients: '{client}': the upload tells nothing of the step; all of the update is nought")
    return Upload(card.arch, before, gradient, fits[-1].objective, fits[-1].given)
