"""The models of the rounds that validation selects: saving, resuming, loading, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hetero_fl
from benchmarks.league.protocol import Benchmark
from hetero_fl.cli import main
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.experiment.comparison.compare import NO_REPORT as NO_REPORT_OF_TRIALS
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.errors import UserError
from tests.support.federations import config

NO_REPORT = {"output__plots": False, "output__report": False}


def small(method: str = "fedavg", **changes: Any) -> dict[str, Any]:
    """Return a run whose scores get worse again, so that an early round is best."""
    rates = {"clients__defaults__optimizer": {"name": "sgd", "lr": 2.0}}
    model = {"name": "mlp", "hidden": [16]}
    settings: dict[str, Any] = {"rounds": 5, "seed": 1, **NO_REPORT, **rates, **changes}
    return config(method, model, 3, **settings)


def files(path: Path) -> dict[str, bytes]:
    """Return the model files of a run, keyed by name."""
    found = (path / "models").rglob("*.safetensors")
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in found}


def selected_rounds(run: hetero_fl.Run) -> dict[str, int]:
    return {
        test: run.summary[test]["best_by_validation"]["round"]
        for test in ("personal", "global", "server")
        if run.summary[test]
    }


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("fedavg", {}),
        ("ditto", {"clients__per_round": 2}),
        ("fedmd", {}),
        ("fedavg", {"runtime__executor": "batched", "channel__compress_down": [{"quantize": 8}]}),
        ("fedbuff", {"runtime__mode": "async", "clients__per_round": 2}),
        pytest.param(
            "ditto",
            {"runtime__executor": "processes", "runtime__workers": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["shared", "private", "predictions", "compressed", "asynchronous", "workers"],
)
def test_best_models_are_those_of_a_run_that_ends_in_their_round(
    method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = small(method, **changes)
    run = hetero_fl.run(source, out=tmp_path / "run")
    rounds = selected_rounds(run)
    assert min(rounds.values()) < 5

    for test in ("personal", "global"):
        shorter = hetero_fl.run(
            {**source, "rounds": rounds[test]}, out=tmp_path / f"shorter_{test}"
        )
        for name, model in run.best(test).models.items():
            if name == "server" and test == "global":
                continue
            expected = shorter.models[name].tensors
            assert model.tensors.keys() == expected.keys()
            assert all(torch.equal(model.tensors[n], t) for n, t in expected.items()), (test, name)
    assert run.best("global").model_names == run.model_names


def test_extended_run_selects_again(tmp_path: Path) -> None:
    source = small(evaluation__every=2, rounds=7, seed=28)
    shorter = selected_rounds(hetero_fl.run({**source, "rounds": 5}, out=tmp_path / "run"))

    hetero_fl.run(source, out=tmp_path / "run", resume=True)

    whole = hetero_fl.run(source, out=tmp_path / "whole")
    assert files(tmp_path / "run") == files(whole.path)
    # The longer run does not evaluate the last round of the shorter one, which was the best.
    assert {*shorter.values()} == {5} and {*selected_rounds(whole).values()} == {2}


@pytest.mark.parametrize(
    "changes",
    [
        {"output__best_models": False},
        {"data__split": {"validation": 0}, "data__validation": 0},
    ],
    ids=["turned off", "no validation rows"],
)
def test_no_best_models_are_written(changes: dict[str, Any], tmp_path: Path) -> None:
    run = hetero_fl.run(small(**changes), out=tmp_path / "run")

    folders = [path.name for path in (run.path / "models").iterdir() if path.is_dir()]
    assert folders == []
    with pytest.raises(UserError, match=r"has no models; .*best_models=true"):
        run.best("personal").predict("site_1", np.zeros((2, 8, 8)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, []), ({"output__best_models": True}, ["best_global", "best_personal"])],
    ids=["default", "asked for"],
)
def test_comparison_saves_best_models_only_if_asked(
    changes: dict[str, Any], expected: list[str], tmp_path: Path, in_process: list[str]
) -> None:
    compared = hetero_fl.compare(small(rounds=1, **changes), ["local"], out=tmp_path, quiet=True)

    assert len(in_process) == 1
    folders = (compared.runs[0].path / "models").iterdir()
    assert sorted(path.name for path in folders if path.is_dir()) == expected


def test_benchmark_and_search_save_no_best_models() -> None:
    plan = Benchmark.load(Path(__file__).parents[2] / "configs" / "benchmark")

    benchmark = load_config({}, plan.federation_overrides(next(iter(plan.federations))))

    assert not benchmark.output.best_models
    assert not load_config({}, NO_REPORT_OF_TRIALS).output.best_models


def test_best_models_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = hetero_fl.run(small(data__test_limit=None), out="run")
    flags = ["--best", "global"]
    images = np.zeros((2, 8, 8), np.uint8)
    of_best = run.best("global").predict("site_1", images)
    assert not of_best.equals(run.predict("site_1", images))

    assert main(["evaluate", "run", "--data", "digits", "--json", "scores.json", *flags]) == 0
    assert main(["export", "run", "--client", "site_1", "--format", "safetensors", *flags]) == 0
    assert main(["check", "run"]) == 0
    Path("run/models/best_global/site_1.safetensors").unlink()
    assert main(["check", "run"]) == 2
    assert "best_global/site_1.safetensors: missing" in capsys.readouterr().err

    scores = json.loads(Path("scores.json").read_text())["server"]
    selected = run.summary["server"]["best_by_validation"]
    assert selected["round"] < 5
    for metric in ("accuracy", "balanced_accuracy", "auroc"):
        assert scores[metric] == pytest.approx(selected[metric], abs=1e-9)
    exported = Path("run/export/best_global/site_1.safetensors")
    assert SavedModel.load(exported).tensors.keys() == run.models["site_1"].tensors.keys()
    card = json.loads(exported.with_suffix(".json").read_text())
    best = run.summary["global"]["best_by_validation"]
    assert card["run"]["rounds_completed"] == best["round"]
    scores = run.metrics[best["round"] - 1]["clients"]["site_1"]["global"]
    assert card["figures"]["global"]["accuracy"] == scores["accuracy"]
