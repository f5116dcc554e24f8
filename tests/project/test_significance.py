"""Paired tests, Holm's correction, ranks and critical differences against references."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from benchmarks.league.ranks import critical_difference, mean_ranks
from hetero_fl.reporting.comparison.significance import holm, paired_difference
from tests.support.cases import each_case

A = {0: 0.81, 1: 0.79, 2: 0.86, 3: 0.77, 4: 0.83, 5: 0.80}
B = {0: 0.78, 1: 0.80, 2: 0.80, 3: 0.71, 4: 0.82, 7: 0.10}


def test_paired_difference_equals_the_textbook_formulas() -> None:
    found = paired_difference(A, B)
    assert found is not None
    differences = np.array([A[seed] - B[seed] for seed in range(5)])
    error = differences.std(ddof=1) / math.sqrt(5)
    # The 97.5% quantile of Student's t distribution with four degrees of freedom.
    assert found.low == pytest.approx(differences.mean() - 2.7764451 * error)
    assert found.high == pytest.approx(differences.mean() + 2.7764451 * error)
    expected = stats.ttest_rel([A[s] for s in range(5)], [B[s] for s in range(5)])
    assert found.p == pytest.approx(expected.pvalue)
    assert found.num_seeds == 5, "seeds of only one method are left out"


def test_paired_difference_needs_five_common_seeds() -> None:
    assert paired_difference({s: A[s] for s in range(4)}, B) is None


@each_case(("shift", "p"), [(0.0, 1.0), (-0.1, 0.0)])
def test_equal_differences_have_no_test_statistic(shift: float, p: float) -> None:
    found = paired_difference(
        {s: 0.5 + 0.01 * s + shift for s in range(5)}, {s: 0.5 + 0.01 * s for s in range(5)}
    )
    assert found is not None
    assert found.p == p
    assert found.low == found.high == pytest.approx(shift)


def test_holm_corrects_the_example_of_a_textbook() -> None:
    # Aickin and Gensler (1996): the smallest p-value is multiplied by the number of tests, the
    # second smallest by one less, and so on; corrected values never decrease.
    assert holm([0.01, 0.013, 0.014, 0.19, 0.35, 0.5, 0.63, 0.67, 0.75, 0.81]) == pytest.approx(
        [0.1, 0.117, 0.117, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_as_the_step_down_procedure(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for alpha in (0.01, 0.05, 0.2):
        rejected = set()
        for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[index] * (len(p_values) - place) > alpha:
                break
            rejected.add(index)
        assert {i for i, p in enumerate(corrected) if p <= alpha} == rejected
    assert all(raw <= p <= 1 for raw, p in zip(p_values, corrected, strict=True))


def test_mean_ranks_share_the_rank_of_equal_scores() -> None:
    rng = np.random.default_rng(0)
    scores = [{m: float(rng.integers(0, 4)) for m in "abcde"} for _ in range(7)]
    expected = pd.DataFrame(scores).rank(axis=1, ascending=False).mean()
    assert mean_ranks(scores) == pytest.approx(expected.to_dict())


@each_case(("k", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (10, 3.164)])
def test_critical_difference_has_the_values_of_demsar(k: int, q: float) -> None:
    # Table 5a of Demšar (2006).
    assert critical_difference(k, 14) == pytest.approx(q * math.sqrt(k * (k + 1) / 84), abs=2e-3)
