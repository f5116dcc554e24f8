"""Evaluate equal models once, and create backends."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Predict, Rows, Step
from hetero_fl.data.federated_data import PUBLIC
from hetero_fl.engine.driver import Backend, Work
from hetero_fl.engine.serial import SerialBackend, step_model_spec, step_tensors
from hetero_fl.engine.templates import Templates
from hetero_fl.engine.vectorized import VectorizedBackend

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


class CachingBackend:
    """A backend that hands predictions on public rows to `public`, what it does not know of them, and the rest to another."""

    def __init__(self, backend: Backend, public: Backend) -> None:
        self.backend = backend
        self.public = public
        self._known: dict[Any, CachedOutputs] = {}
        self._sent: dict[Any, CachedOutputs] = {}

    @property
    def templates(self) -> Templates:
        """Those of whom it hands work to."""
        return self.public.templates

    def run(self, work: Work) -> list[Any]:
        """The results in order. A prediction may be the same tensor for several participants: it is not to be changed."""
        places = [_cache_key(participant, step) for participant, step in work]
        rest = [i for i, place in enumerate(places) if place is None]
        results = dict(
            zip(rest, self.backend.run([work[i] for i in rest]) if rest else [], strict=True)
        )
        for i, place in enumerate(places):
            if place is not None:
                results[i] = self._predict(place, *work[i])
        return [results[i] for i in range(len(work))]

    def _predict(self, place: Any, participant: Participant, step: Step) -> Tensor:
        assert isinstance(step, Predict)
        x = participant.data(step.data.name, step.data.preprocess)["x"]  # type: ignore[union-attr]  # it has a place
        tensors = step_tensors(participant, step)
        kept, most = (self._known, MOST) if step.tensors is None else (self._sent, SENT)
        known = kept.get(place)
        if known is not None and known.matches(x, tensors):
            return known.outputs
        outputs: Tensor = self.public.run([(participant, step)])[0]
        kept.pop(place, None)
        while len(kept) >= most:
            kept.pop(next(iter(kept)))
        kept[place] = CachedOutputs(x, tensors, outputs)
        return outputs


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Compared only where they are not the same memory."""
    return one.is_set_to(other) or torch.equal(one, other)


def _cache_key(participant: Participant, step: Step) -> Any:
    """What, besides rows and tensors, decides a prediction on public rows; None for anything else."""
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


# Who computes steps in a process.


def make_backend(
    device: torch.device,
    chunk: int = 1,
    precision: str = "float32",
    say: Callable[[str], None] = lambda line: None,
) -> Backend:
    """A backend that evaluates no equal models twice; with chunks of several clients, one that computes them together.

    `say` is told of what cannot be.
    """
    if chunk == 1:
        serial = SerialBackend(device, precision)
        return CachingBackend(serial, serial)
    batched = VectorizedBackend(device, say, precision)
    return CachingBackend(batched, batched.serial)
