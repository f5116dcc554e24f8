"""Exports of small finished runs: equal predictions, contents of model cards, messages."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hetero_fl
from hetero_fl.cli import main
from hetero_fl.experiment.exporting import export
from hetero_fl.utils.errors import UserError
from tests.experiment.exporting.test_graph import require_onnx
from tests.support.cases import each_case
from tests.support.federations import config

BARE = {"rounds": 1, "evaluation__clients": None}
MODELS = [
    "cnn_bn_small",
    {"name": "mlp", "hidden": [16]},
    {"name": "cnn", "width": 4, "norm": "group"},
]
OVERRIDES = [
    {"match": "site_1", "preprocess": {"resize": 12, "normalize": "own"}},
    {"match": "site_3", "preprocess": {"channels": 3}},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hetero_fl.Run:
    """Return a run with three clients that preprocess differently and a server model."""
    source = config(
        "hybrid",
        MODELS,
        clients=3,
        clients__overrides=OVERRIDES,
        server__model={"name": "mlp", "hidden": [8]},
        **BARE,
    )
    return hetero_fl.run(source, out=tmp_path_factory.mktemp("export") / "run")


def pixels(count: int) -> torch.Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images[:count] / 16).float()[:, None]


@pytest.mark.slow
def predictions(run: hetero_fl.Run, client: str, x: Any, personal: bool = True) -> torch.Tensor:
    return torch.tensor(run.predict(client, x, personal).to_numpy())


def test_exported_files_predict_as_the_run(run: hetero_fl.Run, tmp_path: Path) -> None:
    require_onnx()
    result = hetero_fl.export(run, out=tmp_path)
    assert list(result) == ["server", "site_1", "site_2", "site_3"]
    personal = hetero_fl.export(run, "site_2", out=tmp_path, personal=True)["site_2"]
    for name, file in result.items():
        score = export.load_scorer(file.model.read_bytes())
        for count in (1, 3, 50):
            x = pixels(count)
            torch.testing.assert_close(
                score((x,)), predictions(run, name, x, personal=False), atol=1e-5, rtol=0
            )
        assert file.largest_difference is not None and file.largest_difference < 1e-5
    assert personal.model.stem == "site_2-personal"
    found = export.load_scorer(personal.model.read_bytes())((x,))
    torch.testing.assert_close(found, predictions(run, "site_2", x), atol=1e-5, rtol=0)
    assert not torch.allclose(found, predictions(run, "site_2", x, personal=False), atol=1e-2)


@pytest.fixture(scope="module")
def exported(run: hetero_fl.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an export of site_1, by the command."""
    require_onnx()
    out = tmp_path_factory.mktemp("exported")
    assert main(["export", str(run.path), "--client", "site_1", "--out", str(out)]) == 0
    return out


def test_export_command_writes_the_results_of_the_run(run: hetero_fl.Run, exported: Path) -> None:
    files = {path.name for path in exported.iterdir()}
    assert files == {"site_1.onnx", "site_1.json", "site_1.md", "score.py"}

    about = json.loads((exported / "site_1.json").read_text())
    (client,) = [c for c in run.summary["clients"] if c["id"] == "site_1"]
    rows = run.directory.details()["rows"]["site_1"]
    local = about["figures"]["personal"]
    common = about["figures"]["global"]
    assert (local["accuracy"], local["n"]) == (client["personal"]["accuracy"], rows["test"])
    assert (common["auroc"], common["n"]) == (client["global"]["auroc"], 90)
    assert about["data"]["rows"] == rows and about["data"]["clients"] == 3
    assert about["data"]["partition"]["kind"] == "dirichlet"
    assert about["model"]["parameters"] == client["parameters"]
    assert set(about["model"]["preprocess"]) == {"resize", "mean", "std"}
    named = {"name": "small", "algorithm": "hybrid", "seed": 0, "rounds_completed": 1}
    assert about["run"] == named
    digest = hashlib.sha256((exported / "site_1.onnx").read_bytes()).hexdigest()
    assert about["files"][0]["sha256"] == digest
    assert about["versions"]["run"]["torch"] == torch.__version__.split("+")[0]
    page = (exported / "site_1.md").read_text()
    for words in (
        f"{100 * client['personal']['accuracy']:.1f}%",
        f"(n = {rows['test']})",
        "partition dirichlet, alpha 0.5",
        "No differential privacy was used.",
        "does not include the client's label frequencies",
        "batch × 1 × height × width",
    ):
        assert words in page


def test_card_states_privacy_and_caveats(run: hetero_fl.Run, tmp_path: Path) -> None:
    require_onnx()
    altered = hetero_fl.Run(run.path)
    altered.summary |= {
        "privacy": {"epsilon": 7.5, "delta": 1e-5, "unit": "record"},
        "algorithm": "fedproto",
    }
    altered.summary["data"]["simulated"] = True
    details = altered.directory.details()
    details["rows"]["site_2"]["test"] = 7
    altered.directory.details = lambda: details  # type: ignore[method-assign]
    page = hetero_fl.export(altered, "site_2", out=tmp_path, personal=True)[
        "site_2"
    ].card.read_text()
    client_info = json.loads((tmp_path / "site_2-personal.json").read_text())
    assert client_info["privacy"]["epsilon"] == 7.5
    for words in (
        "ε = 7.5 at δ = 1e-05",
        "uncertain: they come from 7 rows",
        "has its own evaluation",
        "The data is simulated",
    ):
        assert words in page
    assert "The file includes the client's label frequencies" in page


def test_formats_of_a_model_share_one_card(run: hetero_fl.Run, tmp_path: Path) -> None:
    require_onnx()
    hetero_fl.export(run, "site_2", "safetensors", tmp_path)
    assert not (tmp_path / "score.py").exists(), "it cannot read safetensors files"
    tensors = hetero_fl.export(run, "site_2", "safetensors", tmp_path)["site_2"]
    graph = hetero_fl.export(run, "site_2", "onnx", tmp_path)["site_2"]
    client_info = json.loads((tmp_path / "site_2.json").read_text())
    page = graph.card.read_text()
    assert [file["format"] for file in client_info["files"]] == ["safetensors", "onnx"]
    assert "site_2.onnx` needs numpy and onnxruntime" in page
    assert "site_2.safetensors` is the file of the run and contains tensors only" in page
    assert tensors.model.read_bytes() == (run.path / "models" / "site_2.safetensors").read_bytes()
    server = hetero_fl.export(run, "server", "safetensors", tmp_path)["server"]
    figures = json.loads(server.card.with_suffix(".json").read_text())["figures"]
    assert list(figures) == ["global"]
    common = figures["global"]
    assert common["accuracy"] == run.summary["server"]["last"]["accuracy"]


@each_case(
    ("flags", "words"),
    [
        (["--client", "sitee_2"], "--client: no model of 'sitee_2'; did you mean 'site_2'?"),
        (["--format", "onx"], "--format: unknown format 'onx'; did you mean 'onnx'?"),
        (
            ["--format", "safetensors", "--personal"],
            "--personal: cannot be combined with the format safetensors",
        ),
        (["--format", "torchscript"], "--format: torchscript was removed; use onnx"),
        (["--format", "safetensors", "--out", "FILE/x"], "not writable"),
    ],
)
def test_export_flags_raise_one_line(
    run: hetero_fl.Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: str,
) -> None:
    (tmp_path / "FILE").write_text("")
    flags = [flag.replace("FILE", str(tmp_path / "FILE")) for flag in flags]
    assert main(["export", str(run.path), *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err


def test_export_refuses_a_file_that_predicts_differently(
    run: hetero_fl.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_onnx()
    content = hetero_fl.export(run, "site_2", out=tmp_path / "agrees")["site_2"].model.read_bytes()
    score = export.load_scorer(content)
    monkeypatch.setattr(export, "export_graph", lambda *given: content)

    for error in (2e-5, torch.nan):
        monkeypatch.setattr(
            export, "load_scorer", lambda _, error=error: lambda given: score(given) + error
        )
        with pytest.raises(UserError, match=r"site_2: .* predicts differently than in the run"):
            hetero_fl.export(run, "site_2", out=tmp_path / "differs")

    assert not any((tmp_path / "differs").iterdir())


CUSTOM_MODEL = """
from torch import nn


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 8)

    def forward(self, x):
        return self.layer(x.reshape(ROWS, 64)).relu()


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(8, num_classes)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "works"), [("x.shape[0]", True), ("len(x)", False)])
def test_export_of_a_custom_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, works: bool
) -> None:
    require_onnx()
    module = f"own_net_{works}"
    (tmp_path / f"{module}.py").write_text(CUSTOM_MODEL.replace("ROWS", rows))
    monkeypatch.syspath_prepend(str(tmp_path))
    source: dict[str, Any] = config("local", f"python:{module}:Net", clients=2, **BARE)
    finished = hetero_fl.run(source, out=tmp_path / "run")
    if works:
        assert hetero_fl.export(finished, "site_1")["site_1"].largest_difference is not None
    else:
        with pytest.raises(
            UserError,
            match=r"site_1: .* exported to onnx fails for a batch of 1 .*"
            r"x\.shape\[0\] instead of len\(x\)",
        ):
            hetero_fl.export(finished, "site_1")
