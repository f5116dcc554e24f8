"""Search of encoded payloads for numbers that must not leave a client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from hetero_fl.core.payload import Payload
from hetero_fl.experiment import PreparedRun
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.federation.round import ServerLink
from hetero_fl.federation.trainer import FederatedTrainer, add_evaluation
from tests.support.calls import record_results


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
def tapped() -> Iterator[list[bytes]]:
    """Collect the bytes of all payloads in both directions, encoded as between machines."""
    with pytest.MonkeyPatch.context() as patch:
        payloads = record_results(patch, Payload, "encode")
        encoded = property(lambda self: False, lambda self, value: None)
        for kind in (ClientRuntime, ServerLink):
            patch.setattr(kind, "skips_encoding", encoded, raising=False)
        yield payloads


@dataclass
class Found:
    """What a search of payloads has found.

    Attributes:
        rows: Number of triples of private rows.
        tensors: Number of triples of private tensors.
        payloads: The encoded payloads.
    """

    rows: int
    tensors: int
    payloads: set[bytes]

    def names(self, text: str) -> bool:
        """Return whether a payload contains a text."""
        return any(text.encode() in payload for payload in self.payloads)


def search_run(
    prepared: PreparedRun, is_private: Callable[[str], bool], rows: list[np.ndarray]
) -> Found:
    """Run all rounds with evaluations, and search the payloads for private numbers.

    Args:
        prepared: The run.
        is_private: Whether a tensor with a name must not leave a client.
        rows: Private rows.
    """
    with tapped() as payloads:
        trainer = prepared.make_trainer()
        tensors = private_tensors(trainer, is_private)
        for _ in range(prepared.config.rounds):
            record = trainer.run_round()
            add_evaluation(record, trainer.evaluate())
            tensors += private_tensors(trainer, is_private)
    different = set(payloads)
    sent = triples(array for payload in different for array in floats_in(payload))
    of_rows, of_tensors = (number_in_common(triples(each), sent) for each in (rows, tensors))
    return Found(of_rows, of_tensors, different)


def private_tensors(
    trainer: FederatedTrainer, is_private: Callable[[str], bool]
) -> list[np.ndarray]:
    """Return all current private tensors, of the server and the clients."""
    models = [dict(tensors) for tensors in trainer.server.models.values()]
    for client_id, info in trainer.federation.client_infos.items():
        models += [dict(tensors) for tensors in trainer.store.get(client_id).models.values()]
        models.append(dict(trainer.federation.initial_tensors(info.arch)))
    return [
        tensor.numpy()
        for tensors in models
        for name, tensor in tensors.items()
        if is_private(name) and tensor.numel() > 2
    ]
