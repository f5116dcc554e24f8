"""Statistics of comparisons: paired tests over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIN_SEEDS = 5
"""Minimum number of seeds for a paired t-test.

With fewer seeds, the test has little power and depends strongly on normality.
"""
CONFIDENCE = 0.95
"""Confidence level of intervals."""
EQUAL = 1e-12
"""Largest difference of scores that counts as none."""


@dataclass(frozen=True)
class PairedDifference:
    """The difference between two methods, paired by seed.

    Attributes:
        mean: Mean of the differences.
        low: Lower end of the confidence interval of the mean.
        high: Upper end of the confidence interval of the mean.
        p: p-value of a two-sided paired t-test.
        num_seeds: Number of seeds that both methods have.
    """

    mean: float
    low: float
    high: float
    p: float
    num_seeds: int


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> PairedDifference | None:
    """Compare two methods with a paired t-test over the seeds that both have.

    Args:
        a: Scores of the first method, keyed by seed.
        b: Scores of the second method, keyed by seed.

    Returns:
        The difference a − b, or None if the methods share fewer than `MIN_SEEDS` seeds.

    Example:
        >>> from hetero_fl.reporting.comparison.significance import paired_difference
        >>> a = {0: 0.80, 1: 0.82, 2: 0.81, 3: 0.79, 4: 0.83}
        >>> b = {0: 0.78, 1: 0.81, 2: 0.78, 3: 0.78, 4: 0.80}
        >>> found = paired_difference(a, b)
        >>> print(f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}], p = {found.p:.3f}")
        0.020 [0.008, 0.032], p = 0.011
    """
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < MIN_SEEDS:
        return None
    differences = np.array([a[seed] - b[seed] for seed in seeds])
    mean = float(differences.mean())
    # With equal differences, the test statistic is undefined or infinite.
    if np.ptp(differences) <= EQUAL:
        return PairedDifference(mean, mean, mean, 1.0 if abs(mean) <= EQUAL else 0.0, len(seeds))
    # Slow to import.
    from scipy import stats

    result = stats.ttest_1samp(differences, 0.0)
    interval = result.confidence_interval(CONFIDENCE)
    return PairedDifference(
        mean, float(interval.low), float(interval.high), float(result.pvalue), len(seeds)
    )


def holm(p_values: Sequence[float], num_tests: int | None = None) -> list[float]:
    """Correct the p-values of a family of tests with the step-down method of Holm (1979).

    Args:
        p_values: p-values of the tests of the family.
        num_tests: Number of tests of the family, if `p_values` lacks some of them. The correction
            is then conservative. If None, the family has no other tests.

    Returns:
        The corrected p-values in the same order. A test is significant at level α if its corrected
        p-value is at most α.

    Example:
        >>> from hetero_fl.reporting.comparison.significance import holm
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    num_tests = num_tests or len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (num_tests - place) * p_values[index]))
        corrected[index] = largest
    return corrected
