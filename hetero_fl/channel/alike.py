"""Payloads that are the same in memory are dealt with once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

from hetero_fl.payload import Payload

T = TypeVar("T")


class Alike(Generic[T]):
    """Does something with payloads, encodes them say; with equal ones, made of the very same memory, once. Keeps the last few.

    A model that a whole group receives is then encoded for the first of its members alone.
    """

    def __init__(self, make: Callable[[Payload], T], most: int = 8) -> None:
        self.make, self.most = make, most
        # A payload keeps its tensors alive, so that nobody else gets their memory.
        self._known: dict[Any, tuple[Payload, T]] = {}

    def __call__(self, payload: Payload) -> T:
        """What was made of the payload."""
        mark = tuple((n, i.kind, _identity(i.values), _identity(i.weight)) for n, i in payload.items_.items())
        if mark not in self._known:
            if len(self._known) >= self.most:
                self._known.pop(next(iter(self._known)))
            self._known[mark] = (payload, self.make(payload))
        return self._known[mark][1]


def _identity(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((n, _identity(t)) for n, t in value.items())
    if isinstance(value, Tensor):  # where it lies: views of one tensor, made anew for each client, are the same
        return (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype) if value.numel() else id(value)
    return value
