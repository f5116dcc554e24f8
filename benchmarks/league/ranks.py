"""Mean ranks of methods over federations, and when they differ significantly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean


def mean_ranks(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the ranks of methods over federations.

    Args:
        scores: For each federation, the score of each method. Larger is better. All federations
            have the same methods.

    Returns:
        The mean rank of each method, where 1 is best. Equal scores share their mean rank.

    Example:
        >>> from benchmarks.league.ranks import mean_ranks
        >>> mean_ranks([{"a": 0.9, "b": 0.8, "c": 0.8}, {"a": 0.7, "b": 0.9, "c": 0.6}])
        {'a': 1.5, 'b': 1.75, 'c': 2.75}
    """
    # Slow to import.
    from scipy.stats import rankdata

    methods = list(scores[0])
    ranks = [rankdata([-federation[method] for method in methods]) for federation in scores]
    return {method: fmean(rank[i] for rank in ranks) for i, method in enumerate(methods)}


def critical_difference(num_methods: int, num_federations: int, alpha: float = 0.05) -> float:
    """Return the critical difference of mean ranks in the Nemenyi test.

    Two methods differ significantly if their mean ranks differ by at least this value (Demšar 2006,
    section 3.2.2).

    Args:
        num_methods: Number of methods k.
        num_federations: Number of federations N over which ranks are averaged.
        alpha: Significance level of the whole family.

    Example:
        >>> from benchmarks.league.ranks import critical_difference
        >>> round(critical_difference(5, 30), 2)  # Demšar (2006), q = 2.728
        1.11
    """
    # Slow to import.
    from scipy.stats import studentized_range

    q = float(studentized_range.isf(alpha, num_methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(num_methods * (num_methods + 1) / (6 * num_federations))
