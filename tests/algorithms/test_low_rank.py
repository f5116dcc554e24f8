"""Low-rank terms: the energy rule, sizes, and decoding of any matching width."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from hetero_fl.algorithms.mutual import compress_low_rank, reconstruct_low_rank
from tests.support.cases import each_case

pytestmark = pytest.mark.usefixtures("float64")


def spectrum(m: int, n: int, values: list[float]) -> torch.Tensor:
    g = torch.Generator().manual_seed(m * n)
    u, v = (torch.linalg.qr(torch.randn(s, len(values), generator=g)).Q for s in (m, n))
    return u @ torch.diag(torch.tensor(values)) @ v.T


@each_case(("energy", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (0.98, 2), (0.999, 3), (1.0, 3)])
def test_low_rank_keeps_fewest_terms_with_the_energy(energy: float, rank: int) -> None:
    # Squares 64, 34.81 and 1 of 99.81.
    matrix = spectrum(20, 30, [8.0, 5.9, 1.0])
    (packed,) = compress_low_rank({"w": matrix}, energy).values()
    assert packed.shape == (rank, 50)
    u, s, v = np.linalg.svd(matrix.numpy())
    expected = torch.from_numpy(u[:, :rank] * s[:rank] @ v[:rank])
    assert torch.allclose(
        reconstruct_low_rank({"w": packed}, {"w": matrix})["w"], expected, rtol=0, atol=1e-12
    )


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
    st.floats(0.01, 1),
    st.integers(0, 1000),
)
def test_low_rank_error_is_bounded_by_the_omitted_energy(m, n, size, energy, seed) -> None:
    tensor = torch.randn(
        m, n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    packed = compress_low_rank({"w": tensor}, energy)["w"]
    back = reconstruct_low_rank({"w": packed}, {"w": tensor})["w"]
    assert back.shape == tensor.shape and packed.numel() < tensor.numel() + m + n * size
    assert (back - tensor).square().sum() <= (1 - energy) * tensor.square().sum() + 1e-12


@each_case("energy", [0.9999, 2.0])
def test_full_rank_matrix_is_sent_exactly(energy: float) -> None:
    matrix = torch.randn(6, 7, generator=torch.Generator().manual_seed(3))

    packed = compress_low_rank({"w": matrix}, energy)

    assert packed["w"].shape == (4, 13)
    assert torch.equal(reconstruct_low_rank(packed, {"w": matrix})["w"], matrix)


def test_vectors_are_unchanged_and_zero_has_one_term() -> None:
    tensors = {
        "bias": torch.arange(4.0),
        "one": torch.tensor(2.0),
        "still": torch.zeros(8, 3, 3, 3),
    }
    packed = compress_low_rank(tensors, 0.95)
    assert packed["still"].shape == (1, 8 + 27)
    back = reconstruct_low_rank(packed, tensors)
    assert all(torch.equal(back[n], t) for n, t in tensors.items())


@given(st.integers(1, 12))
def test_low_rank_decodes_any_number_of_rows(rows: int) -> None:
    assert reconstruct_low_rank({"w": torch.ones(rows, 9)}, {"w": torch.zeros(4, 5)})[
        "w"
    ].shape == (
        4,
        5,
    )
