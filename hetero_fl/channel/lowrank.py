"""Matrices as sums of few rank-one terms: a truncated SVD that keeps a share of the energy (Wu et al. 2022, FedKD, eq. 8).

A tensor of two dimensions or more is a matrix `[m, n]`: its first dimension against all others (a convolution's output channels
against the rest). Vectors are few numbers, and stay as they are. A matrix travels as one tensor `[k, m + n]` whose rows are the
terms, the singular value in the left one; where k terms would be no smaller than the matrix, as its own numbers in rows of
m + n, padded with nought. The number of rows tells which: terms are used only where there are fewer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.architecture import Tensors


def compress(tensors: Mapping[str, Tensor], energy: float) -> Tensors:
    """Each matrix by the fewest terms whose squared singular values sum to at least `energy` (0 to 1) of the whole, at least
    one. Above 1 no terms suffice, and all travel as their own numbers: the most that it can be. Values must be finite."""
    return {n: _terms(t.reshape(len(t), -1), energy) if t.ndim > 1 else t for n, t in tensors.items()}


def restore(packed: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensors:
    """The reverse of `compress`, in the shapes of `like`. Any `[k, m + n]` has a meaning."""
    return {n: _matrix(t, like[n]) if like[n].ndim > 1 else t for n, t in packed.items()}


def widest(shape: Sequence[int]) -> tuple[int, int]:
    """The shape of a packed matrix (a tensor of this shape, of two dimensions or more) that holds its own numbers: the most
    rows that it can have, and their width."""
    m, n = shape[0], math.prod(shape[1:])
    return _rows_of_numbers(m, n), m + n


def _rows_of_numbers(m: int, n: int) -> int:
    """Rows of m + n that hold m · n numbers."""
    return -(-m * n // (m + n))


def _terms(matrix: Tensor, energy: float) -> Tensor:
    m, n = matrix.shape
    most = _rows_of_numbers(m, n)
    if energy <= 1:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        kept = s.square().cumsum(0)
        k = min(int((kept < energy * kept[-1]).sum()) + 1, len(s))
        if k < most:
            return torch.cat([u[:, :k].T * s[:k, None], v[:k]], 1)
    return F.pad(matrix.reshape(-1), (0, most * (m + n) - m * n)).reshape(most, m + n)


def _matrix(packed: Tensor, like: Tensor) -> Tensor:
    m, n = len(like), like[0].numel()
    if len(packed) == _rows_of_numbers(m, n):
        return packed.reshape(-1)[: m * n].reshape(like.shape)
    return (packed[:, :m].T @ packed[:, m:]).reshape(like.shape)
