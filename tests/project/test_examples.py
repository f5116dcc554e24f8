"""The loggers in examples/, with stand-ins for the packages that they log to."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.experiment import run
from tests.helpers.small_federations import config

ROOT = Path(__file__).parents[2]
Logged = list[tuple[dict[str, float], int]]


class Wandb(types.ModuleType):
    """A stand-in for wandb: `init` returns a run with `log(data, step=)`; steps increase."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.settings: dict[str, Any] = {}
        self.logged: Logged = []
        self.finished = False

    def init(self, **settings: Any) -> Wandb:
        self.settings = settings
        return self

    def log(self, data: dict[str, float], *, step: int) -> None:
        assert not self.logged or step > self.logged[-1][1]
        self.logged.append((data, step))

    def finish(self) -> None:
        self.finished = True


class Mlflow(types.ModuleType):
    """A stand-in for mlflow: metrics are finite; names have letters, digits and `_-. /`."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.settings: dict[str, Any] | None = None
        self.logged: Logged = []
        self.artifacts: list[str] = []
        self.finished = False

    def start_run(self, **settings: Any) -> None:
        self.settings = settings

    def log_metrics(self, metrics: dict[str, float], *, step: int) -> None:
        assert self.settings is not None, "no run was started"
        assert all(re.fullmatch(r"[\w\-. /]+", name) for name in metrics)
        self.logged.append((metrics, step))

    def log_artifact(self, path: str) -> None:
        assert Path(path).name
        self.artifacts.append(path)

    def end_run(self) -> None:
        self.finished = True


@pytest.fixture
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Wandb | Mlflow:
    module: Wandb | Mlflow = {"wandb": Wandb, "mlflow": Mlflow}[request.param]()
    monkeypatch.setitem(sys.modules, request.param, module)
    monkeypatch.syspath_prepend(str(ROOT))
    return module


@pytest.mark.parametrize("stand_in", ["wandb", "mlflow"], indirect=True)
def test_loggers_receive_every_round(stand_in: Wandb | Mlflow, tmp_path: Path) -> None:
    name = stand_in.__name__
    example = __import__(f"examples.{name}_logger", fromlist=["round_metrics"])
    logger = getattr(example, f"{name}_logger")(name="trial")
    finished = run(config("hybrid", rounds=3, evaluation={"every": 2}),
                   out=tmp_path / "run", callbacks=[logger])  # fmt: skip
    assert stand_in.settings == {"name": "trial"}
    assert [step for _, step in stand_in.logged] == [1, 2, 3]
    first, second, last = (data for data, _ in stand_in.logged)
    # A round without an evaluation.
    assert set(first) == {"train_loss", "up_bytes", "down_bytes"}
    assert second["global/accuracy"] == finished.metrics[1]["global"]["accuracy"]
    assert (
        last["personal/balanced_accuracy"]
        == finished.summary["personal"]["last"]["balanced_accuracy"]
    )
    assert last["server/accuracy"] == finished.summary["server"]["last"]["accuracy"]
    assert (
        sum(data["up_bytes"] for data, _ in stand_in.logged)
        == finished.summary["communication"]["up_bytes"]
    )
    assert all(isinstance(v, int | float) for data, _ in stand_in.logged for v in data.values())
    json.dumps(last, allow_nan=False)


@pytest.mark.parametrize("stand_in", ["wandb", "mlflow"], indirect=True)
def test_documented_logger_usage_works(
    stand_in: Wandb | Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "how_to" / "callbacks.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"```python\n# log_to_{stand_in.__name__}\.py\n(.*?)```", page, re.DOTALL)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "short.yaml").write_text(
        json.dumps(config("hybrid", rounds=1)), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hetero_fl.experiment.session.write_presentation", lambda *_: None)
    code = code.replace("digits_quickstart.yaml", "short.yaml")
    exec(compile(code, "docs/how_to/callbacks.md", "exec"), {})
    assert stand_in.logged and stand_in.finished
