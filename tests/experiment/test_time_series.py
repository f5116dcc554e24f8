"""Time series from end to end: models read them along time, stored as `[N, steps, columns]`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hetero_fl.data import Dataset, from_arrays
from hetero_fl.experiment import run
from hetero_fl.utils.errors import UserError


def waves(rows: int = 160, steps: int = 9) -> Dataset:
    """Return two columns; the targets are the last step of one and the mean of the other."""
    x = torch.randn(rows, steps, 2, generator=torch.Generator().manual_seed(3))
    y = torch.stack([x[:, -1, 0], x[:, :, 1].mean(1)], 1)
    return from_arrays(x, y, columns=("first", "second"), name="waves")


def test_models_read_series_along_time(tmp_path: Path) -> None:
    data = waves()
    config = {
        "rounds": 1,
        "data": {"proxy": {"size": 20}},
        "clients": {
            "defaults": {"preprocess": {"normalize": "own"}},
            "groups": [
                {"name": name, "model": name} for name in ("gru", "cnn1d", "transformer", "mlp")
            ],
        },
        "algorithm": {"name": "fedmd"},
        "runtime": {"threads": 1},
    }
    finished = run(config, dataset=data, out=tmp_path / "run")
    for name, model in finished.models.items():
        assert model.arch.input_shape == (2, 9), name
        assert finished.predict(name, data.train.x[:5]).shape == (5, 2)
    assert finished.models["gru"].tensors["backbone.network.weight_ih_l0"].shape[1] == 2
    with pytest.raises(UserError, match=r"expected \(N, 9, 2\), got shape \(5, 2, 9\)"):
        finished.predict("gru", data.train.x[:5].transpose(1, 2))
