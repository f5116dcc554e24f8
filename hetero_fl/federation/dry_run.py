"""Plans carried out without computing: what a client would send, known before anybody trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hetero_fl.algorithms import Algorithm
from hetero_fl.core.participant import Card, Columns, Participant
from hetero_fl.core.payload import Item, Payload, PayloadError
from hetero_fl.core.plan import ClassSums, Fit, FitReport, Predict, Step
from hetero_fl.engine.driver import Work, carry_out, training_loss
from hetero_fl.engine.templates import Templates
from hetero_fl.federation.federation import Federation
from hetero_fl.federation.method_calls import is_own
from hetero_fl.privacy.accounting import Charge
from hetero_fl.privacy.client import Protection
from hetero_fl.utils.errors import UserError

MOST_ZEROS = 2**24  # so many are tensors of their own, in which a method may write


class Dry:
    """A performer that answers every step with a result of the right shape: fits change nothing, predictions are nought.

    Large results have one number in memory, whatever their shape: how many rows a client has is what it tells.
    """

    def __init__(self) -> None:
        self.templates = Templates(torch.device("cpu"))

    def perform(self, work: Work) -> list[Any]:
        """Results of the right shapes, in order."""
        return [self._shaped(participant, step) for participant, step in work]

    def _shaped(self, participant: Participant, step: Step) -> Any:
        if isinstance(step, Fit):
            return FitReport(1, step.batch_size, 0.0)
        arch = getattr(step, "arch", None) or participant.arch[step.slot]
        width = (
            arch.outputs if step.readout != "features" else self.templates(arch).module.feature_dim
        )
        if isinstance(step, Predict):
            return zeros(len(step.data.columns(participant)["x"]), int(width))
        assert isinstance(step, ClassSums)
        classes = participant.task.outputs
        return torch.zeros(classes, int(width)), torch.zeros(classes)


class StandIn(Participant):
    """A client of whom only the form is known; it notes whether its label counts are asked for."""

    counted = False

    def __getattribute__(self, name: str) -> Any:
        if name == "counts":
            self.counted = True
        return super().__getattribute__(name)


class Expectations:
    """What each client's upload must look like: names, shapes and dtypes, from a dry run of its plan on its broadcast."""

    def __init__(self, algorithm: Algorithm, federation: Federation) -> None:
        self.algorithm, self.federation, self.performer = algorithm, federation, Dry()
        self.protection = Protection.of(algorithm, federation)
        self._known: dict[Any, dict[str, Item]] = {}

    def of(self, card: Card, broadcast: Payload, round: int) -> Mapping[str, Item]:
        """An upload of the right form; its numbers mean nothing. Clients alike share one.

        Raises UserError if the method's `train` returns what it did not declare, or if there is no memory for an upload.
        """
        s = card.settings
        own_rows = any(spec.rows_of == "train" for spec in self.algorithm.uploads.values())
        phase = self.phase(s.share_every, round)
        shares = (tuple(s.shares), s.share_every, card.has_proxy)
        key = (card.arch, shares, phase, _outline(broadcast), card.n if own_rows else None)
        if key not in self._known:
            # may differ in every round: the last round's are of no more use
            if is_own(self.algorithm):
                self._known = {k: v for k, v in self._known.items() if k[2] == key[2]}
            try:
                upload = self.upload(card, broadcast, round)
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "alloc" not in str(error):
                    raise
                raise UserError(
                    f"{card.id}: an upload for {card.n:,} rows takes more memory than there is"
                ) from None
            self._known[key] = {n: upload.item(n) for n in upload}
        return self._known[key]

    def trained(self, card: Card, item: str) -> frozenset[str]:
        """Names of the parameters of the model that an item of this client's holds: that of the slot of its name, or its own."""
        return self.algorithm.extras(card.arch).get(item, card.arch).parameter_names

    def phase(self, share_every: int, round: int) -> int:
        """What of the round a client's plan may depend on in form; of an own method's nothing is known."""
        return (
            round
            if is_own(self.algorithm)
            else self.algorithm.phase(share_every, round, self.federation.rounds)
        )

    def upload(self, card: Card, broadcast: Payload, round: int) -> Payload:
        """An upload as long as the real one, report included. Raises UserError as `of` does."""
        return self.rehearsed(card, broadcast, round)[0]

    def rehearsed(
        self, card: Card, broadcast: Payload, round: int
    ) -> tuple[Payload, tuple[Charge, ...]]:
        """Such an upload, and what making it costs of the client's privacy."""
        client, protection = self.stand_in(card, round), self.protection
        tally = protection.tally(self.performer)
        items, reports = carry_out(
            self.algorithm.train(client, broadcast), client, tally or self.performer
        )
        try:
            upload = protection.release(
                client, Payload.of(items, self.algorithm.uploads), broadcast
            )
        except PayloadError as error:
            raise UserError(f"{type(self.algorithm).__name__}.train: {error}") from None
        upload.report = dict(protection.report(training_loss(reports)))
        steps = tally.charges[card.id] if tally else []
        return upload, protection.charges(steps, client.counted, bool(upload))

    def stand_in(self, card: Card, round: int) -> StandIn:
        """A client as the server may imagine it: the public rows are real, the private ones are only counted."""
        federation = self.federation

        def data(name: str, through: Any) -> Columns:
            if name == "proxy":
                return federation.data.columns(card.id, name, through or card.preprocess)
            return {"x": torch.empty(card.n, 0), "y": zeros(card.n, dtype=torch.int64)}

        return StandIn(
            id=card.id,
            task=federation.task,
            arch={"model": card.arch},
            models={"model": dict(federation.initial(card.arch))},
            data=data,
            settings=card.settings,
            counts=torch.zeros(federation.task.outputs),
            n=card.n,
            has_proxy=federation.data.has_proxy(card.preprocess),
            peers=federation.cards,
            clock=federation.clock(round),
        )


def zeros(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return zeros of that shape; if there are many, all of them are one number in memory, and nothing can be written there."""
    if math.prod(shape) <= MOST_ZEROS:
        return torch.zeros(shape, dtype=dtype)
    return torch.zeros((), dtype=dtype).expand(shape)


def _outline(payload: Payload) -> tuple[Any, ...]:
    def shape(values: Any) -> Any:
        return tuple(values.shape) if isinstance(values, torch.Tensor) else len(values)

    return tuple((n, shape(payload[n])) for n in payload)
