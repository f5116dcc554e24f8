"""The comparison with HtFLlib: splits, models, outputs and runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.science import htfllib_parity as parity
from benchmarks.science.htfllib_models import FAMILIES, FEATURE_DIM
from benchmarks.science.htfllib_split import main as write_split_command, write_split
from hetero_fl.experiment.comparison.study import Study
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.errors import UserError
from model_zoo import create_model
from tests.support.cases import each_case

# The lines that HtFLlib prints in two rounds and at the end.
THEIR_OUTPUT = """
-------------Round number: 0-------------

Evaluate heterogeneous models
Client 0: Acc: 0.1, AUC: 0.5
Averaged Test Accuracy: 0.1000
Averaged Test AUC: 0.5000
Std Test Accuracy: 0.0000
Std Test AUC: 0.0000
-------------------------------------------------- 0.5

-------------Round number: 1-------------

Evaluate heterogeneous models
Client 0: Acc: 0.75, AUC: 0.9
Averaged Test Accuracy: 0.7500
Averaged Test AUC: 0.9000

Best accuracy.
0.75
"""


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("splits") / "digits_0"
    write_split(folder, clients=4, alpha=0.5, seed=0)
    return folder


def test_split_has_the_layout_of_htfllib(split: Path) -> None:
    config = json.loads((split / "config.json").read_text())
    counts = config["Size of samples for labels in clients"]
    total = 0
    for client in range(4):
        rows = {}
        for part in ("train", "test"):
            with np.load(split / part / f"{client}.npz", allow_pickle=True) as file:
                rows[part] = file["data"].item()
        own = sum(n for _, n in counts[client])
        assert len(rows["train"]["y"]) + len(rows["test"]["y"]) == own
        assert len(rows["test"]["y"]) == round(0.25 * own)
        assert rows["train"]["x"].shape[1:] == (3, 16, 16)
        assert -1 <= rows["train"]["x"].min() < rows["train"]["x"].max() <= 1
        assert rows["train"]["x"].dtype == np.float32
        total += own
    assert total == 1797 and (config["num_clients"], config["num_classes"]) == (4, 10)


def test_outputs_belong_to_a_split_which_depends_on_the_seed_only(
    split: Path, tmp_path: Path
) -> None:
    same, other = tmp_path / "same" / split.name, tmp_path / "other" / split.name
    write_split(same, clients=4, alpha=0.5, seed=0)
    write_split(other, clients=4, alpha=0.5, seed=1)

    expected = (split / "train" / "2.npz").read_bytes()
    assert (same / "train" / "2.npz").read_bytes() == expected
    assert (other / "train" / "2.npz").read_bytes() != expected
    setting = parity.Setting(1, "digits", tmp_path)
    first, again, changed = (setting.header(parity.Split.read(f)) for f in (split, same, other))
    assert first == again != changed


@each_case("family", ["digits", "HtFE-img-4"])
def test_models_have_pooled_features(family: str) -> None:
    side = 16 if family == "digits" else 32
    for config in FAMILIES[family]:
        options = {key: value for key, value in config.items() if key != "name"}
        model = create_model(config["name"], 7, in_channels=3, input_size=side, **options).eval()

        x = torch.rand(2, 3, side, side)

        assert model(x).shape == (2, 7)
        assert model.forward_features(x).shape == (2, FEATURE_DIM)


def test_cnn_has_the_parameters_of_htfllib() -> None:
    name = FAMILIES["HtFE-img-2"][0]["name"]

    model = create_model(name, 10, in_channels=3, input_size=32)

    # Two 5x5 convolutions without padding leave 1600 values of a 32x32 image.
    expected = 32 * 76 + 64 * 801 + 512 * 1601 + 10 * 513
    assert sum(p.numel() for p in model.parameters()) == expected


def test_options_of_htfllib_equal_the_study() -> None:
    config = load_config(Study.load(parity.STUDY).config, allow_code=True)
    client = config.clients.defaults
    words = parity.COMMON.split()
    options = dict(zip(words[::2], words[1::2], strict=True))

    assert client.optimizer.name == "sgd" and client.optimizer.momentum == 0
    assert (client.optimizer.lr, client.batch_size, client.epochs) == (
        float(options["-lr"]),
        int(options["-lbs"]),
        int(options["-ls"]),
    )
    assert int(options["-fd"]) == FEATURE_DIM
    assert [method.name for method in parity.select_methods(None)] == [
        name for name, _ in parity.IN_HTFLLIB.values()
    ]


def test_round_is_weighted_by_test_rows_and_read_again() -> None:
    text = parity.format_round(3, [1.0, 0.5], [10, 30])

    assert "-------------Round number: 3-------------" in text
    assert "Averaged Test Accuracy: 0.6250\nStd Test Accuracy: 0.2500" in text
    assert parity.read_accuracies(text) == [0.625]
    assert parity.read_accuracies(THEIR_OUTPUT) == [0.1, 0.75]


def test_table_has_differences_of_folders() -> None:
    ours = {"best": [90.0, 92.0, 80.0, 84.0], "last": [90.0, 90.0, 80.0, 80.0]}
    theirs = {"best": [90.0, 80.0], "last": [91.0, 83.0]}

    header, both, alone = parity.format_table({"A": (ours, theirs), "B": (ours, None)}).split("\n")

    assert header.split()[:3] == ["method", "hetero_fl,", "best"]
    # Seeds are averaged first: 91 - 90 and 82 - 80.
    assert "85.00 ± 7.07" in both and "+1.50 ± 0.71" in both and "-2.00 ± 1.41" in both
    assert "±" in alone and "+" not in alone


def test_finished_runs_are_not_repeated(
    split: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["htfllib_parity", "--data", str(split), "--rounds", "1", "--methods", "Local"]
    command += ["--out", str(tmp_path)]
    theirs = tmp_path / "HtFLlib" / "Local-digits_0.out"
    theirs.parent.mkdir()
    theirs.write_text(THEIR_OUTPUT)
    monkeypatch.setattr("sys.argv", command)

    parity.main()
    first = capsys.readouterr().out
    output = (tmp_path / "hetero_fl" / "Local-digits_0-0.out").read_text()
    monkeypatch.setattr(parity.hetero_fl, "run", lambda *_, **__: pytest.fail("repeated"))
    parity.main()

    assert capsys.readouterr().out == first
    assert len(parity.read_accuracies(output)) == 1
    assert output.count("Client ") == 4 and "\nBest accuracy.\n0." in output
    assert "HtFLlib, Local:\nstd for best accuracy: 0.0\nmean for best accuracy: 0.75\n" in first


def test_outputs_of_other_settings_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "a.out"
    path.write_text("# rounds=2\n\nBest accuracy.\n0.5\n")

    assert parity.is_finished(path, "# rounds=2")
    assert not parity.is_finished(path, "# rounds=20")
    assert not parity.is_finished(tmp_path / "b.out", "# rounds=2")


def test_mistakes_are_one_line(
    split: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UserError, match=r"folder '.*none' not found"):
        parity.Split.read(tmp_path / "none")
    with pytest.raises(SystemExit, match="--methods: unknown method 'fedproto'; choose from Local"):
        parity.select_methods("fedproto")
    monkeypatch.setattr("sys.argv", ["htfllib_split", "--out", str(split)])
    with pytest.raises(SystemExit):
        write_split_command()
    assert "already exists; choose another folder" in capsys.readouterr().err
    for options, words in (
        ([str(tmp_path / split.name)], "--data: two folders have the same name"),
        (["--htfllib", str(tmp_path)], "--htfllib: .*: folder 'system/flcore' not found"),
        (["--rounds", "0"], "rounds: must be > 0, got 0"),
    ):
        monkeypatch.setattr("sys.argv", ["htfllib_parity", "--data", str(split), *options])
        with pytest.raises(SystemExit, match=words):
            parity.main()


@pytest.mark.slow
def test_every_method_runs(split: Path, tmp_path: Path) -> None:
    setting = parity.Setting(1, "digits", tmp_path)
    sizes = parity.Split.read(split)
    for method in parity.select_methods(None):
        parity.run_ours(method, sizes, 0, setting)
        output = parity.our_output(method, sizes, 0, setting)
        assert len(parity.read_accuracies(output.read_text())) == 1
