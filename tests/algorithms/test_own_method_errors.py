"""Mistakes in user-defined methods that a table of `tests/errors` cannot state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hetero_fl.algorithms import FedAvg
from hetero_fl.cli import main
from hetero_fl.core.objectives import Batch, ModelViews
from tests.support.federations import config, rounds_of


def test_objective_error_lists_available_columns_and_models() -> None:
    batch = Batch(x=torch.zeros(1), y=torch.zeros(1))

    assert getattr(batch, "teacher", None) is None
    with pytest.raises(AttributeError, match="no column 'teacher', only 'x', 'y'; add it with"):
        batch.teacher  # noqa: B018
    with pytest.raises(KeyError, match="no model 'own', only none; name it in `train` or"):
        ModelViews()["own"]


class AsksForAnother(FedAvg):
    def aggregate(self, server: Any, uploads: Any) -> Any:
        yield from super().aggregate(server, uploads)
        server.state["teacher"] = uploads.mean("logits")


def test_traceback_is_logged_and_exit_status_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "own.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(config(f"python:{__name__}:AsksForAnother", "mlp")))

    assert main(["train", "--config", str(path), "--out", str(out), "--allow-code"]) == 1

    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("failed: ")
    assert "in aggregate: MissingItemError" in last_line
    log = (out / "log.txt").read_text()
    for words in (last_line, "Traceback (most recent call last)", 'uploads.mean("logits")'):
        assert words in log


def test_internal_error_is_not_translated() -> None:
    rounds = rounds_of(config("fedavg", "mlp"), num_rounds=0)
    rounds.executor.store = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        rounds.run_round()
