"""Sources of Gaussian noise for differential privacy, and noisy label counts.

Simulations draw reproducible noise from the seed of the run, and deployments draw unpredictable
noise from a secret.
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
from typing_extensions import override

from hetero_fl.config.protection import PrivacyConfig
from hetero_fl.utils.seeding import Key, keyed_generator

# Spacing of uniform numbers in [0, 1) with 53 bits.
UNIFORM_SPACING = 2.0**-53


class NoiseStream(Protocol):
    """Protocol for a stream of random numbers that advances with each call."""

    def normal(self, like: Tensor, deviation: float) -> Tensor:
        """Sample from N(0, deviation²) with the shape, dtype and device of `like`."""

    def uniform(self, count: int) -> Tensor:
        """Sample `count` float64 numbers uniformly from [0, 1)."""


class NoiseSource(Protocol):
    """Protocol for a source of noise with a separate random stream for each purpose."""

    def stream(self, *parts: Key) -> NoiseStream:
        """Return the random stream for a purpose in the current task.

        Args:
            *parts: Strings and integers that identify the purpose.
        """

    def normal(self, value: Tensor, deviation: float, *parts: Key) -> Tensor:
        """Sample Gaussian noise for a value to be released.

        Repeated calls with the same arguments return the same noise, also in different tasks, so
        that repeating a release does not reveal more about the value.

        Args:
            value: Value to be released.
            deviation: Standard deviation of the noise.
            *parts: Strings and integers that identify the purpose of the noise.

        Returns:
            Noise with the shape, dtype and device of `value`.
        """
        return self.stream(*parts).normal(value, deviation)


@dataclass(frozen=True)
class KeyedNoiseSource(NoiseSource):
    """Source of reproducible noise for simulations.

    Args:
        seed: Seed of the run.
    """

    seed: int

    @override
    def stream(self, *parts: Key) -> NoiseStream:
        return KeyedNoiseStream(keyed_generator("privacy", self.seed, *parts))


@dataclass(frozen=True)
class KeyedNoiseStream(NoiseStream):
    """Stream of random numbers from a PyTorch generator, which is fast but predictable.

    Args:
        generator: PyTorch generator on the CPU.
    """

    generator: torch.Generator

    @override
    def normal(self, like: Tensor, deviation: float) -> Tensor:
        noise = torch.randn(like.shape, generator=self.generator, dtype=like.dtype)
        return (noise * deviation).to(like.device)

    @override
    def uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64)


class SecretNoiseSource(NoiseSource):
    """Source of unpredictable noise for deployments.

    An attacker could remove noise that is predictable or that is added to two different values.
    Each participant therefore stores a secret with its private state. Random numbers come from an
    AES-256-CTR keystream, whose key is derived with HKDF-SHA256 from the secret, the purpose of the
    noise, and the current task or the value to which noise is added. If a task is repeated after a
    crash, the same value receives the same noise, which is not a second release. A different value
    receives different noise.

    Args:
        secret: Secret of 256 bits. If None, the operating system generates a secret.
        task: Identifier of the current task, on which each stream depends.
    """

    def __init__(self, secret: bytes | None = None, task: bytes = b"") -> None:
        self._secret = os.urandom(32) if secret is None else secret
        self.task = task

    @override
    def stream(self, *parts: Key) -> NoiseStream:
        return self._new_stream("stream", self.task.hex(), *parts)

    @override
    def normal(self, value: Tensor, deviation: float, *parts: Key) -> Tensor:
        released = value.detach().cpu().contiguous()
        digest = hashlib.sha256(released.numpy().reshape(-1).view(np.uint8).data).hexdigest()
        layout = f"{released.dtype} {tuple(released.shape)}"
        stream = self._new_stream("value", layout, digest, float(deviation).hex(), *parts)
        return stream.normal(value, deviation)

    def _new_stream(self, *parts: Key) -> NoiseStream:
        key = HKDF(SHA256(), 32, None, b"hetero_fl noise " + repr(parts).encode())
        return SecretNoiseStream(key.derive(self._secret))


class SecretNoiseStream(NoiseStream):
    """Stream of random numbers from an AES-256-CTR keystream.

    Each number uses 53 of 64 bits. Gaussian numbers are computed in float64 by inversion of the
    distribution function.

    Args:
        key: 256-bit key.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(AES(key), CTR(bytes(16))).encryptor()

    @override
    def normal(self, like: Tensor, deviation: float) -> Tensor:
        # Neither 0 nor 1, whose quantiles are infinite.
        probabilities = (self._words(like.numel()) + 0.5) * UNIFORM_SPACING
        limited = torch.from_numpy(probabilities).clamp_(max=1 - UNIFORM_SPACING)
        noise = torch.special.ndtri(limited) * deviation
        return noise.reshape(like.shape).to(like.dtype).to(like.device)

    @override
    def uniform(self, count: int) -> Tensor:
        return torch.from_numpy(self._words(count) * UNIFORM_SPACING)

    def _words(self, count: int) -> np.ndarray:
        """Return random integers below 2^53 as float64."""
        stream = self._cipher.update(bytes(8 * count))
        return (np.frombuffer(stream, "<u8") >> np.uint64(11)).astype(np.float64)


# Name of the release of label counts, which also identifies the noise on the counts.
COUNTS = "label counts"


def noisy_label_counts(
    counts: Tensor, kind: str, privacy: PrivacyConfig, noise: NoiseSource, client: str
) -> Tensor:
    """Add Gaussian noise to the label counts of a client.

    Repeated calls add the same noise and count as one release. A row changes one count by 1, or up
    to C counts in a multi-label task. The count of a regression task is the number of rows, which
    is not private and is returned without noise.

    Args:
        counts: Label counts, shape `[C]`.
        kind: Kind of the task, such as "multiclass".
        privacy: The `privacy` section of the configuration.
        noise: Source of noise.
        client: Id of the client.

    Returns:
        Noisy counts, at least 0, shape `[C]`.
    """
    if kind == "regression":
        return counts
    sensitivity = math.sqrt(len(counts)) if kind == "multilabel" else 1.0
    deviation = sensitivity * privacy.statistics_noise * privacy.known_noise_multiplier
    return (counts + noise.normal(counts, deviation, client, COUNTS)).clamp(min=0)
