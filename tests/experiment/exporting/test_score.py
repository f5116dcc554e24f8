"""The script `score.py` of an export: independence of this project, predictions, messages."""

from __future__ import annotations

import ast
import csv
import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetero_fl.core.saved_model import SavedModel
from hetero_fl.experiment.exporting import score
from hetero_fl.experiment.exporting.export import interface
from hetero_fl.experiment.exporting.graph import draw_inputs, inputs_of
from hetero_fl.utils.seeding import keyed_generator
from tests.experiment.exporting.test_graph import file_of, predicted, require_onnx
from tests.support.saved_models import case

SCRIPT = Path(score.__file__)
# run a script on a machine that has neither package of this project
ALONE = (
    "import runpy, sys; sys.modules.update(hetero_fl=None, model_zoo=None); sys.argv.pop(0); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


@cache
def content_of(name: str) -> bytes:
    return file_of(case(name), personal=True)


def write_model(folder: Path, name: str) -> Path:
    require_onnx()
    file = folder / f"{name}.onnx"
    file.write_bytes(content_of(name))
    return file


def write_description(folder: Path, name: str) -> Path:
    """Write a file with the description of a model and a constant graph.

    Writing it is fast, for tests that run no model.
    """
    require_onnx()
    import onnx
    from onnx import helper

    output = helper.make_tensor_value_info("values", onnx.TensorProto.FLOAT, [1])
    constant = helper.make_node("Constant", [], ["values"], value_floats=[0.0])
    graph = helper.make_graph([constant], "constant", [], [output])
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    helper.set_model_props(model, {"hetero_fl": json.dumps(interface(case(name)))})
    file = folder / f"{name}.onnx"
    file.write_bytes(model.SerializeToString())
    return file


def rows_of(text: str) -> tuple[list[str], np.ndarray[Any, Any], list[str]]:
    header, *rows = list(csv.reader(text.splitlines()))
    numbers = np.array([[float(v) for v in row[1:5]] for row in rows])
    return header, numbers, [row[-1] for row in rows]


def test_script_imports_only_numpy_and_onnxruntime() -> None:
    names = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


@pytest.mark.slow
def test_script_runs_without_this_project(tmp_path: Path) -> None:
    model, x = case("cnn_gn_resized"), torch.randint(0, 256, (601, 9, 11), dtype=torch.uint8)
    np.savez(tmp_path / "x.npz", test_images=x.numpy(), test_labels=np.zeros(601))
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        ALONE,
        str(SCRIPT),
        "--model",
        str(write_model(tmp_path, "cnn_gn_resized")),
    ]
    completed = subprocess.run(
        [*command, "--data", str(tmp_path / "x.npz")],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (completed.returncode, completed.stderr) == (0, "")
    header, found, labels = rows_of(completed.stdout)
    expected = predicted(model, ((x[:, None].float() / 255),), True)
    assert header == ["row", "0", "1", "2", "3", "prediction"] and len(found) == 601
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert labels == [str(int(i)) for i in expected.argmax(1)]


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["score.py", *map(str, arguments)])
    return score.main()


def run_model(
    monkeypatch: pytest.MonkeyPatch, name: str, data: Path, out: Path, *more: object
) -> int:
    """Run the script with an exported model."""
    model = write_model(data.parent, name)
    return run_script(monkeypatch, "--model", model, "--data", data, "--out", out, *more)


def assert_predictions(
    model: SavedModel, x: tuple[torch.Tensor, ...], out: Path, unit: int = 1
) -> None:
    """Assert that the table at `out` contains the model's predictions."""
    expected = unit * predicted(model, x, True).numpy()
    np.testing.assert_allclose(rows_of(out.read_text())[1], expected, rtol=1e-4, atol=1e-5 * unit)


def test_table_columns_are_matched_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = case("tabular_with_gaps"), tmp_path / "out.csv"
    (x,) = draw_inputs(model, 9, keyed_generator("table"))
    weight, pulse, glucose = (
        [f"{v:.9g}" if not math.isnan(v) else gap for v in column.tolist()]
        for column, gap in zip(x.T, ("", "?", " ? "), strict=True)
    )
    with (tmp_path / "X.CSV").open("w", newline="") as file:
        csv.writer(file).writerow(["glucose", "name", "weight", "pulse"])
        csv.writer(file).writerows(zip(glucose, "abcdefghi", weight, pulse, strict=True))
    assert run_model(monkeypatch, "tabular_with_gaps", tmp_path / "X.CSV", out) == 0
    assert_predictions(model, (x,), out)
    # a multilabel task has no column "prediction"
    assert out.read_text().startswith("row,0,1,2,3\n")


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("multimodal_with_gaps", 1),
        ("mlp_of_columns", 350),
        pytest.param("text_gru", 1, marks=pytest.mark.slow),
        pytest.param("cnn1d_with_gaps", 1, marks=pytest.mark.slow),
        pytest.param("resnet_of_grey", 1, marks=pytest.mark.slow),
    ],
)
def test_arrays_are_matched_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, unit: int
) -> None:
    model, data, out = case(name), tmp_path / "x.npz", tmp_path / "out.csv"
    x = draw_inputs(model, 6, keyed_generator("arrays"))
    names = [spec["name"] for spec in inputs_of(model)]
    np.savez(data, **{n: part.numpy() for n, part in zip(names, x, strict=True)})

    assert run_model(monkeypatch, name, data, out, "--unit", unit) == 0

    assert_predictions(model, x, out, unit)


def test_absent_block_and_channels_last_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, out = case("multimodal_with_gaps"), tmp_path / "x.npz", tmp_path / "out.csv"
    image = torch.rand(5, 1, 12, 12)
    np.savez(data, image=image.movedim(1, -1).numpy())

    assert run_model(monkeypatch, "multimodal_with_gaps", data, out) == 0

    assert_predictions(model, (image, torch.full((5, 6), torch.nan)), out)


IMAGE = np.zeros((3, 12, 12))
SERIES = np.full((2, 20, 3), np.nan)
COLUMNS = "weight,pulse,glucose\n1,2,3\n"
INVALID: list[tuple[str, Any, str]] = [
    ("vit", {"image": IMAGE + 2.0}, "image: row 0: expected numbers from 0 to 1"),
    ("vit", {"image": IMAGE.astype(int) + 300}, "got int64 from 300 to 300"),
    ("vit", {"image": np.zeros((3, 12, 13))}, "expected shape (N, 1, 12, 12), got (3, 1, 12, 13)"),
    (
        "resnet_of_grey",
        {"image": np.zeros((3, 2, 12, 12))},
        "shape (N, channels, 12, 12), got (3, 2, 12, 12)",
    ),
    ("vit", {"image": np.zeros((0, 12, 12))}, "expected rows, equally many for each input, got 0"),
    ("vit", {"image": np.array(["a"])}, "expected an array of numbers"),
    ("vit", {"a": np.zeros(2), "b": np.zeros(2)}, "expected arrays image, got a, b"),
    ("text_gru", {"tokens": np.full((2, 9), 30)}, "row 0: expected numbers from 0 to 29"),
    ("text_gru", {"tokens": np.full((2, 9), 0.5)}, "row 0: expected numbers from 0 to 29"),
    ("lstm", {"x": SERIES}, "row 0: expected finite numbers"),
    ("lstm", "a,b,c\n1,2,3\n", "expected a .npz file, or a .csv file for a model of a single"),
    ("multimodal", {"image": np.zeros((2, 1, 12, 12))}, "expected arrays image, genes"),
    ("mlp_of_columns", "weight,pulse\n1,2\n", "column 'glucose' not found; the file has weight, p"),
    ("mlp_of_columns", COLUMNS + "1,2,x\n", "row 2, column 'glucose': expected a number, got 'x'"),
    ("mlp_of_columns", COLUMNS + "1,2\n", "row 2: expected 3 cells as in the header"),
    ("mlp_of_columns", COLUMNS + "1,2,3,4\n", "row 2: expected 3 cells as in the header"),
    ("mlp_of_columns", COLUMNS + "1,,2\n", "row 2: expected finite numbers"),
]


def test_invalid_file_raises_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    subtests: pytest.Subtests,
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"something")
    cases = [
        (tmp_path / "m.onnx", tmp_path / "x.npz", "--model: expected a file of hetero-fl export: "),
        (tmp_path / "no.onnx", tmp_path / "x.npz", "no.onnx"),
    ]
    for number, (name, data, words) in enumerate(INVALID):
        file = tmp_path / (f"{number}.csv" if isinstance(data, str) else f"{number}.npz")
        if isinstance(data, str):
            file.write_text(data)
        else:
            np.savez(file, **data)
        cases.append((write_description(tmp_path, name), file, words))
    for model, file, words in cases:
        with subtests.test(words=words):
            assert run_script(monkeypatch, "--model", model, "--data", file) == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and words in err
