"""Low-rank terms: the energy rule, what is smaller, and that anything of the right width decodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero_fl.communication.compression import compress_low_rank, reconstruct_low_rank

pytestmark = pytest.mark.usefixtures("float64")


def spectrum(m: int, n: int, values: list[float]) -> torch.Tensor:
    g = torch.Generator().manual_seed(m * n)
    u, v = (torch.linalg.qr(torch.randn(s, len(values), generator=g)).Q for s in (m, n))
    return u @ torch.diag(torch.tensor(values)) @ v.T


@pytest.mark.parametrize(
    "energy, rank", [(0.5, 1), (0.64, 1), (0.65, 2), (0.98, 2), (0.999, 3), (1.0, 3)]
)
def test_it_keeps_the_fewest_terms_with_that_share_of_the_energy(energy: float, rank: int) -> None:
    matrix = spectrum(20, 30, [8.0, 5.9, 1.0])  # squares 64, 34.81, 1 of 99.81
    (packed,) = compress_low_rank({"w": matrix}, energy).values()
    assert packed.shape == (rank, 50)
    u, s, v = np.linalg.svd(matrix.numpy())
    want = torch.from_numpy(u[:, :rank] * s[:rank] @ v[:rank])
    assert torch.allclose(
        reconstruct_low_rank({"w": packed}, {"w": matrix})["w"], want, rtol=0, atol=1e-12
    )


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
    st.floats(0.01, 1),
    st.integers(0, 1000),
)
def test_what_is_lost_is_less_than_the_energy_left_out_and_nothing_grows(
    m, n, size, energy, seed
) -> None:
    tensor = torch.randn(
        m, n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    packed = compress_low_rank({"w": tensor}, energy)["w"]
    back = reconstruct_low_rank({"w": packed}, {"w": tensor})["w"]
    assert back.shape == tensor.shape and packed.numel() < tensor.numel() + m + n * size
    assert (back - tensor).square().sum() <= (1 - energy) * tensor.square().sum() + 1e-12


def test_a_full_rank_matrix_travels_as_its_own_numbers_to_the_bit() -> None:
    matrix = torch.randn(6, 7, generator=torch.Generator().manual_seed(3))
    packed = compress_low_rank({"w": matrix}, 0.9999)["w"]
    assert packed.shape == (4, 13) and torch.equal(
        reconstruct_low_rank({"w": packed}, {"w": matrix})["w"], matrix
    )


def test_vectors_and_numbers_stay_and_nought_has_one_term() -> None:
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
def test_any_number_of_rows_decodes(rows: int) -> None:
    assert reconstruct_low_rank({"w": torch.ones(rows, 9)}, {"w": torch.zeros(4, 5)})[
        "w"
    ].shape == (
        4,
        5,
    )


def test_above_one_no_terms_suffice_and_nothing_is_larger() -> None:
    tensors = {"still": torch.zeros(6, 7), "one": torch.ones(6, 7), "bias": torch.ones(3)}
    packed = compress_low_rank(tensors, 2.0)
    assert packed["still"].shape == packed["one"].shape == (4, 13)
    assert all(torch.equal(reconstruct_low_rank(packed, tensors)[n], t) for n, t in tensors.items())
