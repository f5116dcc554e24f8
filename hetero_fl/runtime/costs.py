"""What a client's task costs, and which memory layout suits its model: estimated from what is known before the run.

Estimates decide which executor a run gets, and are the same on every machine. Measured times only decide who is begun first,
which changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import nn

from hetero_fl.architecture import Architecture
from hetero_fl.own_code import OWN
from hetero_fl.state import Card
from model_zoo import ModelDescription, describe

RATE = 2e10  # floating-point operations a second of one core: turns estimates into about the measured times' unit
INTENSE = 10  # operations on a parameter, for each example


@cache
def description(arch: Architecture) -> ModelDescription:
    """Parameters and arithmetic of a model."""
    return describe(arch.name, *arch.sizes, vocabulary=arch.vocabulary, **dict(arch.options))


def channels_last(arch: Architecture) -> bool:
    """Whether a model is faster with its channels innermost (`benchmarks/layout.py`).

    On CPUs that takes 0.7 to 0.9 of the time for convolutions that use each weight at many places, and 1.2 to 1.4 for wide
    ones on images of a few pixels, such as ResNet-18's last blocks at 28x28. A user's own model stays as it is: a `view` of
    features in its code counts on the plain layout.
    """
    if arch.name.startswith(OWN):
        return False
    about = description(arch)
    convolutional = 2 * about.convolution_flops >= about.forward_flops > 0
    return convolutional and about.forward_flops >= INTENSE * about.parameters


@cache
def recurrent(arch: Architecture) -> bool:
    """Whether a model has recurrent layers, for which there is no computing together."""
    with torch.random.fork_rng(devices=[]):
        return any(isinstance(m, nn.RNNBase) for m in arch.build().modules())


def work(card: Card) -> float:
    """Floating-point operations of a client's local training in a round, about: forward, and twice that for gradients."""
    s, about = card.settings, description(card.arch)
    examples = card.n * s.epochs if s.steps is None else s.steps * s.batch_size
    return float(examples * 3 * max(about.forward_flops, 2 * about.parameters))


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
