"""Who computes steps in a process."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hetero_fl.runtime.batched import Batched
from hetero_fl.runtime.plans import Performer
from hetero_fl.runtime.remember import Remembering
from hetero_fl.runtime.serial import Serial


def make_performer(
    device: torch.device,
    chunk: int = 1,
    precision: str = "float32",
    say: Callable[[str], None] = lambda line: None,
) -> Performer:
    """A performer that evaluates no equal models twice; with chunks of several clients, one that computes them together.

    `say` is told of what cannot be.
    """
    if chunk == 1:
        serial = Serial(device, precision)
        return Remembering(serial, serial)
    batched = Batched(device, say, precision)
    return Remembering(batched, batched.serial)
