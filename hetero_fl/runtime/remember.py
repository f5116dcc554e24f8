"""One evaluation of equal models: after FedAvg every client holds the same one, and the common test set is seen once.

Predictions on public rows are kept for each (architecture, rows, view) with the model that made them, and given again where
the next model has equal tensors. Comparing costs a pass over the model at most, and stops at the first difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hetero_fl.architecture import Tensors
from hetero_fl.data.federated import PUBLIC
from hetero_fl.plan import Predict, Rows, Step
from hetero_fl.runtime.plans import Performer, Work
from hetero_fl.state import Participant

MOST = 64  # predictions kept


class Remembering:
    """A performer that has another one compute, and only what it does not know."""

    def __init__(self, performer: Performer) -> None:
        self.performer = performer
        self._known: dict[Any, tuple[Tensor, Tensors, Tensor]] = {}  # the rows, the model, its outputs

    def perform(self, work: Work) -> list[Any]:
        """The results in order. A prediction may be the same tensor for several participants: it is not to be changed."""
        results: list[Any] = [None] * len(work)
        open_: list[int] = []  # to be computed
        doubles: dict[int, int] = {}  # place -> the place in this work that computes the same
        fresh: dict[Any, int] = {}
        for i, (participant, step) in enumerate(work):
            place = _place(participant, step)
            if place is not None:
                tensors = _tensors(participant, step)
                known = self._known.get(place)
                if known is not None and known[0] is _rows(participant, step) and _equal(known[1], tensors):
                    results[i] = known[2]
                    continue
                twin = fresh.get(place)
                if twin is not None and _equal(_tensors(*work[twin]), tensors):
                    doubles[i] = twin
                    continue
                fresh[place] = i
            open_.append(i)
        for i, result in zip(open_, self.performer.perform([work[i] for i in open_]) if open_ else [], strict=True):
            results[i] = result
        if len(self._known) + len(fresh) > MOST:
            self._known.clear()
        for place, i in fresh.items():
            self._known[place] = (_rows(*work[i]), dict(_tensors(*work[i])), results[i])
        for i, twin in doubles.items():
            results[i] = results[twin]
        return results


def _place(participant: Participant, step: Step) -> Any:
    """What, besides the tensors, decides a prediction on public rows; None for anything else."""
    if not isinstance(step, Predict) or not isinstance(step.data, Rows):
        return None
    rows = step.data
    if rows.name not in PUBLIC or rows.rows is not None:
        return None
    x = _rows(participant, step)
    return (step.arch or participant.arch[step.slot], rows.name, id(x), step.readout, step.batch_size)


def _rows(participant: Participant, step: Step) -> Tensor:
    """The inputs: one tensor for all who share a view, as long as it is cached."""
    assert isinstance(step, Predict) and isinstance(step.data, Rows)
    return participant.data(step.data.name, step.data.through)["x"]


def _tensors(participant: Participant, step: Step) -> Mapping[str, Tensor]:
    assert isinstance(step, Predict)
    return participant.models[step.slot] if step.tensors is None else step.tensors


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Counters do not count: evaluation does not read them, and they do not travel."""
    names = [n for n, t in b.items() if t.is_floating_point()]
    return all(n in a and (a[n] is b[n] or torch.equal(a[n], b[n])) for n in names)
