"""The rows of each step of a local fit."""

from __future__ import annotations

from typing import Any

import torch

from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit, SampledBatches
from hetero_fl.core.task import Task
from hetero_fl.engine.batches import Batches, index_batches
from hetero_fl.engine.device_memory import DeviceMemory

STREAM = (0, 3, "site_1", "train", 0)


def fit(**settings: Any) -> Fit:
    return Fit({"model": None}, Supervised(), **settings)


def test_index_batches_reshuffles_rows_in_each_epoch() -> None:
    batches = index_batches(12, fit(batch_size=4, epochs=3), STREAM)

    orders = [torch.cat(batches[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_index_batches_of_steps_reshuffle_after_all_rows() -> None:
    order = torch.cat(index_batches(12, fit(batch_size=4, steps=6), STREAM)).tolist()

    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert order[:12] != order[12:]


def test_index_batches_appends_a_single_last_row_to_the_previous_batch() -> None:
    sizes = [[len(b) for b in index_batches(n, fit(batch_size=4), STREAM)] for n in (1, 9, 10)]

    assert sizes == [[1], [4, 5], [4, 4, 2]]


def test_each_step_has_a_separate_dropout_key() -> None:
    task = Task("multiclass", 2)
    site = Participant(
        "site_1", task, {}, {}, lambda *_: {}, ClientSettings(), lambda: torch.zeros(2)
    )
    rows = SampledBatches(lambda generator, size: {"x": torch.zeros(size)}, 4)

    keys = [
        key for key, _ in Batches(site, fit(data=rows, steps=5), DeviceMemory(torch.device("cpu")))
    ]

    assert len(set(keys)) == 5
