"""Encrypted sums against sums of Python integers, and what a server without the key can do."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

pytest.importorskip("tenseal", reason="tenseal is not installed: pip install 'hetero_fl[he]'")

import tenseal

from hetero_fl.communication import homomorphic
from hetero_fl.communication.homomorphic import SLOTS, EncryptedSum, SharedKey, ciphertext_shape
from hetero_fl.communication.vector_layout import FixedPoint, weight_unit
from hetero_fl.config.communication import HomomorphicConfig
from hetero_fl.core.payload import PayloadError
from tests.support.cases import each_case
from tests.support.homomorphic import shared_key

LENGTH = SLOTS + 5


def words(values: list[int]) -> np.ndarray:
    return np.array(values, np.int64).view(np.uint64)


def encrypted_sum(vectors: list[list[int]], noise_bits: int) -> list[int]:
    """Return the decrypted sum of encrypted vectors."""
    total = EncryptedSum(len(vectors[0]))
    for vector in vectors:
        total.add(shared_key().encrypt(words(vector), noise_bits))
    decrypted = shared_key().decrypt(total.rows(), len(vectors[0]), noise_bits)
    return [int(x) for x in decrypted.view(np.int64)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**32), st.sampled_from(["random", "equal", "signs"]))
def test_sums_at_the_limit_are_exact(clients: int, seed: int, kind: str) -> None:
    config = HomomorphicConfig()
    largest = int(config.range * 2 ** config.max_fraction_bits(clients))
    draws = random.Random(seed)
    vectors = [
        [
            {
                "random": draws.randint(-largest, largest),
                "equal": largest,
                "signs": draws.choice([-largest, largest]),
            }[kind]
            for _ in range(LENGTH)
        ]
        for _ in range(clients)
    ]

    decrypted = encrypted_sum(vectors, config.num_noise_bits(clients))

    assert decrypted == [sum(column) for column in zip(*vectors, strict=True)]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.floats(-1024, 1024, width=32), min_size=3, max_size=3),
    st.floats(-6, 3.0),
)
def test_sums_equal_plain_sums_to_a_millionth(values: list[float], magnitude: float) -> None:
    config = HomomorphicConfig()
    fixed = FixedPoint.from_config(config, 3, "channel.homomorphic")
    vectors = np.array(values)[:, None] / 1024 * 10.0**magnitude
    total = EncryptedSum(1)
    for vector in vectors:
        encoded = fixed.encode(vector)
        total.add(shared_key().encrypt(encoded, config.num_noise_bits(3)))

    decrypted = fixed.decode(shared_key().decrypt(total.rows(), 1, config.num_noise_bits(3)))

    bound = 3 * 2.0 ** -(fixed.bits + 1)
    assert abs(decrypted[0] - vectors.sum()) <= bound + 1e-12 * abs(vectors).max()
    # A millionth of the largest magnitude for sums of 0.003 and more.
    assert bound <= 1e-6 * 0.003


def test_error_of_a_mean_over_small_clients_has_the_documented_bound() -> None:
    rows = np.array([100_000, *[5_000] * 7, 50, 50])
    fixed = FixedPoint.from_config(HomomorphicConfig(), len(rows), "channel.homomorphic")
    unit = 2.0 ** weight_unit(rows)
    values = np.random.default_rng(0).normal(0, 0.05, (2, 5_000))
    weights = rows[-2:, None].astype(float)

    sums = [sum(fixed.encode(part / unit)) for part in (values * weights, weights)]
    mean, weight = (fixed.decode(np.asarray(total)) * unit for total in sums)

    error = np.abs(mean / weight - (values * weights).sum(0) / weights.sum()).max()
    bound = 2 * 2.0 ** -(fixed.bits + 1) * unit / weights.sum()
    assert 0.3 * bound < error < bound == pytest.approx(1.2e-6, rel=0.03)


def test_noise_has_the_documented_deviation() -> None:
    context = shared_key().context
    zeros = np.zeros(20 * SLOTS, np.uint64)
    rows = shared_key().encrypt(zeros, 0)
    noise = np.concatenate([tenseal.ckks_vector_from(context, r.tobytes()).decrypt() for r in rows])

    assert noise.std() == pytest.approx(147, rel=0.1)
    assert 2 ** (HomomorphicConfig().num_noise_bits(1) - 1) / 147 >= 13.9


def test_equal_vectors_have_different_ciphertexts_of_equal_length() -> None:
    zeros = [shared_key().encrypt(words([0]), 14) for _ in range(2)]
    large = shared_key().encrypt(words([2**40]), 14)

    assert not np.array_equal(*zeros)
    assert zeros[0].shape == large.shape == ciphertext_shape(1)


def test_server_has_no_key() -> None:
    context = homomorphic._load(homomorphic.public_context())
    total = EncryptedSum(1)
    total.add(shared_key().encrypt(words([7]), 14))

    for kind in ("secret_key", "galois_keys", "relin_keys"):
        has_key = getattr(context, f"has_{kind}")
        assert not has_key()
    assert not context.is_private()
    ciphertext = tenseal.ckks_vector_from(context, total.rows()[0].tobytes())
    with pytest.raises(ValueError, match="doesn't hold a secret_key"):
        ciphertext.decrypt()
    # The same context with the key can decrypt, so that the checks above are meaningful.
    assert shared_key().context.has_secret_key() and shared_key().context.is_private()
    assert len(homomorphic.public_context()) < 200 < len(shared_key().secret)


@each_case("clients", [1, 3, 1000])
def test_another_key_decrypts_nothing(clients: int) -> None:
    noise_bits = HomomorphicConfig().num_noise_bits(clients)
    rows = shared_key().encrypt(words([1234] * SLOTS), noise_bits)

    with pytest.raises(PayloadError, match="cannot be decrypted with this key"):
        SharedKey.generate().decrypt(rows, SLOTS, noise_bits)


@each_case(
    "change",
    [
        lambda rows: rows[:, :-1],
        lambda rows: rows[:0],
        lambda rows: np.concatenate([rows, rows]),
        np.zeros_like,
        lambda rows: np.where(np.arange(rows.shape[1]) < 50, 255, rows).astype(np.uint8),
        lambda rows: rows[:, ::-1].copy(),
    ],
)
def test_malformed_ciphertexts_leave_the_sum_unchanged(change: object) -> None:
    assert callable(change)
    rows = shared_key().encrypt(words([5]), 14)
    total = EncryptedSum(1)
    total.add(rows)

    with pytest.raises(PayloadError, match="ciphertext"):
        total.add(change(rows))

    assert shared_key().decrypt(total.rows(), 1, 14).tolist() == [5]


def test_ciphertexts_with_another_scale_are_refused() -> None:
    total = EncryptedSum(1)
    total.add(shared_key().encrypt(words([5]), 14))

    with pytest.raises(PayloadError, match="ciphertext"):
        total.add(shared_key().encrypt(words([5]), 10))
