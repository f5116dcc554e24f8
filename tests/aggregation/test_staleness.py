"""Staleness discounts of uploads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hetero_fl.aggregation.means import discount_upload, mean_of_items
from hetero_fl.core.payload import Item, Payload

FRESH, STALE, FACTOR = torch.tensor([[2.0, 4.0]]), torch.tensor([[6.0, 10.0]]), 0.25


@pytest.mark.parametrize("kind", ["class_sums", "rows"])
def test_discounted_upload_is_scaled_in_the_mean(kind: Any) -> None:
    def item(values: torch.Tensor, rows: float) -> Item:
        summed = kind == "class_sums"
        return Item(values * rows if summed else values, torch.tensor([[rows]]), kind)

    stale = discount_upload(Payload({"x": item(STALE, 4.0)}), FACTOR).item("x")

    mean = mean_of_items([item(FRESH, 3.0), stale])

    torch.testing.assert_close(mean, (3 * FRESH + FACTOR * 4 * STALE) / (3 + FACTOR * 4))


def test_discounted_scales_counts_and_keeps_the_report() -> None:
    payload = Payload({"n": Item(torch.tensor([8.0, 4.0]), 1.0, "counts")}, {"loss": "1"})

    stale = discount_upload(payload, FACTOR)

    assert stale["n"].tolist() == [2.0, 1.0]
    assert stale.report == payload.report
