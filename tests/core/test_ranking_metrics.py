"""Hit rate and NDCG of recommended items, against hand-computed values and short references."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from hetero_fl.core.metrics import (
    RANKING,
    metric_names,
    ranking_metrics,
    score,
    selection_metric,
)
from hetero_fl.core.task import Task
from hetero_fl.data import Examples
from hetero_fl.data.checks import check_examples
from tests.support.cases import each_case

ITEMS = Task("multiclass", 40, is_ranking=True)


def reference(
    scores: np.ndarray,
    y: np.ndarray,
    candidates: np.ndarray | None = None,
    excluded: np.ndarray | None = None,
) -> list[float]:
    gains = []
    hits = []
    for row, true in enumerate(y):
        pool = set(range(scores.shape[1])) if candidates is None else set(candidates[row])
        others = pool - {true}
        if excluded is not None:
            others -= set(np.flatnonzero(excluded[row]))
        order = sorted(others | {true}, key=lambda item: (-scores[row, item], item == true))
        rank = order.index(true) + 1
        hits.append(float(rank <= 10))
        gains.append(1 / math.log2(rank + 1) if rank <= 10 else 0.0)
    return [float(np.mean(gains)), float(np.mean(hits))]


def test_metrics_match_a_reference_that_sorts_items() -> None:
    draws = np.random.default_rng(0)
    normal = draws.normal(size=(300, 40))
    y = draws.integers(0, 40, 300)
    others = np.stack([draws.permutation(np.delete(np.arange(40), true))[:15] for true in y])

    for decimals, candidates in itertools.product((1, 8), (None, others)):
        # With one decimal, many scores are equal.
        scores = np.round(normal, decimals)
        given = None if candidates is None else torch.from_numpy(candidates)
        found = ranking_metrics(torch.from_numpy(scores), torch.from_numpy(y), given)
        expected = reference(scores, y, candidates)
        assert found.tolist() == pytest.approx(expected, abs=1e-12), decimals


@each_case("decimals", (1, 8))
def test_excluded_items_have_no_rank(decimals: int) -> None:
    draws = np.random.default_rng(1)
    scores = np.round(draws.normal(size=(300, 43)), decimals)
    y = draws.integers(0, 43, 300)
    excluded = draws.random((300, 43)) < 0.6
    excluded[np.arange(300), y] = False
    task = Task("multiclass", 43, is_ranking=True)
    candidates = torch.from_numpy((y[:, None] + np.arange(1, 16)) % 43)

    found = score(
        task,
        torch.from_numpy(scores),
        torch.from_numpy(y),
        candidates=candidates,
        excluded=torch.from_numpy(np.packbits(excluded, axis=1)),
    )

    expected = reference(scores, y, excluded=excluded)
    assert [found["ndcg_10"], found["hit_rate_10"]] == pytest.approx(expected, abs=1e-12)
    sampled = reference(scores, y, candidates.numpy())
    assert [found[name] for name in RANKING[2:]] == pytest.approx(sampled, abs=1e-12)
    assert expected != pytest.approx(reference(scores, y), abs=0.1)


def test_ranks_1_2_10_and_11_by_hand() -> None:
    scores = torch.arange(40.0, 0, -1).expand(4, 40)
    y = torch.tensor([0, 1, 9, 10])

    found = score(ITEMS, scores, y, candidates=torch.tensor([[20], [0], [20], [20]]))

    gains = (1.0, 1 / math.log2(3), 1 / math.log2(11), 0.0)
    assert found["hit_rate_10"] == 0.75
    assert found["ndcg_10"] == pytest.approx(sum(gains) / 4, abs=1e-12)
    # Among one candidate, the second true item has rank 2 and all others rank 1.
    assert found["sampled_hit_rate_10"] == 1.0
    assert found["sampled_ndcg_10"] == pytest.approx((3 + 1 / math.log2(3)) / 4, abs=1e-12)


def test_ties_count_against_the_model() -> None:
    found = score(ITEMS, torch.zeros(3, 40), torch.tensor([0, 5, 39]))
    assert found["hit_rate_10"] == 0.0 and found["ndcg_10"] == 0.0


def test_undefined_rankings_are_none() -> None:
    logits = torch.zeros(2, 40)
    logits[0, 3] = torch.nan
    y = torch.tensor([1, 2])
    candidates = torch.zeros(2, 5, dtype=torch.int64)

    assert [score(ITEMS, logits, y, None, candidates)[name] for name in RANKING] == [None] * 4
    without = score(ITEMS, torch.randn(2, 40), y)
    assert without["sampled_ndcg_10"] is None and without["ndcg_10"] is not None
    assert set(score(ITEMS, logits[:0], y[:0]).values()) == {None}


def test_rankings_are_metrics_of_their_task_only() -> None:
    assert metric_names(ITEMS)[:4] == RANKING and selection_metric(ITEMS) == ("ndcg_10", 1)
    small = Task("multiclass", 5, is_ranking=True)
    assert tuple(score(small, torch.randn(4, 5), torch.tensor([0, 1, 2, 3]))) == metric_names(small)
    plain = Task("multiclass", 40)
    assert not set(RANKING) & set(score(plain, torch.randn(2, 40), torch.tensor([1, 2])))


def test_excluded_classes_may_be_all_but_the_one_of_the_row() -> None:
    mask = np.zeros((2, 40), bool)
    mask[0, [3, 5]] = True
    mask[1, 7] = True
    bits = torch.from_numpy(np.packbits(mask, axis=1))

    check_examples(Examples(torch.zeros(2, 3), torch.tensor([4, 6]), excluded=bits), ITEMS, "data")
