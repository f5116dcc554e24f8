"""Noise that is drawn from a secret or a seed, and label counts with noise."""

from __future__ import annotations

import math

import pytest
import torch

from hetero_fl.config.protection import PrivacyConfig
from hetero_fl.privacy.noise import KeyedNoiseSource, SecretNoiseSource, noisy_label_counts
from hetero_fl.utils.seeding import keyed_generator
from tests.support.cases import each_case

SECRET = bytes(range(32))


def test_simulation_noise_matches_torch_generator() -> None:
    like = torch.zeros(3, 4)
    draws = keyed_generator("privacy", 7, "a", 1)
    first = torch.randn(3, 4, generator=draws) * 2.5
    uniform = torch.rand(5, generator=draws, dtype=torch.float64)
    stream = KeyedNoiseSource(7).stream("a", 1)
    assert torch.equal(stream.normal(like, 2.5), first)
    assert torch.equal(stream.uniform(5), uniform)
    assert torch.equal(KeyedNoiseSource(7).normal(like, 2.5, "a", 1), first)


@each_case("count", [1, 2, 3, 200_001])
def test_secret_noise_has_the_requested_distribution(count: int) -> None:
    drawn = (
        SecretNoiseSource(SECRET).stream("n").normal(torch.zeros(count, dtype=torch.float64), 3.0)
    )
    assert drawn.shape == (count,) and drawn.dtype == torch.float64 and bool(drawn.isfinite().all())
    if count < 1000:
        return
    z = drawn / 3
    assert abs(float(z.mean())) < 5 / math.sqrt(count)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / count)
    empirical = torch.arange(1, count + 1, dtype=torch.float64) / count
    exact = torch.special.ndtr(z.sort().values)
    # Kolmogorov-Smirnov test at the level 0.001.
    assert float((empirical - exact).abs().max()) < 1.95 / math.sqrt(count)
    assert abs(float((z[:-1] * z[1:]).mean())) < 5 / math.sqrt(count)
    half = count // 2 + 1
    # Cosine and sine with a common radius.
    assert abs(float((z[: half - 1] * z[half:]).mean())) < 5 / math.sqrt(half)
    u = SecretNoiseSource(SECRET).stream("u").uniform(count)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * count)


def test_noise_stream_does_not_repeat() -> None:
    stream = SecretNoiseSource(SECRET).stream("a")
    first, second = (stream.normal(torch.zeros(100), 1.0) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, SecretNoiseSource(SECRET).stream("a").normal(torch.zeros(100), 1.0))


def test_noise_streams_are_keyed() -> None:
    like = torch.zeros(8)
    result = [
        SecretNoiseSource(SECRET).stream("a"),
        SecretNoiseSource(SECRET).stream("a", 0),
        SecretNoiseSource(SECRET, b"task").stream("a"),
        SecretNoiseSource(bytes(32)).stream("a"),
        SecretNoiseSource().stream("a"),
    ]
    drawn = [stream.normal(like, 1.0) for stream in result]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_equal_values_get_equal_noise() -> None:
    """Different values with equal noise would reveal their difference."""
    noise, value = SecretNoiseSource(SECRET), torch.arange(6.0).reshape(2, 3)
    first = noise.normal(value, 1.0, "sum", 0)
    noise.task = b"another"
    assert torch.equal(first, noise.normal(value.clone(), 1.0, "sum", 0))
    other = value.clone()
    other[1, 2] = 5.0000005
    different = [
        first,
        noise.normal(other, 1.0, "sum", 0),
        noise.normal(value, 1.5, "sum", 0) / 1.5,
        noise.normal(value, 1.0, "sum", 1),
    ]
    assert all(
        not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(different) for b in different[:i]
    )


PRIVACY = PrivacyConfig(noise_multiplier=2.0, statistics_noise=3.0, delta=1e-4)
COUNTS = torch.full((400,), 1e6)


@each_case(("kind", "norm_of_a_row"), [("multiclass", 1.0), ("multilabel", 20.0)])
def test_noised_counts_scale_with_sensitivity(kind: str, norm_of_a_row: float) -> None:
    noise = noisy_label_counts(COUNTS, kind, PRIVACY, KeyedNoiseSource(0), "site_1") - COUNTS

    deviation = norm_of_a_row * 2.0 * 3.0
    assert float(noise.std()) == pytest.approx(deviation, rel=4 / math.sqrt(2 * len(COUNTS)))


def test_noised_counts_are_non_negative() -> None:
    empty = torch.zeros(400)

    assert (
        noisy_label_counts(empty, "multiclass", PRIVACY, KeyedNoiseSource(0), "site_1") >= 0
    ).all()
    assert noisy_label_counts(empty, "regression", PRIVACY, KeyedNoiseSource(0), "site_1") is empty
