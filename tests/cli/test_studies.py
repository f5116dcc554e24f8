"""The configurations and studies of this repository load, and reduced forms of them run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

import hetero_fl
from hetero_fl.cli import main
from hetero_fl.config import expand_population
from hetero_fl.core.task import Task
from hetero_fl.experiment.comparison.jobs import Variant
from hetero_fl.experiment.comparison.study import Study
from hetero_fl.experiment.configuration import load_config
from hetero_fl.reporting.comparison.plots import write_curves
from tests.support.cases import each_case

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
QUICK = [
    "output.plots=false",
    "output.report=false",
    "runtime.executor=serial",
    "runtime.threads=1",
]


def images(path: Path, *shape: int) -> Path:
    draws = np.random.default_rng(1)
    x, y = draws.integers(0, 256, (150, *shape), dtype=np.uint8), np.arange(150) % 10
    np.savez(
        path, train_images=x[:120], train_labels=y[:120], test_images=x[120:], test_labels=y[120:]
    )
    return path


@each_case("path", STUDIES)
def test_every_variant_of_a_study_loads(path: Path) -> None:
    study = Study.load(path)
    assert len(study.algorithms) > 1 or study.algorithms == ["all"]
    assert len(study.seeds) > 1 and study.out == Path("runs") / path.stem
    assert f"--study configs/studies/{path.name}" in path.read_text()
    for name in study.algorithms:
        variant = [] if name == "all" else Variant.parse(name).overrides
        config = load_config(study.config, [*study.overrides, *variant], allow_code=True)
        assert len(expand_population(config.clients)) in (6, 10, 20)


@pytest.mark.parametrize(
    ("name", "shape", "model"),
    [("mnist_fedavg", (28, 28), "mlp"), ("cifar10_fedavg", (32, 32, 3), "mlp")],
)
def test_two_rounds_of_the_reduced_form(
    tmp_path: Path, name: str, shape: tuple[int, ...], model: str
) -> None:
    data = images(tmp_path / "set.npz", *shape)
    small = [
        "rounds=2",
        f"data.path={data}",
        f"clients.defaults.model={model}",
        "clients.defaults.epochs=1",
    ]
    run = hetero_fl.run(
        ROOT / "configs" / f"{name}.yaml", out=tmp_path / "run", overrides=[*small, *QUICK]
    )
    assert len(run.summary["clients"]) == 10 and [len(r["cohort"]) for r in run.metrics] == [5, 5]
    assert run.summary["server"]["last"]["accuracy"] is not None


@pytest.mark.slow
def test_options_override_a_study_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    study = {
        "config": "../base.yaml",
        "algorithms": ["fedavg:clients.per_round=2", "centralized"],
        "seeds": [0, 1],
        "overrides": QUICK,
        "jobs": 1,
    }
    base = yaml.safe_load((ROOT / "configs" / "mnist_fedavg.yaml").read_text())
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump({**base, "rounds": 2, "evaluation": {"every": 1}})
    )
    (tmp_path / "configs" / "small.yaml").write_text(yaml.safe_dump(study))
    data = f"data.path={images(tmp_path / 'set.npz', 28, 28)}"
    assert main(["--study", "configs/small.yaml", "--seeds", "3", data], command="compare") == 0
    output = capsys.readouterr().out
    assert (
        "FedAvg (clients.per_round = 2)" in output
        and "one seed (3)" in output
        and "Local test:" not in output
    )
    assert (tmp_path / "runs" / "small" / "curves.png").stat().st_size > 5000
    assert {p.name[-1] for p in (tmp_path / "runs" / "small" / "runs").iterdir()} == {"3"}


def test_options_of_compare_override_the_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base.yaml").write_text("rounds: 1\n")
    (tmp_path / "study.yaml").write_text("config: base.yaml\nalgorithms: [of_the_study]\n")
    given = ["--study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]

    assert main(["compare", *given, "--algorithms", "of_the_option"]) == 2

    assert "'of_the_option'" in capsys.readouterr().err


def test_curves_need_few_methods_and_several_rounds(tmp_path: Path) -> None:
    once = [{"round": 1, "global": {"accuracy": 0.5}}]
    twice = [*once, {"round": 2, "global": None}, {"round": 3, "global": {"accuracy": 0.6}}]
    ten = Task("multiclass", 10)
    write_curves(tmp_path / "a.png", {"fedavg": [once, once]}, ten)
    write_curves(tmp_path / "b.png", {f"fedavg:server_lr={i}": [twice] for i in range(11)}, ten)
    write_curves(tmp_path / "c.png", {"fedavg": [twice, twice], "local": [once]}, ten)
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]
