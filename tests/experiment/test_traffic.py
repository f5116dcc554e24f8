"""A reduced run of the configuration `traffic_hetero`: results, forecasts, evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hetero_fl.data import load_source
from hetero_fl.experiment import evaluate, prepare, run
from hetero_fl.reporting.comparison.report import comparison_row, write_comparison
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "traffic_hetero.yaml"
SHORT = [
    "rounds=2",
    "clients.defaults.steps=4",
    "data.test_limit=150",
    "data.proxy.size=60",
    "runtime.threads=1",
]
CITIES = ["camera_1", "camera_2", "sensor_1", "sensor_2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    return run(CONFIG, overrides=SHORT, out=tmp_path_factory.mktemp("traffic") / "run")


def test_errors_and_baselines_are_in_vehicles(finished: Run) -> None:
    summary, details = finished.summary, finished.directory.details()
    assert summary["data"]["simulated"] and details["unit"] == "vehicles"
    assert [c["id"] for c in summary["clients"]] == CITIES and set(summary["baselines"]) == {
        "persistence",
        "a week before",
    }
    baseline_mae = {i: details["baselines"][i]["personal"]["a week before"]["mae"] for i in CITIES}
    assert (
        baseline_mae["camera_1"] > 5 * baseline_mae["sensor_1"] > 5 * baseline_mae["sensor_2"] / 2
    )
    week = summary["baselines"]["a week before"]["personal"]
    assert week["mae"] == pytest.approx(np.mean(list(baseline_mae.values()))) and week[
        "mae_worst"
    ] == max(baseline_mae.values())
    assert (
        100 < summary["personal"]["last"]["mae"] < 800
        and summary["server"]["last"]["mae"] is not None
    )
    log = (finished.path / "log.txt").read_text()
    assert " vehicles; global test: mean absolute error" in log and "training until 2022-" in log


def test_forecasts_are_plotted_in_vehicles(finished: Run) -> None:
    found = finished.directory.details()["forecast"]
    data = prepare(CONFIG, SHORT).data
    for city in CITIES:
        extra, y = (
            data.extra_columns(city, "test"),
            data.columns(city, "test", data.preprocess(city))["y"],
        )
        assert extra.time is not None and extra.unit is not None
        assert found[city]["time"] == sorted(extra.time.tolist())[-168:]
        last = int(extra.time.argmax())
        assert found[city]["truth"][2][-1] == pytest.approx(
            float(y[last, 2] * extra.unit[last]), rel=1e-5
        )
        # truth is an integer count
        assert found[city]["truth"][2][-1] == pytest.approx(
            round(found[city]["truth"][2][-1]), abs=0.01
        )
    assert (finished.path / "plots" / "forecasts.png").stat().st_size > 20_000
    report = (finished.path / "report.html").read_text()
    for words in (
        "Mean absolute error (vehicles)",
        "Persistence",
        "A week before",
        "Targets and forecasts",
        "squared error",
        "In vehicles. The root mean squared error gives more weight to large errors",
        "The data of this run is simulated",
    ):
        assert words in report


def test_predict_multiplies_by_the_unit(finished: Run) -> None:
    data = load_source(prepare(CONFIG, SHORT).config.data, Path(), missing=True)
    test = data.test
    assert (
        test is not None and test.unit is not None and test.group is not None and test.y is not None
    )
    rows = torch.nonzero(test.group == 2).squeeze(1)
    relative = finished.predict("sensor_1", test.x[rows]).to_numpy()
    counted = finished.predict("sensor_1", test.x[rows], unit=test.unit[rows]).to_numpy()
    unit = test.unit[rows, None].numpy()
    assert np.allclose(counted, relative * unit)
    error = float(abs(counted - test.y[rows].numpy() * unit).mean())
    last = {c["id"]: c["personal"]["mae"] for c in finished.summary["clients"]}
    assert error == pytest.approx(last["sensor_1"], rel=1e-5)


def test_evaluate_uses_the_windows_of_the_run(finished: Run, tmp_path: Path) -> None:
    found = evaluate(finished, "traffic", client="sensor_2")
    assert found["sensor_2"]["mae"] is not None and found["sensor_2"]["mae"] > 20
    path = junctions(tmp_path)
    assert set(evaluate(finished, str(path))) == {*CITIES, "server"}
    assert finished.models["server"].task.unit == "vehicles"


def junctions(folder: Path, names: tuple[str, ...] = ("1", "2", "3", "4")) -> Path:
    """Write a file of junctions with different time spans."""
    draws, frames = np.random.default_rng(0), []
    for junction_idx, name in enumerate(names):
        start, hours = 200 * junction_idx, 1400 - 200 * junction_idx
        dates = pd.Timestamp("2023-01-01") + pd.to_timedelta(start + np.arange(hours), unit="h")
        count = draws.poisson(
            (30 + 10 * junction_idx) * (1.2 + np.sin(np.arange(hours) * np.pi / 12))
        )
        frames.append(
            pd.DataFrame(
                {"DateTime": dates.strftime("%Y-%m-%d %H:%M"), "Junction": name, "Vehicles": count}
            )
        )
    path = folder / "junctions.csv"
    pd.concat(frames).to_csv(path, index=False)
    return path


@pytest.mark.slow
def test_file_replaces_the_generated_junctions(tmp_path: Path) -> None:
    finished = run(
        CONFIG,
        overrides=[*SHORT, f"data.path={junctions(tmp_path)}", "output.plots=false"],
        out=tmp_path / "run",
    )
    assert not finished.summary["data"]["simulated"]
    assert (
        "'camera_1' gets '1', 'camera_2' gets '2', 'sensor_1' gets '3', 'sensor_2' gets '4'"
        in (finished.path / "log.txt").read_text()
    )
    with pytest.raises(UserError, match="got 3 groups for 4 clients"):
        prepare(CONFIG, [*SHORT, f"data.path={junctions(tmp_path, ('1', '2', '3'))}"])


@pytest.mark.slow
@pytest.mark.parametrize("horizons", ["[1,3,6]", "[3]"])
def test_classification_of_busy_hours(horizons: str, tmp_path: Path) -> None:
    common = ["vehicles", "hour_sin", "hour_cos", "week_sin", "week_cos"]
    plain = [f"clients.groups.{i}.preprocess.columns={common}" for i in (0, 1)]
    plain.append(f"server.preprocess.columns={common}")
    series = f"data.series={{target: busy, horizons: {horizons}}}"
    public = f"data.proxy.source.series={{sites: [public], horizons: {horizons}}}"
    finished = run(CONFIG, overrides=[*SHORT, series, public, *plain], out=tmp_path / "run")
    assert 0.3 < finished.summary["personal"]["last"]["balanced_accuracy"] <= 1
    week = finished.summary["baselines"]["a week before"]["personal"]["balanced_accuracy"]
    assert (
        week > 0.75 > finished.summary["baselines"]["persistence"]["personal"]["balanced_accuracy"]
    )
    assert finished.models["sensor_1"].task.kind == (
        "multilabel" if "," in horizons else "multiclass"
    )
    assert (finished.path / "plots" / "confusion.png").exists() and not (
        finished.path / "plots" / "forecasts.png"
    ).exists()


def test_comparison_states_baselines_and_unit(finished: Run, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    shutil.copytree(finished.path, tmp_path / "runs" / "one")
    rows, task = [comparison_row(finished.summary) | {"run": "one"}], finished.models["server"].task
    write_comparison(tmp_path, rows, title="traffic", note="", task=task)
    text = (tmp_path / "comparison.md").read_text()
    assert (
        "**Simple rules:** mean absolute error (vehicles): persistence " in text
        and "Errors in vehicles, one seed" in text
    )
