"""Hit rate and NDCG of recommended items, against hand-computed values and short references."""

from __future__ import annotations

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
    excluded: np.ndarray | None = None,
) -> list[float]:
    gains = []
    hits = []
    for row, true in enumerate(y):
        others = set(range(scores.shape[1])) - {true}
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

    for decimals in (1, 8):
        # With one decimal, many scores are equal.
        scores = np.round(normal, decimals)
        found = ranking_metrics(torch.from_numpy(scores), torch.from_numpy(y))
        expected = reference(scores, y)
        assert found.tolist() == pytest.approx(expected, abs=1e-12), decimals


@each_case("decimals", (1, 8))
def test_excluded_items_have_no_rank(decimals: int) -> None:
    draws = np.random.default_rng(1)
    scores = np.round(draws.normal(size=(300, 43)), decimals)
    y = draws.integers(0, 43, 300)
    excluded = draws.random((300, 43)) < 0.6
    excluded[np.arange(300), y] = False
    task = Task("multiclass", 43, is_ranking=True)

    found = score(
        task,
        torch.from_numpy(scores),
        torch.from_numpy(y),
        excluded=torch.from_numpy(np.packbits(excluded, axis=1)),
    )

    expected = reference(scores, y, excluded=excluded)
    assert [found["ndcg_10"], found["hit_rate_10"]] == pytest.approx(expected, abs=1e-12)
    assert expected != pytest.approx(reference(scores, y), abs=0.1)


def test_ranks_1_2_10_and_11_by_hand() -> None:
    scores = torch.arange(40.0, 0, -1).expand(4, 40)
    y = torch.tensor([0, 1, 9, 10])

    found = score(ITEMS, scores, y)

    gains = (1.0, 1 / math.log2(3), 1 / math.log2(11), 0.0)
    assert found["hit_rate_10"] == 0.75
    assert found["ndcg_10"] == pytest.approx(sum(gains) / 4, abs=1e-12)


def test_ties_count_against_the_model() -> None:
    found = score(ITEMS, torch.zeros(3, 40), torch.tensor([0, 5, 39]))
    assert found["hit_rate_10"] == 0.0 and found["ndcg_10"] == 0.0


def test_undefined_rankings_are_none() -> None:
    logits = torch.zeros(2, 40)
    logits[0, 3] = torch.nan
    y = torch.tensor([1, 2])

    assert [score(ITEMS, logits, y)[name] for name in RANKING] == [None, None]
    assert score(ITEMS, torch.randn(2, 40), y)["ndcg_10"] is not None
    assert set(score(ITEMS, logits[:0], y[:0]).values()) == {None}


def test_rankings_are_metrics_of_their_task_only() -> None:
    assert metric_names(ITEMS)[:2] == RANKING and selection_metric(ITEMS) == ("ndcg_10", 1)
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
