"""Where privacy's noise comes from: in a simulation the run's key, in a deployment a secret of the system's.

Whoever can predict the noise can take it off again, and so can whoever is shown two values under the same noise. A deployed
participant therefore draws a secret of its own, once, and keeps it with its private state; every draw is a keystream of
AES-256-CTR under a key that HKDF-SHA256 makes of the secret, of what the draw is for, and of what it is put on. What is repeated
after a crash repeats its noise and is no second release; what differs in anything has noise of its own.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from hetero_fl.seeding import Key, generator

BLOCK = 2**16  # numbers at a time: half a megabyte, which stays in the cache
TINY = 2.0**-53  # distance of the numbers that 53 bits tell apart in (0, 1)


class Draws(Protocol):
    """One stream, each draw of it once."""

    def normal(self, like: Tensor, deviation: float) -> Tensor:
        """N(0, deviation²) in the shape, dtype and place of a tensor."""
        ...

    def uniform(self, count: int) -> Tensor:
        """So many numbers in [0, 1), float64 `[count]`."""
        ...


class Noise(Protocol):
    """Draws that follow from a root and from what they are for."""

    def stream(self, *parts: Key) -> Draws:
        """For the draws that the parts name, in the task at hand."""
        ...

    def normal(self, value: Tensor, deviation: float, *parts: Key) -> Tensor:
        """N(0, deviation²) to be put on a value that is told once, in its shape, dtype and place: the same on the same value,
        whatever the task."""
        ...


# In a simulation -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class KeyedNoise:
    """The same in every repetition of the run."""

    seed: int

    def stream(self, *parts: Key) -> Draws:
        return KeyedDraws(generator("privacy", self.seed, *parts))

    def normal(self, value: Tensor, deviation: float, *parts: Key) -> Tensor:
        return self.stream(*parts).normal(value, deviation)


@dataclass(frozen=True)
class KeyedDraws:
    """Of torch's own generator, which is quick and can be predicted."""

    generator: torch.Generator

    def normal(self, like: Tensor, deviation: float) -> Tensor:
        return (torch.randn(like.shape, generator=self.generator, dtype=like.dtype) * deviation).to(like.device)

    def uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64)


# In a deployment -----------------------------------------------------------------------------------------------------
class SecretNoise:
    """Of 256 bits that nobody else may learn; from the system if none are given.

    `task`: what is being answered. Streams are keyed by it: asked twice for different things in what is said to be one round,
    a participant must not put the same noise on both.
    """

    def __init__(self, secret: bytes | None = None, task: bytes = b"") -> None:
        self._secret, self.task = os.urandom(32) if secret is None else secret, task

    def stream(self, *parts: Key) -> Draws:
        return self._draws("stream", self.task.hex(), *parts)

    def normal(self, value: Tensor, deviation: float, *parts: Key) -> Tensor:
        told = value.detach().cpu().contiguous()
        about = hashlib.sha256(told.numpy().reshape(-1).view(np.uint8).data).hexdigest()
        form = f"{told.dtype} {tuple(told.shape)}"
        return self._draws("value", form, about, float(deviation).hex(), *parts).normal(value, deviation)

    def _draws(self, *parts: Key) -> Draws:
        made = HKDF(SHA256(), 32, None, b"hetero_fl noise " + repr(parts).encode())
        return SecretDraws(made.derive(self._secret))


class SecretDraws:
    """A keystream as numbers: 53 bits of each eight bytes, Gaussian by Box and Muller (1958), in float64."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(AES(key), CTR(bytes(16))).encryptor()

    def normal(self, like: Tensor, deviation: float) -> Tensor:
        made = torch.from_numpy(self._normal(like.numel()) * deviation)
        return made.reshape(like.shape).to(like.dtype).to(like.device)

    def uniform(self, count: int) -> Tensor:
        return torch.from_numpy(self._words(count) * TINY)

    def _normal(self, count: int) -> np.ndarray:
        found = np.empty(count)
        for start in range(0, count, BLOCK):
            part = found[start : start + BLOCK]
            half = (len(part) + 1) // 2
            words = self._words(2 * half)
            radius = np.sqrt(-2 * np.log((words[:half] + 0.5) * TINY))  # never of nought
            angle = words[half:] * (2 * math.pi * TINY)
            part[:half] = radius * np.cos(angle)
            part[half:] = (radius * np.sin(angle))[: len(part) - half]
        return found

    def _words(self, count: int) -> np.ndarray:
        """Whole numbers below 2^53, as float64."""
        stream = self._cipher.update(bytes(8 * count))
        return (np.frombuffer(stream, "<u8") >> np.uint64(11)).astype(np.float64)
