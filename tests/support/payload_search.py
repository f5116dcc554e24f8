"""Search of encoded payloads for numbers that must not leave a client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest

from hetero_fl.core.payload import Payload
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.federation.trainer import FederatedTrainer


def triples(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Return 64-bit hashes of all three consecutive float32 numbers.

    Triples with round numbers such as 0 or 1 are left out, so that equal hashes are no coincidence.
    """
    found = []
    for array in arrays:
        bits = (
            np.ascontiguousarray(array, dtype=np.float32)
            .reshape(-1)
            .view(np.uint32)
            .astype(np.uint64)
        )
        # 0, 1, 0.5, infinity
        plain = (bits & np.uint64(0xFFFF)) == 0
        with np.errstate(over="ignore"):
            mixed = (bits[:-2] * np.uint64(0x9E3779B97F4A7C15)) ^ (
                bits[1:-1] * np.uint64(0xC2B2AE3D27D4EB4F)
            )
            mixed = mixed * np.uint64(0xBF58476D1CE4E5B9) + bits[2:] * np.uint64(0x94D049BB133111EB)
        found.append(mixed[~(plain[:-2] | plain[1:-1] | plain[2:])])
    return np.concatenate(found)


def number_in_common(private: np.ndarray, sent: np.ndarray) -> int:
    """Return the number of distinct hashes of `private` that are among `sent`."""
    # pandas looks values up several times faster than NumPy sorts them.
    hashes = pd.Series(sent)
    return int(hashes[hashes.isin(private)].nunique())


def floats_in(data: bytes) -> Iterator[np.ndarray]:
    """Yield the bytes as float32 numbers, at each of the four possible alignments."""
    for start in range(4):
        yield np.frombuffer(
            data[start : start + (len(data) - start) // 4 * 4], dtype=np.uint32
        ).view(np.float32)


@contextmanager
def tapped() -> Iterator[set[bytes]]:
    """Collect the bytes of all payloads in both directions, encoded as between machines."""
    payloads: set[bytes] = set()
    encode = Payload.encode

    def tap(self: Payload) -> bytes:
        data = encode(self)
        payloads.add(data)
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Payload, "encode", tap)
        encoded = property(lambda self: False, lambda self, value: None)
        for kind in (ClientRuntime, FederatedTrainer):
            patch.setattr(kind, "skips_encoding", encoded, raising=False)
        yield payloads
