"""Tests of the installed package."""

from __future__ import annotations

import json
from pathlib import Path

import hetero_fl
from hetero_fl.algorithms import register_algorithm
from hetero_fl.data import list_sources
from model_zoo import list_models

ROOT = Path(__file__).parents[1]


def test_names_are_listed() -> None:
    assert "clipped_fedavg" in register_algorithm
    assert "two_rings" in list_sources()
    assert "sine_mlp" in list_models()
    assert "json_lines" in hetero_fl.register_logger


def test_example_trains(tmp_path: Path) -> None:
    run = hetero_fl.run(ROOT / "example.yaml", out=tmp_path / "run")

    assert run.summary["algorithm"] == "clipped_fedavg"
    assert run.summary["global"]["last"]["accuracy"] > 0.8
    lines = (run.path / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4, 5]


def test_change_is_limited() -> None:
    import torch
    from hetero_fl_example.algorithms import ClippedFedAvg

    before = torch.zeros(4)
    after = ClippedFedAvg(max_change=1.0)._clip(torch.ones(4), before)

    assert torch.allclose(after.norm(), torch.tensor(1.0))
