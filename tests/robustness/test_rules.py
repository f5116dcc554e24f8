"""Robust rules compared with references, and bounds on the effect of malicious clients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hetero_fl.config.protection import PREDICTIONS, RULES, AggregationConfig
from hetero_fl.robustness.rules import (
    UploadBlock,
    krum_scores,
    prediction_rule,
    rule,
    trimmed_mean,
)
from tests.references import robust_rules
from tests.support.cases import each_case

pytestmark = pytest.mark.usefixtures("float64")
CLIENTS, MALICIOUS = 11, 2
SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 4), "b": (4,), "c": ()}


def split(vector: np.ndarray) -> dict[str, torch.Tensor]:
    result, place = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        result[name], place = (
            torch.tensor(vector[place : place + size]).reshape(shape),
            place + size,
        )
    return result


def joined(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensors[name].numpy().ravel() for name in SHAPES])


def vectors(seed: int = 0, n: int = CLIENTS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 17))


def combined(
    name: str,
    v: np.ndarray,
    num_malicious: int = MALICIOUS,
    start=None,
    **settings: object,
) -> np.ndarray:
    references = None if start is None else [split(start)] * len(v)
    block = UploadBlock(list(map(split, v)), references)
    return joined(
        rule[name](AggregationConfig(rule=name, **settings)).combine(block, num_malicious)
    )


@each_case(("n", "seed"), itertools.product([11, 12], [0, 1, 2]))
def test_rules_match_references(seed: int, n: int) -> None:
    v, start = vectors(seed, n), vectors(seed + 10)[0]
    wanted = {
        "median": robust_rules.median(v),
        "trimmed_mean": robust_rules.trimmed_mean(v, MALICIOUS),
        "krum": robust_rules.krum(v, MALICIOUS),
        "multi_krum": robust_rules.multi_krum(v, MALICIOUS),
        "geometric_median": robust_rules.geometric_median(v),
        "norm_bound": robust_rules.norm_bound(v, start),
    }
    assert {*wanted, "mean"} == set(RULES)
    for name, expected in wanted.items():
        got = combined(name, v, start=start)
        # The reference of the geometric median is itself a numerical minimum.
        atol = 1e-6 if name == "geometric_median" else 1e-10
        assert np.allclose(got, expected, rtol=0, atol=atol), name
    scores = krum_scores(UploadBlock(list(map(split, v)), None).distances(), MALICIOUS)
    assert np.allclose(scores, robust_rules.krum_scores(v, MALICIOUS), rtol=0, atol=1e-10)
    got = combined("norm_bound", v, start=start, bound=0.5)
    assert np.allclose(got, robust_rules.norm_bound(v, start, 0.5), rtol=0, atol=1e-10)


@each_case("name", ["median", "trimmed_mean", "krum", "multi_krum", "geometric_median"])
def test_outliers_stay_within_range_of_benign_uploads(name: str) -> None:
    v = vectors()
    v[[3, 7]] = 1e6
    v[7] *= -1
    benign = np.delete(v, [3, 7], axis=0)
    got = combined(name, v)
    assert (got >= benign.min(0)).all() and (got <= benign.max(0)).all()
    if name == "krum":
        assert any(np.array_equal(got, row) for row in benign)


def test_influence_of_a_malicious_client_is_bounded() -> None:
    v, start = vectors(), np.zeros(17)
    v[[3, 7]] = 1e6
    benign = np.delete(v, [3, 7], axis=0)
    assert (
        np.linalg.norm(combined("norm_bound", v, start=start))
        <= np.median(np.linalg.norm(v, axis=1)) + 1e-9
    )
    assert np.linalg.norm(robust_rules.median(v) - robust_rules.median(benign)) < 5


@each_case("name", [n for n in RULES if n != "mean"])
def test_rules_return_equal_uploads(name: str) -> None:
    v = np.tile(vectors()[0], (CLIENTS, 1))
    got = combined(name, v, 0, start=np.zeros(17))
    assert np.allclose(got, v.mean(0), rtol=0, atol=1e-12)


def test_trimmed_mean_without_malicious_clients_is_the_mean() -> None:
    for name in ("trimmed_mean", "multi_krum"):
        assert np.allclose(combined(name, vectors(), 0), vectors().mean(0), rtol=0, atol=1e-12), (
            name
        )


def test_buffers_follow_selected_clients() -> None:
    v = vectors()
    members = [
        {**split(row), "running": torch.tensor([1e9 * i, float(i)])} for i, row in enumerate(v)
    ]
    block = UploadBlock(members, None, frozenset(SHAPES))
    expected = int(np.argmin(robust_rules.krum_scores(v, MALICIOUS)))
    got = rule["krum"](AggregationConfig(rule="krum")).combine(block, MALICIOUS)
    assert torch.equal(got["running"], members[expected]["running"])
    bounded = rule["norm_bound"](AggregationConfig(rule="norm_bound", bound=1e-3)).combine(
        block, MALICIOUS
    )["running"]
    # The bound applies to updates, not to buffers.
    assert bounded[0] > 1e9
    # The median of the buffers does not depend on the parameters.
    medians = rule["geometric_median"](AggregationConfig()).combine(block, MALICIOUS)
    assert medians["running"].tolist() == pytest.approx([5e9, 5])


def test_minimum_numbers_of_clients() -> None:
    least = {
        name: rule[name](AggregationConfig(rule=name)).min_clients(3)
        for name in RULES
        if name != "mean"
    }
    assert least.pop("krum") == least.pop("multi_krum") == 9
    assert set(least.values()) == {7} and len(least) == 4


# Predictions
def sample_predictions(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    truth = 3 * np.eye(4)[rng.integers(4, size=6)]
    return truth + rng.normal(size=(CLIENTS, 6, 4))


def consensus(name: str, predictions: np.ndarray) -> np.ndarray:
    how = prediction_rule[name](AggregationConfig(predictions=name))
    return how.combine(torch.tensor(predictions), MALICIOUS).numpy()


@each_case("seed", [0, 1, 2])
def test_prediction_rules_match_references(seed: int) -> None:
    predictions = sample_predictions(seed)
    assert np.allclose(
        consensus("median", predictions), np.median(predictions, 0), rtol=0, atol=1e-12
    )
    assert np.allclose(
        consensus("agreement", predictions),
        robust_rules.agreement(predictions, MALICIOUS),
        rtol=0,
        atol=1e-12,
    )


@each_case("name", [n for n in PREDICTIONS if n != "mean"])
def test_colluding_clients_do_not_decide_a_row(name: str) -> None:
    predictions = sample_predictions()
    right = predictions.mean(0).argmax(1)
    predictions[[2, 5]] = 1e6 * np.eye(4)[(right + 1) % 4]
    assert (consensus(name, predictions).argmax(1) == right).all()
    # As with the plain mean.
    assert (predictions.mean(0).argmax(1) != right).all()


def test_median_of_an_even_number() -> None:
    assert trimmed_mean(torch.tensor([4.0, 1.0, 100.0, 2.0])) == 3
    assert trimmed_mean(torch.tensor([4.0, 1.0, 100.0, 2.0, 0.0]), 1) == pytest.approx(7 / 3)
