"""Where privacy's noise comes from: in a simulation the run's key, in a deployment a secret of the system's.

Whoever knows the seed of the noise can take it off again. A deployed participant therefore draws a secret of its own, once,
and keeps it with its private state: a round that is repeated after a crash then repeats its noise, and is no second release.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from hetero_fl.seeding import Key, generator


@dataclass(frozen=True)
class Noise:
    """Draws that follow from a root and from what they are for."""

    root: tuple[Key, ...]

    @classmethod
    def keyed(cls, seed: int) -> Noise:
        """Of a simulation: the same in every repetition of the run."""
        return cls(("privacy", seed))

    @classmethod
    def of_the_system(cls) -> Noise:
        """Of a deployment: 256 bits from the operating system, which nobody else may learn."""
        return cls.of_a_secret(os.urandom(32))

    @classmethod
    def of_a_secret(cls, secret: bytes) -> Noise:
        """Of a deployment that keeps such bits."""
        return cls(("privacy", secret.hex()))

    def generator(self, *parts: Key) -> torch.Generator:
        """For the draws that the parts name."""
        return generator(*self.root, *parts)

    def normal(self, like: Tensor, deviation: float, *parts: Key) -> Tensor:
        """N(0, deviation²) in the shape, dtype and place of a tensor."""
        return gaussian(like, deviation, self.generator(*parts))


def gaussian(like: Tensor, deviation: float, draws: torch.Generator) -> Tensor:
    """N(0, deviation²) in the shape, dtype and place of a tensor, the next that the generator gives."""
    return (torch.randn(like.shape, generator=draws, dtype=like.dtype) * deviation).to(like.device)
