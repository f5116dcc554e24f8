"""Evaluation of saved models on other data sets: classes, targets, labels of tables."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console

import hetero_fl
from hetero_fl.cli import main
from hetero_fl.cli.printing import print_scores
from hetero_fl.core.metrics import CLASSIFICATION
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.experiment import evaluate, prepare
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import UserError


def saved(folder: Path, task: Task, shape: tuple[int, ...], columns: list[float]) -> Path:
    """Create a run directory with a model whose output k is columns[k] times the input sum."""
    arch = ModelSpec.from_config("linear", task.outputs, shape)
    tensors = {n: torch.zeros_like(t) for n, t in arch.initial_tensors(0).items()}
    weight = next(n for n, t in tensors.items() if t.ndim == 2)
    tensors[weight] += torch.tensor(columns)[:, None]
    run = RunDirectory.create(folder, config={}, environment={})
    run.append_metrics({"round": 1})
    (run.path / "models").mkdir()
    (run.path / "models" / "a.safetensors").write_bytes(
        SavedModel(tensors, arch, {}, task).encode()
    )
    return run.path


def images(folder: Path, gray_values: dict[str, int]) -> str:
    """Create a folder of images with one gray value per class."""
    for name, value in gray_values.items():
        (folder / "train" / name).mkdir(parents=True)
        (folder / "test" / name).mkdir(parents=True)
        for i in range(3):
            for split in ("train", "test"):
                Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(
                    folder / split / name / f"{i}.png"
                )
    return str(folder)


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    # the classes of a folder are sorted: ill, normal
    task = Task("multiclass", 2, ("normal", "ill"))
    run = saved(tmp_path / "run", task, (1, 4, 4), [0.0, 1.0])
    data = images(tmp_path / "sets", {"normal": 0, "ill": 255})
    scores = evaluate(run, data)["a"]
    # with the class numbers of the folder it would be 0
    assert scores["auroc"] == 1.0
    other = images(tmp_path / "others", {"normal": 0, "sick": 255})
    with pytest.raises(
        UserError,
        match=r"^data: .*others: 'sick' is unknown to the models; choose from ill, n",
    ):
        evaluate(run, other)
    unnamed = saved(tmp_path / "unnamed", Task("multiclass", 2), (1, 4, 4), [1.0, 0.0])
    with pytest.raises(UserError, match="'ill' is unknown to the models; choose from 0, 1"):
        evaluate(unnamed, data)


def test_table_targets_are_matched_by_name(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    pd.DataFrame(
        {
            "x": range(40),
            "y1": [2.0 * i + 0.5 for i in range(40)],
            "y2": [-1.5 * i for i in range(40)],
        }
    ).to_csv(table, index=False)
    run = saved(tmp_path / "run", Task("regression", 2, ("y2", "y1")), (1,), [-1.5, 2.0])
    scores = evaluate(run, str(table), label="y1,y2")["a"]
    # errors are 0.5 for y1 and 0 for y2, and large in the column order of the table
    assert scores["mae"] == pytest.approx(0.25)
    for source, label, message in (
        (table, None, r"^label: missing; name the column of the labels; choose from x, y1, y2"),
        (table, "y3", r"^label: column 'y3' not found in"),
        (
            tmp_path / "tabel.csv",
            None,
            r"^data: file or folder '.*/tabel\.csv' not found; did you mean 'table\.csv'\?",
        ),
        ("digits", "y", r"^label: does not apply to source digits"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(run, str(source), label=label)


def test_evaluate_command_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pd.DataFrame({"x": range(40), "y": [2.0 * i + 0.5 for i in range(40)]}).to_csv(
        tmp_path / "t.csv", index=False
    )
    run = saved(tmp_path / "run", Task("regression", 1, ("y",)), (1,), [2.0])
    arguments = [str(run), "--data", str(tmp_path / "t.csv"), "--label", "y"]
    assert main([*arguments, "--json", str(tmp_path / "s.json")], command="evaluate") == 0
    assert '"mae": 0.5' in (tmp_path / "s.json").read_text()
    capsys.readouterr()
    for path in (tmp_path / "no" / "s.json", tmp_path):
        assert main([*arguments, "--json", str(path)], command="evaluate") == 2
        captured = capsys.readouterr()
        assert (
            captured.err == f"error: --json: expected a file in an existing folder, got {path}\n"
            and not captured.out
        )


def test_table_is_read_with_the_settings_of_the_run(tmp_path: Path) -> None:
    """Use the task and columns of the run: integer targets, patient numbers, classes as floats."""
    frame = pd.DataFrame(
        {"u": [1.0, 2.0, 3.0, 4.0], "who": [7, 7, 8, 8], "ward": [1, 2, 1, 2], "y": [1, 2, 3, 4]}
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    run = saved(tmp_path / "run", Task("regression", 1, ("y",)), (1,), [1.0])
    config = "data: {patient: who, group: ward}\n"
    (run / "config.yaml").write_text(config)
    assert evaluate(run, str(tmp_path / "t.csv"), label="y")["a"]["mae"] == pytest.approx(0)
    frame.assign(y=[0.0, 0.0, 1.0, 1.0]).to_csv(tmp_path / "c.csv", index=False)
    classes = saved(tmp_path / "classes", Task("multiclass", 2, ("0", "1")), (1,), [0.0, 1.0])
    (classes / "config.yaml").write_text(config)
    assert evaluate(classes, str(tmp_path / "c.csv"), label="y")["a"]["auroc"] == 1.0


def test_prepare_notes_the_columns_of_a_table(tmp_path: Path) -> None:
    rows = {
        "u": range(90),
        "ward": ["a", "b", "c"] * 30,
        "patient": [i // 2 for i in range(90)],
        "ill": [0, 1] * 45,
    }
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    data = {
        "name": "table",
        "path": str(tmp_path / "t.csv"),
        "label": "ill",
        "partition": {"min_size": 5},
    }
    clients = {"groups": [{"name": "a", "count": 2, "model": "mlp"}]}
    notes = prepare({"data": data, "clients": clients, "algorithm": {"name": "fedavg"}}).notes
    assert notes[0] == (
        "table t.csv: label ill; columns used: u, ward, patient; "
        "encoded as indicators: ward (a, b, c); left out: none"
    )
    assert ["set data.patient=" in note for note in notes] == [False, True, True]


def test_label_defaults_to_the_configuration_of_the_run(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", Task("multiclass", 2), (2,), [0.0, 1.0])
    path = str(tmp_path / "t.csv")
    pd.DataFrame({"a": [-1.0, 1.0], "b": [-1.0, 1.0], "ill": [0, 1]}).to_csv(path, index=False)

    with pytest.raises(UserError, match=r"^label: missing"):
        evaluate(run, path)
    (run / "config.yaml").write_text("data: {name: table, label: ill}")
    assert evaluate(run, path) == evaluate(run, path, label="ill")
    (run / "config.yaml").write_text("data: {name: table, label: none_such}")
    assert evaluate(run, path, label="ill")["a"]["auroc"] == 1.0


@pytest.mark.parametrize("width", [80, 200])
def test_score_table_shows_all_metric_names(width: int) -> None:
    figures = dict.fromkeys(CLASSIFICATION, 0.123)
    console = Console(width=width, file=io.StringIO())
    print_scores({"hospital_10": figures, "server": {**figures, "auroc": None}}, "a on b", console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text and text.count("0.123") == 11
    for name in CLASSIFICATION:
        for word in name.split("_"):
            assert word in text.split()


def test_evaluate_prefers_the_source_of_the_run_to_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"data": {"name": "digits"}, "clients": {"count": 2}, "rounds": 1}
    overrides = ["output.plots=false", "output.report=false", "clients.defaults.steps=1"]
    run = hetero_fl.run(config, out=tmp_path / "run", overrides=overrides)
    monkeypatch.chdir(tmp_path)
    expected = hetero_fl.evaluate(run, "digits", client="client_1")

    (tmp_path / "digits").mkdir()

    assert hetero_fl.evaluate(run, "digits", client="client_1") == expected
