"""Representations of runs, models and data sets are one or two lines."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

import hetero_fl
from hetero_fl.data import Vocabulary, from_arrays
from hetero_fl.reporting.run import Run
from tests.support.federations import config


def test_run_shows_method_data_scores_and_models(tmp_path: Path) -> None:
    run = hetero_fl.run(config("fedavg", clients=2), out=tmp_path / "run")
    model = run.models["site_1"]
    values = sum(tensor.numel() for tensor in model.tensors.values())

    first, second = repr(run).splitlines()

    assert first == f"Run('{run.path}': FedAvg on digits, 2 rounds, 2 clients, seed 0;"
    assert re.fullmatch(
        r"    local test: balanced accuracy .*; global test: balanced accuracy [\d.]+%, .*\)",
        second,
    )
    assert repr(model) == (
        "SavedModel('cnn_bn_small': multiclass with 10 "
        f"outputs, input [1, 8, 8], {values:,} values in "
        f"{len(model.tensors)} tensors)"
    )
    assert "\n" not in repr(run.models)
    for name in ("summary.json", "SHA256SUMS"):
        (run.path / name).unlink()
    assert repr(Run(run.path)) == f"Run('{run.path}': not finished)"


def test_data_set_shows_its_rows_and_shapes() -> None:
    x = np.zeros((4000, 28, 28), np.uint8)
    dataset = from_arrays(x, np.arange(4000) % 2, test=(x[:500], np.arange(500) % 2))

    assert repr(dataset) == (
        f"Dataset('{dataset.name}': multiclass with 2 outputs, x "
        "uint8 [1, 28, 28]; rows: train 4,000, test 500)"
    )
    assert repr(dataset.train) == "Examples(4,000 rows: x uint8 [1, 28, 28], y int64)"
    assert repr(Vocabulary(words=("a", "b"))) == "Vocabulary(4 tokens, 2 words)"
    assert torch.equal(dataset.train.y, torch.arange(4000) % 2)  # type: ignore[arg-type]


def test_prepared_run_shows_its_federation() -> None:
    prepared = hetero_fl.prepare(config("fedavg", clients=2))

    assert re.fullmatch(
        r"PreparedRun\('small': fedavg, 2 clients, 2 rounds; "
        r"FederatedData\('digits': multiclass with 10 outputs, 2 clients; "
        r"rows: train \d+, proxy 60, test 90\)\)",
        repr(prepared),
    )
    assert len(repr(prepared.federation)) < 5000 and "tensor(" not in repr(prepared.federation)
