"""Privacy mechanisms: Gaussian noise, clipped uploads, noisy votes, noisy label counts."""

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

from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.payload import Item, Payload
from hetero_fl.privacy.accounting import PrivacyCharge
from hetero_fl.utils.seeding import Key, keyed_generator

# Where privacy's noise comes from: in a simulation the run's key, in a deployment a secret of the
# system's.
#
# Whoever can predict the noise can take it off again, and so can whoever is shown two values under
# the same noise. A deployed participant therefore draws a secret of its own, once, and keeps it
# with its private state; every draw is a keystream of AES-256-CTR under a key that HKDF-SHA256
# makes of the secret, of what the draw is for, and of what it is put on. What is repeated after a
# crash repeats its noise and is no second release; what differs in anything has noise of its own.

BLOCK = 2**16  # numbers at a time: half a megabyte, which stays in the cache
TINY = 2.0**-53  # distance of the numbers that 53 bits tell apart in (0, 1)


class NoiseStream(Protocol):
    """One stream, each draw of it once."""

    def normal(self, like: Tensor, deviation: float) -> Tensor:
        """N(0, deviation²) in the shape, dtype and place of a tensor."""

    def uniform(self, count: int) -> Tensor:
        """So many numbers in [0, 1), float64 `[count]`."""


class NoiseSource(Protocol):
    """Draws that follow from a root and from what they are for."""

    def stream(self, *parts: Key) -> NoiseStream:
        """For the draws that the parts name, in the task at hand."""

    def normal(self, value: Tensor, deviation: float, *parts: Key) -> Tensor:
        """N(0, deviation²) to be put on a value that is told once, in its shape, dtype and place: the same on the same value,
        whatever the task."""


# In a simulation -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class KeyedNoiseSource:
    """The same in every repetition of the run."""

    seed: int

    def stream(self, *parts: Key) -> NoiseStream:
        return KeyedNoiseStream(keyed_generator("privacy", self.seed, *parts))

    def normal(self, value: Tensor, deviation: float, *parts: Key) -> Tensor:
        return self.stream(*parts).normal(value, deviation)


@dataclass(frozen=True)
class KeyedNoiseStream:
    """Of torch's own generator, which is quick and can be predicted."""

    generator: torch.Generator

    def normal(self, like: Tensor, deviation: float) -> Tensor:
        return (torch.randn(like.shape, generator=self.generator, dtype=like.dtype) * deviation).to(
            like.device
        )

    def uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64)


# In a deployment -----------------------------------------------------------------------------------------------------
class SecretNoiseSource:
    """Of 256 bits that nobody else may learn; from the system if none are given.

    `task`: what is being answered. Streams are keyed by it: asked twice for different things in what is said to be one round,
    a participant must not put the same noise on both.
    """

    def __init__(self, secret: bytes | None = None, task: bytes = b"") -> None:
        self._secret = os.urandom(32) if secret is None else secret
        self.task = task

    def stream(self, *parts: Key) -> NoiseStream:
        return self._new_stream("stream", self.task.hex(), *parts)

    def normal(self, value: Tensor, deviation: float, *parts: Key) -> Tensor:
        told = value.detach().cpu().contiguous()
        about = hashlib.sha256(told.numpy().reshape(-1).view(np.uint8).data).hexdigest()
        form = f"{told.dtype} {tuple(told.shape)}"
        return self._new_stream("value", form, about, float(deviation).hex(), *parts).normal(
            value, deviation
        )

    def _new_stream(self, *parts: Key) -> NoiseStream:
        made = HKDF(SHA256(), 32, None, b"hetero_fl noise " + repr(parts).encode())
        return SecretNoiseStream(made.derive(self._secret))


class SecretNoiseStream:
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


# A client's whole upload as one bounded vector: clipped before it leaves, and under local privacy
# noised as well.
#
# The items of an upload are bounded one by one, each to a norm C_i of its own, and noised with
# z·√m·C_i where m items may be sent: scaled by 1/C_i and laid end to end they are one vector of
# norm up to √m with noise z·√m, one Gaussian mechanism of multiplier z (McMahan et al. 2018,
# section 3, "per-layer clipping"; Balle and Wang 2018 for its ε).

VALUES = "values"
WEIGHT = "weight"
NoiseFunction = Callable[[Tensor, float, str], Tensor]  # (like, standard deviation, what for)


def clip_item(item: Item, received: Item | None, bound: float) -> tuple[Item, bool]:
    """The item with weight one, moved from its reference by at most `bound` in L2; and whether it was within it already.

    "params" move from what the client received (nought where it received no such tensor), others from nought. Of
    "class_sums" the weights, which count rows, are part of the vector.
    """
    reference = reference_tensors(item, received)
    parts = {n: t - reference[n] for n, t in _flatten_item(item).items()}
    norm = (
        float(torch.stack([t.double().square().sum() for t in parts.values()]).sum().sqrt())
        if parts
        else 0.0
    )
    if norm <= bound:
        return _unflatten_item(item, _flatten_item(item)), True
    return _unflatten_item(
        item, {n: reference[n] + t * (bound / norm) for n, t in parts.items()}
    ), False


def add_noise(item: Item, deviation: float, draw: NoiseFunction) -> Item:
    """The item with N(0, deviation²) on every number of it; weights of class sums stay at nought or above."""
    return _unflatten_item(
        item, {n: t + draw(t, deviation, n) for n, t in _flatten_item(item).items()}
    )


def clip_upload(
    payload: Payload,
    received: Payload,
    bounds: Callable[[str], float],
    noise: Callable[[str, Item], Item] | None = None,
) -> tuple[Payload, dict[str, bool]]:
    """The upload with every item clipped (and noised, where `noise(name, item)` is given), and which were within bounds."""
    items = {}
    within = {}
    for name in payload:
        before = received.item(name) if name in received else None
        item, within[name] = clip_item(payload.item(name), before, bounds(name))
        items[name] = item if noise is None else noise(name, item)
    return Payload(items, payload.report), within


def _flatten_item(item: Item) -> Tensors:
    """All numbers of an item that its receiver reads, named."""
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
    """Return where the update in an item starts, tensor by tensor: parameters at what the client
    received, if that has the same shape, all else at zero."""
    known = received.tensors if received is not None and item.kind == "params" else {}
    vector = _flatten_item(item)
    return {
        n: known[n] if n in known and known[n].shape == t.shape else torch.zeros_like(t)
        for n, t in vector.items()
    }


# Teachers by noisy majority (PATE with Gaussian noise: Papernot et al. 2018, GNMax): each client
# has one vote a row.

SURE = 0.9  # the elected class's probability; the others share the rest


def predictions_to_votes(item: Item, norm: float) -> Item:
    """Predictions `[D, C]` as votes, of so large a norm together: who has most is the same at any scale."""
    assert isinstance(item.values, Tensor)
    votes = F.one_hot(item.values.argmax(-1), item.values.shape[-1]).to(item.values.dtype)
    return Item(votes * (norm / max(1, len(votes)) ** 0.5), 1.0, item.kind)


def teacher_from_votes(votes: Tensor, prediction_kind: str) -> Tensor:
    """What a teacher says of the rows whose noised votes these are, `[D, C]`: logits or probabilities."""
    classes = votes.shape[-1]
    p = torch.full_like(votes, (1 - SURE) / max(1, classes - 1))
    p.scatter_(-1, votes.argmax(-1, keepdim=True), SURE)
    return p if prediction_kind == "probabilities" else p.log()


# Label counts as they may be known where records are private.

COUNTS = "label counts"


def label_counts_charge(kind: str, privacy: PrivacyConfig) -> list[PrivacyCharge]:
    """What reading a client's label counts costs, once; nothing where they are only the number of rows."""
    return (
        []
        if kind == "regression"
        else [PrivacyCharge(1.0, scale=privacy.statistics_noise, once=COUNTS)]
    )


def noisy_label_counts(
    counts: Tensor, kind: str, privacy: PrivacyConfig, noise: NoiseSource, client: str
) -> Tensor:
    """Label counts as they may be known, `[outputs]`, nought or more: the same draw whenever it is asked for, one release.

    A row is counted once, under several labels up to `outputs` times. Rows themselves are no secret: of regression, where
    every count is their number, nothing is noised.
    """
    if kind == "regression":
        return counts
    once = math.sqrt(len(counts)) if kind == "multilabel" else 1.0
    deviation = once * privacy.statistics_noise * privacy.known_noise_multiplier
    return (counts + noise.normal(counts, deviation, client, COUNTS)).clamp(min=0)
