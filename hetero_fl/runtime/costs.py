"""What a client's task costs: estimated from what is known before the run, then as measured.

The estimate decides which executor a run gets, and is the same on every machine. Measured times only decide who is begun
first, which changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from hetero_fl.architecture import Architecture
from hetero_fl.state import Card
from model_zoo import describe

RATE = 2e10  # floating-point operations a second of one core: turns estimates into about the measured times' unit


@cache
def operations(arch: Architecture) -> int:
    """Floating-point operations of training on one example: forward, and twice that for the gradients."""
    channels, *size = arch.input_shape
    about = describe(arch.name, arch.outputs, channels, tuple(size), arch.feature_dim, **dict(arch.options))
    return 3 * max(about.forward_flops, 2 * about.parameters)


def work(card: Card) -> float:
    """Floating-point operations of a client's local training in a round, about."""
    s = card.settings
    examples = card.n * s.epochs if s.steps is None else s.steps * s.batch_size
    return float(examples * operations(card.arch))


class Costs:
    """Seconds a task takes, about."""

    def __init__(self, cards: Mapping[str, Card]) -> None:
        self._cards = cards
        self._measured: dict[str, float] = {}

    def of(self, client: str) -> float:
        """As measured the last time, else as estimated."""
        return self._measured.get(client) or work(self._cards[client]) / RATE

    def learn(self, seconds: Mapping[str, float]) -> None:
        """What tasks took."""
        self._measured.update(seconds)
