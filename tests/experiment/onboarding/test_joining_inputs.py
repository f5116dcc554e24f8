"""A newcomer with columns, tokens or dates: it sees what the run's clients see, and who sees nothing has no word."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import hetero_fl
from hetero_fl.algorithms import FedAvg
from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import Preprocess
from hetero_fl.experiment.onboarding.transfer import TransferSource

CONFIGS = Path(__file__).parents[3] / "configs"
SHORT = ["rounds=1", "clients.defaults.steps=1", "runtime.threads=1", "runtime.executor=serial", "data.proxy.size=60",
         "output.plots=false", "output.report=false", "evaluation.every=1", "data.test_limit=60"]  # fmt: skip


def heard(task: Task, *columns: tuple[int, int]) -> TransferSource:
    """A legacy of a model for each of these runs of columns of three."""
    legacy = TransferSource(cast(hetero_fl.Run, None))
    legacy.models = {}
    for place, span in enumerate(columns):
        arch = ModelSpec.from_config("linear", task.outputs, (2 * (span[1] - span[0]),))
        view = asdict(Preprocess(raw=(3,), spans=(span,), missing="indicate"))
        legacy.models[str(place)] = SavedModel(arch.initial_tensors(place), arch, view, task, None)
    return legacy


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "regression"])
def test_who_sees_nothing_of_a_row_has_no_word_on_it(kind: Any) -> None:
    task = Task(kind, 2)
    both, first = heard(task, (0, 2), (2, 3)), heard(task, (0, 2))
    x = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, math.nan], [math.nan, math.nan, math.nan]])
    said, alone = both.consensus(x), first.consensus(x)
    assert torch.allclose(said[1], alone[1], atol=1e-6) and not torch.allclose(
        said[0], alone[0], atol=1e-3
    )
    assert said[2].isnan().all() and not said[:2].isnan().any()


def test_backbones_are_meant_over_those_who_sent_each_tensor() -> None:
    legacy = TransferSource(cast(hetero_fl.Run, None))
    whole, part = (
        {"backbone.a": torch.zeros(2), "backbone.b": torch.zeros(2)},
        {"backbone.a": torch.ones(2)},
    )

    legacy.method = FedAvg()
    legacy.clients = {"1": ClientSettings(), "2": ClientSettings()}
    arch = ModelSpec.from_config("linear", 2, (2,))
    legacy.models = {
        n: SavedModel(t, arch, {}, Task("multiclass", 2), None)
        for n, t in (("1", whole), ("2", part))
    }
    found = legacy.backbone(arch)
    assert found is not None and set(found) == {"backbone.a", "backbone.b"}
    assert found["backbone.a"].tolist() == [0.5, 0.5] and found["backbone.b"].tolist() == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data", "model"),
    [
        ("finance_hetero", "bank_fraud", "wide_deep"),
        ("text_hetero", "phrases", "text_cnn"),
        ("traffic_hetero", "traffic", "cnn1d"),
    ],
)
def test_columns_tokens_and_units_are_the_newcomers_too(
    name: str, data: str, model: str, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    run = hetero_fl.run(CONFIGS / f"{name}.yaml", overrides=SHORT, out=tmp_path / "run")
    told = hetero_fl.join(
        run,
        data,
        model,
        out=tmp_path / "out",
        patients=(10,),
        seeds=(0,),
        epochs=1,
        transfer="teacher",
    )
    assert {row["begins"] for row in told["rows"]} == {"scratch", "teacher"} and told[
        "teacher_on"
    ].endswith("public rows")
    # vehicles, as the run's own figures are, of junctions with hundreds an hour
    if name == "traffic_hetero":
        assert told["consensus"]["mae"] > 10 and all(row["mae"] > 10 for row in told["rows"])
