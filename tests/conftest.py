"""What all tests have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small models gain nothing from threads, and their number decides the last bits."""
    torch.set_num_threads(1)


@pytest.fixture
def float64() -> Iterator[None]:
    """Everything in double precision, where rules are compared with independent references."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
