"""Joining clients with columns, tokens or dates see the same inputs as the run's clients."""

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
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.joining.join import TransferSource
from tests.support.federations import config

CONFIGS = Path(__file__).parents[3] / "configs"
SHORT = [
    "rounds=1",
    "clients.defaults.steps=1",
    "runtime.threads=1",
    "runtime.executor=serial",
    "data.proxy.size=60",
    "output.plots=false",
    "output.report=false",
    "evaluation.every=1",
    "data.test_limit=60",
]


def source_of_spans(task: Task, *columns: tuple[int, int]) -> TransferSource:
    """Return a source with one model per span of the three columns."""
    source = TransferSource(cast(hetero_fl.Run, None))
    source.models = {}
    for model_idx, span in enumerate(columns):
        arch = ModelSpec.from_config("linear", task.outputs, (2 * (span[1] - span[0]),))
        view = asdict(Preprocess(raw=(3,), spans=(span,), missing="indicate"))
        source.models[str(model_idx)] = SavedModel(
            arch.initial_tensors(model_idx), arch, view, task, None
        )
    return source


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "regression"])
def test_consensus_excludes_models_without_inputs(kind: Any) -> None:
    task = Task(kind, 2)
    both, first = source_of_spans(task, (0, 2), (2, 3)), source_of_spans(task, (0, 2))
    x = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, math.nan], [math.nan, math.nan, math.nan]])
    consensus, consensus_of_first = both.consensus(x), first.consensus(x)
    assert torch.allclose(consensus[1], consensus_of_first[1], atol=1e-6) and not torch.allclose(
        consensus[0], consensus_of_first[0], atol=1e-3
    )
    assert consensus[2].isnan().all() and not consensus[:2].isnan().any()


def test_backbone_averages_each_tensor_over_its_senders() -> None:
    source = TransferSource(cast(hetero_fl.Run, None))
    full, part = (
        {"backbone.a": torch.zeros(2), "backbone.b": torch.zeros(2)},
        {"backbone.a": torch.ones(2)},
    )

    source.config = load_config(config("fedavg"))
    source.method = FedAvg()
    source.clients = {"1": ClientSettings(), "2": ClientSettings()}
    arch = ModelSpec.from_config("linear", 2, (2,))
    source.models = {
        n: SavedModel(t, arch, {}, Task("multiclass", 2), None)
        for n, t in (("1", full), ("2", part))
    }
    found = source.backbone(arch)
    assert found is not None and set(found) == {"backbone.a", "backbone.b"}
    assert found["backbone.a"].tolist() == [0.5, 0.5] and found["backbone.b"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("unit", ["client", "local"])
def test_backbone_of_a_private_run_has_trained_parameters_only(unit: str) -> None:
    privacy = {"unit": unit, "noise_multiplier": 1.0, "delta": 1e-4}
    arch = ModelSpec.from_config("cnn_bn_small", 2, (1, 8, 8))
    source = TransferSource(cast(hetero_fl.Run, None))
    source.config = load_config(config("fedavg", "cnn_bn_small", privacy=privacy))
    source.method = FedAvg()
    source.clients = {"1": ClientSettings()}
    source.models = {"1": SavedModel(arch.initial_tensors(0), arch, {}, Task("multiclass", 2))}

    found = source.backbone(arch)

    assert found is not None
    assert found.keys() == {n for n in arch.trained_names if n.startswith("backbone.")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data", "model"),
    [
        ("finance_hetero", "bank_fraud", "wide_deep"),
        ("text_hetero", "phrases", "text_cnn"),
        ("traffic_hetero", "traffic", "cnn1d"),
    ],
)
def test_join_supports_columns_tokens_and_units(
    name: str, data: str, model: str, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    run = hetero_fl.run(CONFIGS / f"{name}.yaml", overrides=SHORT, out=tmp_path / "run")
    content = hetero_fl.join(
        run,
        data,
        model,
        out=tmp_path / "out",
        patients=(10,),
        seeds=(0,),
        epochs=1,
        transfer="teacher",
    )
    assert {row["begins"] for row in content["rows"]} == {"scratch", "teacher"} and content[
        "teacher_on"
    ].endswith("public rows")
    # errors are in vehicles, of junctions with hundreds per hour
    if name == "traffic_hetero":
        assert content["consensus"]["mae"] > 10 and all(row["mae"] > 10 for row in content["rows"])
