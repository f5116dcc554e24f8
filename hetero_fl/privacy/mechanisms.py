"""Privacy mechanisms: Gaussian noise, clipped uploads, noisy votes and noisy label counts.

An upload consists of named items (`Item`), such as parameters or predictions.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor
from typing_extensions import override

from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.payload import Item, Payload
from hetero_fl.privacy.accounting import PrivacyCharge
from hetero_fl.utils.seeding import Key, keyed_generator

# Quantity of random numbers that are generated at a time. A block of this size (half a megabyte)
# fits in the CPU cache.
BLOCK = 2**16
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

    @override
    def normal(self, value: Tensor, deviation: float, *parts: Key) -> Tensor:
        return self.stream(*parts).normal(value, deviation)


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

    Each number uses 53 of 64 bits. Gaussian numbers are computed in float64 with the transform
    of Box and Muller (1958).

    Args:
        key: 256-bit key.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(AES(key), CTR(bytes(16))).encryptor()

    @override
    def normal(self, like: Tensor, deviation: float) -> Tensor:
        noise = torch.from_numpy(self._normal(like.numel()) * deviation)
        return noise.reshape(like.shape).to(like.dtype).to(like.device)

    @override
    def uniform(self, count: int) -> Tensor:
        return torch.from_numpy(self._words(count) * UNIFORM_SPACING)

    def _normal(self, count: int) -> np.ndarray:
        numbers = np.empty(count)
        for start in range(0, count, BLOCK):
            part = numbers[start : start + BLOCK]
            half = (len(part) + 1) // 2
            words = self._words(2 * half)
            # Adding 0.5 avoids the logarithm of 0.
            radius = np.sqrt(-2 * np.log((words[:half] + 0.5) * UNIFORM_SPACING))
            angle = words[half:] * (2 * math.pi * UNIFORM_SPACING)
            part[:half] = radius * np.cos(angle)
            part[half:] = (radius * np.sin(angle))[: len(part) - half]
        return numbers

    def _words(self, count: int) -> np.ndarray:
        """Return random integers below 2^53 as float64."""
        stream = self._cipher.update(bytes(8 * count))
        return (np.frombuffer(stream, "<u8") >> np.uint64(11)).astype(np.float64)


# Each item i of an upload with up to m items is clipped to a norm C_i and receives noise with a
# standard deviation of z·√m·C_i. Scaled by 1/C_i and concatenated, the items are one vector of norm
# at most √m with noise z·√m. This is one Gaussian mechanism with multiplier z (McMahan et al. 2018,
# section 3, "per-layer clipping").

VALUES = "values"
WEIGHT = "weight"
# Returns the noise for a tensor, given the tensor, a standard deviation and the tensor's name.
NoiseFunction = Callable[[Tensor, float, str], Tensor]


def clip_item(item: Item, received: Item | None, bound: float) -> tuple[Item, bool]:
    """Clip the update in an item to a maximum L2 norm and set the weight of the item to 1.

    The update in an item of kind "params" is the difference from the received parameters. The
    update in any other item is the values. The weights of "class_sums", which are counts of rows,
    are part of the clipped vector.

    Args:
        item: Item to clip.
        received: Received item of the same name. If None, the update is the sent values.
        bound: Maximum L2 norm.

    Returns:
        The clipped item, and whether the norm of the update was within the bound.
    """
    reference = reference_tensors(item, received)
    parts = {n: t - reference[n] for n, t in _flatten_item(item).items()}
    norm = 0.0
    if parts:
        squares = torch.stack([t.double().square().sum() for t in parts.values()])
        norm = float(squares.sum().sqrt())
    if norm <= bound:
        return _unflatten_item(item, _flatten_item(item)), True
    clipped = {n: reference[n] + t * (bound / norm) for n, t in parts.items()}
    return _unflatten_item(item, clipped), False


def add_noise(item: Item, deviation: float, sample: NoiseFunction) -> Item:
    """Add noise to all numbers in an item.

    Noisy counts, which include the weights of class sums, are clamped to at least 0.

    Args:
        item: Item to which noise is added.
        deviation: Standard deviation of the noise.
        sample: Function that samples the noise for a tensor of the item.
    """
    noisy = {n: t + sample(t, deviation, n) for n, t in _flatten_item(item).items()}
    return _unflatten_item(item, noisy)


def clip_upload(
    payload: Payload,
    received: Payload,
    bounds: Callable[[str], float],
    noise: Callable[[str, Item], Item] | None = None,
) -> tuple[Payload, dict[str, bool]]:
    """Clip all items of an upload and optionally add noise.

    Args:
        payload: Upload to clip.
        received: Payload that the client received.
        bounds: Function that maps the name of an item to the clipping bound.
        noise: Function that returns a clipped item with noise, given the name of the item and the
            item. If None, no noise is added.

    Returns:
        The clipped upload, and a mapping from the name of each item to whether the norm of the
        update was within the bound.
    """
    items = {}
    within = {}
    for name in payload:
        before = received.item(name) if name in received else None
        item, within[name] = clip_item(payload.item(name), before, bounds(name))
        items[name] = item if noise is None else noise(name, item)
    return Payload(items, payload.report), within


def _flatten_item(item: Item) -> Tensors:
    """Return all numbers of an item that the receiver uses, as named tensors."""
    if isinstance(item.values, Mapping):
        return dict(item.values)
    if item.kind == "class_sums":
        return {VALUES: item.values, WEIGHT: torch.as_tensor(item.weight, dtype=item.values.dtype)}
    return {VALUES: item.values}


def _unflatten_item(like: Item, vector: Tensors) -> Item:
    if isinstance(like.values, Mapping):
        return Item(vector, 1.0, like.kind)
    weight = vector[WEIGHT].clamp(min=0) if like.kind == "class_sums" else 1.0
    values = vector[VALUES].clamp(min=0) if like.kind == "counts" else vector[VALUES]
    return Item(values, weight, like.kind)


def reference_tensors(item: Item, received: Item | None) -> Tensors:
    """Return the tensors that are subtracted from an item to compute the update.

    For an item of kind "params", these are the received tensors of the same name and shape. For all
    other tensors, zeros are returned.

    Args:
        item: The sent item.
        received: Received item of the same name. If None, all returned tensors are zeros.
    """
    known = received.tensors if received is not None and item.kind == "params" else {}
    vector = _flatten_item(item)
    return {
        n: known[n] if n in known and known[n].shape == t.shape else torch.zeros_like(t)
        for n, t in vector.items()
    }


# Probability that the teacher assigns to the class with the most votes.
ELECTED_PROBABILITY = 0.9


def predictions_to_votes(item: Item, norm: float) -> Item:
    """Replace predictions `[D, C]` by one-hot votes, scaled to an L2 norm.

    The class with the most votes after noise is added is the result of GNMax (Papernot et al.
    2018). This class does not depend on the scale of the votes and the noise.

    Args:
        item: Item with the predictions.
        norm: L2 norm of the votes of all rows.
    """
    assert isinstance(item.values, Tensor)
    votes = F.one_hot(item.values.argmax(-1), item.values.shape[-1]).to(item.values.dtype)
    return Item(votes * (norm / max(1, len(votes)) ** 0.5), 1.0, item.kind)


def teacher_from_votes(votes: Tensor, prediction_kind: str) -> Tensor:
    """Return teacher predictions for the class with the most votes in each row.

    Args:
        votes: Noisy sum of votes, shape `[D, C]`.
        prediction_kind: "probabilities", or "logits" to return log probabilities.

    Returns:
        Predictions, shape `[D, C]`. The class with the most votes has the probability 0.9, and the
        other classes have equal probabilities.
    """
    classes = votes.shape[-1]
    p = torch.full_like(votes, (1 - ELECTED_PROBABILITY) / max(1, classes - 1))
    p.scatter_(-1, votes.argmax(-1, keepdim=True), ELECTED_PROBABILITY)
    return p if prediction_kind == "probabilities" else p.log()


# Name of the release of label counts, which also identifies the noise on the counts.
COUNTS = "label counts"


def label_counts_charge(kind: str, privacy: PrivacyConfig) -> list[PrivacyCharge]:
    """Return the privacy charges for releasing label counts.

    For regression tasks, the list is empty, because the number of rows is not private.

    Args:
        kind: Kind of the task, such as "multiclass".
        privacy: The `privacy` section of the configuration.
    """
    if kind == "regression":
        return []
    return [PrivacyCharge(1.0, scale=privacy.statistics_noise, once=COUNTS)]


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
