"""Robust aggregation rules for vectors `[n, d]` in NumPy and float64, as in the papers."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize


def median(v):
    return np.median(v, axis=0)


def trimmed_mean(v, f):
    return np.array([np.mean(sorted(column)[f : len(column) - f]) for column in v.T])


def krum_scores(v, f):
    n = len(v)
    return [
        sum(sorted(((v[i] - v[j]) ** 2).sum() for j in range(n) if j != i)[: max(1, n - f - 2)])
        for i in range(n)
    ]


def krum(v, f):
    return v[int(np.argmin(krum_scores(v, f)))]


def multi_krum(v, f):
    order = np.argsort(krum_scores(v, f), kind="stable")[: len(v) - f]
    return v[order].mean(0)


def geometric_median(v):
    def distance(x):
        return np.linalg.norm(v - x, axis=1).sum()

    return minimize(distance, v.mean(0), method="BFGS", options={"gtol": 1e-9}).x


def norm_bound(v, start, bound=None):
    updates = v - start
    norms = np.linalg.norm(updates, axis=1)
    most = np.median(norms) if bound is None else bound
    return start + np.mean(
        [u * min(1.0, most / n) for u, n in zip(updates, norms, strict=True)], axis=0
    )


def agreement(predictions, f):
    n, rows, classes = predictions.shape
    result = np.zeros((rows, classes))
    for r in range(rows):
        first = predictions[:, r].argmax(1)
        weights = np.array([(first == first[i]).sum() - 1 for i in range(n)], dtype=float)
        weights[weights < max(1, f)] = 0
        norms = np.linalg.norm(predictions[:, r], axis=1)
        clipped = predictions[:, r] * np.minimum(1, np.median(norms) / norms)[:, None]
        result[r] = (
            weights @ clipped / weights.sum()
            if weights.sum()
            else np.median(predictions[:, r], axis=0)
        )
    return result
