"""Evaluate equal models once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Predict, Rows, Step
from hetero_fl.data.federated_data import PUBLIC
from hetero_fl.engine.templates import step_model_spec, step_tensors

# One evaluation of equal models: after FedAvg every client holds the same one, and the common test
# set is seen once.
#
# Predictions on public rows are kept for each (architecture, rows, view) with the model that made
# them, and given again where the next model has equal tensors. Comparing costs a pass over the
# model at most, and stops at the first difference. These predictions are computed one by one: what
# is known already must not decide with whom the others are computed, for the company changes the
# last bits. A model that somebody sent is known by its slot too: every member of an ensemble is
# asked once.

MOST = 16  # predictions kept, each with its model
SENT = 128  # of models that somebody sent: whoever reads them holds them all in any case


class CachedOutputs:
    """Outputs of a model on some rows. The rows are not kept alive, nor is a tensor trusted that was changed in place."""

    def __init__(self, x: Tensor, tensors: Mapping[str, Tensor], outputs: Tensor) -> None:
        self._x = weakref.ref(x)
        self.outputs = outputs
        self._tensors = {n: (t, t._version) for n, t in tensors.items() if t.is_floating_point()}

    def matches(self, x: Tensor, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these rows and an equal model made the outputs. Counters do not count: evaluation does not read them."""
        if self._x() is not x or any(
            t._version != version for t, version in self._tensors.values()
        ):
            return False
        names = [n for n, t in tensors.items() if t.is_floating_point()]
        return all(
            n in self._tensors and _are_equal(self._tensors[n][0], tensors[n]) for n in names
        )


class PredictionCache:
    """Remembers predictions on public rows, so that equal models are evaluated once."""

    def __init__(self) -> None:
        self._known: dict[Any, CachedOutputs] = {}
        self._sent: dict[Any, CachedOutputs] = {}

    def get(
        self, key: Any, participant: Participant, step: Predict, compute: Callable[[], Tensor]
    ) -> Tensor:
        """Return a prediction; it may be the same tensor for several participants.

        Args:
            key: What `prediction_key` returns for the step.
            participant: Who predicts.
            step: The prediction.
            compute: Computes it.
        """
        assert isinstance(step.data, Rows)
        x = participant.data(step.data.name, step.data.preprocess)["x"]
        tensors = step_tensors(participant, step)
        kept = self._known
        limit = MOST
        if step.tensors is not None:
            kept = self._sent
            limit = SENT
        known = kept.get(key)
        if known is not None and known.matches(x, tensors):
            return known.outputs
        outputs = compute()
        kept.pop(key, None)
        while len(kept) >= limit:
            kept.pop(next(iter(kept)))
        kept[key] = CachedOutputs(x, tensors, outputs)
        return outputs


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Compared only where they are not the same memory."""
    return one.is_set_to(other) or torch.equal(one, other)


def prediction_key(participant: Participant, step: Step) -> Any:
    """Return what decides a prediction besides rows and tensors; None if it is not on public rows."""
    if not isinstance(step, Predict) or not isinstance(step.data, Rows):
        return None
    rows = step.data
    if rows.name not in PUBLIC or rows.rows is not None:
        return None
    shape = tuple(participant.data(rows.name, rows.preprocess)["x"].shape)
    sent = None if step.tensors is None else step.slot
    return (
        step_model_spec(participant, step),
        rows.name,
        shape,
        step.readout,
        step.batch_size,
        sent,
    )
