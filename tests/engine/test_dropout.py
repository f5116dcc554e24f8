"""Dropout whose masks follow from a key."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.engine.batches import KeyedDropout

ONES = torch.ones(100_000)


def dropped(key: int, p: float) -> Tensor:
    with KeyedDropout(key):
        return F.dropout(ONES, p)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_keyed_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    found = dropped(1, p)

    assert float((found == 0).double().mean()) == pytest.approx(p, abs=0.01)
    torch.testing.assert_close(found[found != 0], ONES[found != 0] / (1 - p))


def test_keyed_dropout_follows_from_its_key_and_draws_anew_at_each_call() -> None:
    with KeyedDropout(1):
        first = F.dropout(ONES, 0.5)
        second = F.dropout(ONES, 0.5)

    assert torch.equal(first, dropped(1, 0.5))
    assert not torch.equal(first, second)
    assert not torch.equal(first, dropped(2, 0.5))
