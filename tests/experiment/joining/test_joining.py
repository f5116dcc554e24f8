"""Joining clients: transfer from a finished run, local training, output files, messages."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import hetero_fl
from hetero_fl.algorithms.hybrid import SCRATCH, JoiningClient
from hetero_fl.cli import main
from hetero_fl.core.metrics import metric_names
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import from_arrays
from hetero_fl.experiment.joining.join import (
    SCRATCH_STEP_FACTOR,
    JoiningClients,
    TransferSource,
    labeled_rows,
)
from hetero_fl.experiment.joining.report import defined_metrics, is_clearly_better
from hetero_fl.experiment.preparation import num_training_rows
from hetero_fl.utils.errors import UserError
from tests.support.federations import broadcasts, config, rounds_of, same_bits, set_method

Folder = Path
STARTS = {"scratch", "backbone", "teacher", "both"}


def test_joining_shows_the_metrics_of_comparisons() -> None:
    for task, expected in (
        (Task("multiclass", 2), ["balanced_accuracy", "auroc", "accuracy"]),
        (Task("multiclass", 3), ["accuracy", "balanced_accuracy", "auroc"]),
        (Task("multiclass", 2, rare=1), ["auroc", "average_precision"]),
        (Task("multiclass", 30), ["accuracy", "top3_accuracy", "perplexity"]),
        (Task("multilabel", 3), ["auroc", "average_precision", "balanced_accuracy"]),
        (Task("regression", 1), ["mae", "rmse", "r2"]),
    ):
        row = dict.fromkeys(metric_names(task), 0.5)
        less = [expected[0], *expected[2:]]

        assert defined_metrics({"rows": [row]}, task) == expected
        assert defined_metrics({"rows": [{**row, expected[1]: None}]}, task) == less


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return a folder with two disjoint files of digits and a finished run on the first.

    Two clients of the run share an architecture; the third has another one.
    """
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("join")
    digits = load_digits()
    x, y = (digits.images * 15.9).astype("uint8"), digits.target
    np.savez(
        folder / "run.npz",
        train_images=x[:900],
        train_labels=y[:900],
        test_images=x[900:1000],
        test_labels=y[900:1000],
    )
    np.savez(
        folder / "new.npz",
        train_images=x[1000:1500],
        train_labels=y[1000:1500],
        test_images=x[1500:],
        test_labels=y[1500:],
    )
    finished(folder, "run", "hybrid")
    return folder


def finished(folder: Folder, name: str, method: str, proxy: int = 120) -> None:
    torch.set_num_threads(1)
    source = {
        "name": name,
        "rounds": 4,
        "data": {"name": "npz", "path": str(folder / "run.npz"), "proxy": {"size": proxy}},
        "clients": {
            "defaults": {"epochs": 2, "optimizer": {"name": "adam", "lr": 0.003}, "batch_size": 32},
            "groups": [
                {"name": "cnn", "count": 2, "model": "cnn_gn_small"},
                {
                    "name": "mlp",
                    "model": {"name": "mlp", "hidden": [32]},
                    "preprocess": {"normalize": {"mean": 0.3, "std": 0.4}},
                },
            ],
        },
        "algorithm": {"name": method, **({"heads": "keep"} if method == "hybrid" else {})},
        "runtime": {"executor": "serial", "threads": 1},
        "output": {"plots": False, "report": False},
    }
    hetero_fl.run(source, out=folder / name)


def join(
    folder: Folder, out: Folder, model: str | None = None, run: str = "run", **options: Any
) -> dict[str, Any]:
    options = {"patients": (10, 40), "seeds": (0, 1), "epochs": 2, **options}
    return hetero_fl.join(
        folder / run, options.pop("data", str(folder / "new.npz")), model, out=out, **options
    )


@pytest.mark.slow
def test_join_writes_results_page_and_models(data_folder: Folder, tmp_path: Folder) -> None:
    content = join(data_folder, tmp_path / "out")
    assert content["model"] == "cnn_gn_small" and content["notes"] == []
    assert content["teacher_on"] == "the run's 120 public rows"
    accuracy = {(r["begins"], r["patients"], r["seed"]) for r in content["rows"]}
    assert accuracy == {(w, n, s) for w in STARTS for n in (10, 40) for s in (0, 1)}
    assert json.loads((tmp_path / "out" / "join.json").read_text()) == content
    page = (tmp_path / "out" / "join.md").read_text()
    header = next(line for line in page.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "labeled",
        "from scratch",
        "shared backbone",
        "consensus teacher",
        "backbone and teacher",
    ]
    assert "## Balanced accuracy" in page
    assert (tmp_path / "out" / "join.png").stat().st_size > 10_000
    models = {
        p.stem: SavedModel.load(p) for p in (tmp_path / "out" / "models").glob("*.safetensors")
    }
    assert set(models) == STARTS
    file = np.load(data_folder / "new.npz")
    x = torch.from_numpy(file["test_images"])[:, None].float() / 255
    accuracy = (models["teacher"].logits(x).argmax(1).numpy() == file["test_labels"]).mean()
    (row,) = [
        r for r in content["rows"] if (r["begins"], r["patients"], r["seed"]) == ("teacher", 40, 0)
    ]
    assert accuracy == pytest.approx(row["accuracy"])
    means = {(e["begins"], e["patients"]): e["accuracy"] for e in content["table"]}
    assert means["teacher", 10] > means["scratch", 10] + 0.05
    assert join(data_folder, tmp_path / "again")["rows"] == content["rows"]


def test_joining_client_receives_once_then_trains_locally(data_folder: Folder) -> None:
    local, joining = (rounds_of(config("local"), num_rounds=0) for _ in range(2))
    set_method(joining, JoiningClient())
    for rounds in (local, joining):
        rounds.run_round()
    for client_id in local.federation.client_infos:
        assert same_bits(
            local.store.get(client_id).models["model"], joining.store.get(client_id).models["model"]
        )
    client_info = joining.federation.client_infos["site_1"]
    taken = {
        n: t + 1
        for n, t in joining.server.models[client_info.arch.spec_id].items()
        if n.startswith("backbone.") and t.is_floating_point()
    }
    joining.server.state["backbone"] = taken
    joining.run_round()
    assert not same_bits(
        joining.store.get("site_1").models["model"], local.store.get("site_1").models["model"]
    )
    evaluation_body = broadcasts(joining, ["site_1"], for_evaluation=True)["site_1"]
    evaluation_bodies = broadcasts(joining, ["site_1", "site_2"], for_evaluation=True)
    assert all(body == evaluation_body for body in evaluation_bodies.values())
    assert len(broadcasts(joining, ["site_1"])["site_1"]) > 1000 > len(evaluation_body)


def test_consensus_is_the_mean_prediction(data_folder: Folder) -> None:
    transfer_source = TransferSource(hetero_fl.Run(data_folder / "run"))
    x = torch.from_numpy(np.load(data_folder / "new.npz")["test_images"])[:, None]
    expected = sum(
        transfer_source.run.predict(client_id, x, personal=False).to_numpy()
        for client_id in ("cnn_1", "cnn_2", "mlp")
    )
    assert np.allclose(transfer_source.consensus(x).exp(), expected / 3, atol=1e-6)


@pytest.mark.slow
def test_join_without_a_shared_backbone(data_folder: Folder, tmp_path: Folder) -> None:
    with pytest.raises(UserError, match=r"transfer: no client in .* shared the backbone of a vit"):
        join(data_folder, tmp_path / "a", "vit", transfer="backbone")
    content = join(
        data_folder,
        tmp_path / "b",
        "vit",
        patients=(20,),
        seeds=(0,),
        overrides=["optimizer.lr=0.002"],
    )
    assert {r["begins"] for r in content["rows"]} == {"scratch", "teacher"}
    assert "no client" in content["notes"][0]
    finished(data_folder, "alone", "local", proxy=0)
    with pytest.raises(UserError, match="shared the backbone of a cnn_gn_small"):
        join(data_folder, tmp_path / "c", run="alone", transfer="backbone")
    content = join(data_folder, tmp_path / "d", run="alone", patients=(20,), seeds=(0,))
    assert content["teacher_on"] == "the joining client's 500 training rows, without labels"


@pytest.mark.slow
def test_join_accepts_a_pair_of_arrays_and_notes_training_rows(
    data_folder: Folder, tmp_path: Folder
) -> None:
    with np.load(data_folder / "new.npz") as arrays:
        x, y = arrays["train_images"], arrays["train_labels"]
    options: dict[str, Any] = {"transfer": "backbone", "patients": [20], "seeds": [0]}
    trained = str(data_folder / "run.npz")

    (note,) = join(data_folder, tmp_path / "out", data=trained, **options)["notes"]
    assert "training rows are also in the run's training rows: scores are too optimistic" in note

    pair = hetero_fl.join(data_folder / "run", (x, y), out=tmp_path / "a", **options)
    # The name determines which rows are held out.
    dataset = from_arrays(x, y, name="data")
    same = hetero_fl.join(data_folder / "run", dataset, out=tmp_path / "b", **options)

    assert pair["rows"] == same["rows"] and {row["begins"] for row in pair["rows"]} == {
        "scratch",
        "backbone",
    }


def test_training_rows_of_the_run_are_counted(data_folder: Folder) -> None:
    transfer_source = TransferSource(hetero_fl.Run(data_folder / "run"))
    assert transfer_source.prepared is not None
    private_rows = list(transfer_source.prepared.data.private_rows())
    other = torch.from_numpy(np.load(data_folder / "new.npz")["train_images"])[:50, None]
    rows = torch.cat([private_rows[0][:3], private_rows[0][:1], private_rows[2][-2:], other])

    assert num_training_rows(transfer_source.prepared, rows) == 6
    assert num_training_rows(transfer_source.prepared, rows[:, :, 1:]) == 0


def test_labeled_rows_are_nested_keep_patients_together_and_the_label_mix() -> None:
    task = Task("multiclass", 2)
    patient = [i // 3 for i in range(90)]
    train = from_arrays(torch.rand(90, 4), [0, 1] * 45, patient=patient).train
    few, many = labeled_rows(train, task, 5, 1), labeled_rows(train, task, 20, 1)
    assert len(few) == 15 and len(many) == 60 and set(few.tolist()) <= set(many.tolist())
    assert not torch.equal(few, labeled_rows(train, task, 5, 2))

    label = torch.tensor([0] * 30 + [1] * 90)
    train = from_arrays(torch.rand(120, 4), label).train
    drawn = [labeled_rows(train, task, 8, seed) for seed in range(20)]
    assert {int(label[rows].sum()) for rows in drawn} == {6}
    assert len(labeled_rows(train, task, 120, 0)) == 120
    assert len({tuple(rows.tolist()) for rows in drawn}) == 20


def test_is_clearly_better_requires_more_than_both_deviations() -> None:
    scratch = {"accuracy": 0.6, "accuracy_std": 0.05, "mae": 2.0, "mae_std": 0.1}
    assert is_clearly_better({"accuracy": 0.72, "accuracy_std": 0.06}, scratch, "accuracy")
    assert not is_clearly_better({"accuracy": 0.70, "accuracy_std": 0.06}, scratch, "accuracy")
    assert is_clearly_better(
        {"mae": 1.7, "mae_std": 0.1}, scratch, "mae"
    ) and not is_clearly_better({"mae": 2.4, "mae_std": 0.1}, scratch, "mae")
    assert not is_clearly_better({"accuracy": 0.9, "accuracy_std": None}, scratch, "accuracy")


FLAGS = [
    (["--model", "cnn_gn_smal"], "cnn_gn_smal"),
    (["--patients", "10,many"], "--patients: expected integers >= 0, such as 0,1,2, got '10,many'"),
    (["--patients", "1"], "--patients: expected integers >= 2"),
    (["--patients", "5000"], "must be <= 500, the number of labeled training examples"),
    (["optimizer.lrr=1"], "clients.defaults.optimizer.lrr: unknown key"),
    (["--epochs", "0"], "--epochs: must be >= 1, got 0"),
    (["--data", "chest_xray"], "'normal' is unknown to the models"),
]


def test_join_command_refuses_flags_and_prints_the_table(
    data_folder: Folder, capsys: pytest.CaptureFixture[str], subtests: pytest.Subtests
) -> None:
    places = [str(data_folder / "run"), "--data", str(data_folder / "new.npz")]
    quick = ["--patients", "10", "--seeds", "0", "--epochs", "1", "--take", "teacher"]
    out = data_folder / "run" / "join-mlp"
    for arguments, message in FLAGS:
        with subtests.test(message=message):
            assert main(["join", *places, "--model", "mlp", *arguments]) == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert line.startswith("error: ") and message in line and not out.exists()

    assert main(["join", *places, "--model", "mlp", *quick]) == 0
    assert "# mlp joins run" in capsys.readouterr().out
    assert (out / "join.json").is_file()
    assert main(["join", *places, "--model", "mlp", *quick]) == 2
    assert capsys.readouterr().err.endswith("join-mlp: already exists; choose another folder\n")
    with pytest.raises(UserError, match="seeds: expected one or more integers, got none"):
        join(data_folder, out.with_name("other"), seeds=())


@pytest.mark.parametrize(("option", "times"), [(SCRATCH, SCRATCH_STEP_FACTOR), ("backbone", 1)])
def test_training_from_scratch_takes_more_epochs(option: str, times: int) -> None:
    factors: list[int] = []

    def config(seed: int, longer: int) -> None:
        factors.append(longer)
        raise UserError("requested")

    with pytest.raises(UserError, match="requested"):
        JoiningClients.run_transfer(SimpleNamespace(config=config), 0, option, {}, None)  # type: ignore[arg-type]
    assert factors == [times]
