"""A newcomer: what it may take of a finished run, that it trains as everybody does, what is written and refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import hetero_fl
from hetero_fl.algorithms.onboarding import SCRATCH, JoiningClient
from hetero_fl.cli import main
from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import from_arrays
from hetero_fl.experiment.onboarding.newcomers import LONGER, JoiningClients, JoiningSite
from hetero_fl.experiment.onboarding.report import draw_join, is_better
from hetero_fl.experiment.onboarding.transfer import TransferSource
from hetero_fl.utils.errors import UserError
from tests.helpers.small_federations import broadcasts, config, rounds_of, same_bits

Folder = Path
WAYS = {"scratch", "backbone", "teacher", "both"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Two files of digits that share no row, and a finished run on the first: two clients of one kind and one of another."""
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
    place: Folder, out: Folder, model: str | None = None, run: str = "run", **options: Any
) -> dict[str, Any]:
    options = {"patients": (10, 40), "seeds": (0, 1), "epochs": 2, **options}
    return hetero_fl.join(
        place / run, options.pop("data", str(place / "new.npz")), model, out=out, **options
    )


@pytest.mark.slow
def test_what_is_written(place: Folder, tmp_path: Folder) -> None:
    content = join(place, tmp_path / "out")
    assert content["model"] == "cnn_gn_small" and content["notes"] == []
    assert content["teacher_on"] == "the run's 120 public rows"
    told = {(r["begins"], r["patients"], r["seed"]) for r in content["rows"]}
    assert told == {(w, n, s) for w in WAYS for n in (10, 40) for s in (0, 1)}
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
    models = {p.stem: SavedModel.load(p) for p in (tmp_path / "out" / "models").iterdir()}
    assert set(models) == WAYS
    file = np.load(place / "new.npz")
    x = torch.from_numpy(file["test_images"])[:, None].float() / 255
    found = (models["teacher"].logits(x).argmax(1).numpy() == file["test_labels"]).mean()
    (row,) = [
        r for r in content["rows"] if (r["begins"], r["patients"], r["seed"]) == ("teacher", 40, 0)
    ]
    assert found == pytest.approx(row["accuracy"])
    means = {(e["begins"], e["patients"]): e["accuracy"] for e in content["table"]}
    assert means["teacher", 10] > means["scratch", 10] + 0.05
    assert join(place, tmp_path / "again")["rows"] == content["rows"]


@pytest.mark.slow
def test_only_the_shared_backbone_is_taken(place: Folder) -> None:
    legacy = TransferSource(hetero_fl.Run(place / "run"))
    first, second = legacy.models["cnn_1"], legacy.models["cnn_2"]
    taken = legacy.backbone(first.arch)
    assert taken is not None and set(taken) == {
        n for n in floating_tensors(first.tensors) if n.startswith("backbone.")
    }
    for name, tensor in taken.items():
        assert torch.equal(tensor, (first.tensors[name] + second.tensors[name]) / 2)
    assert not torch.equal(first.tensors["head.weight"], second.tensors["head.weight"])


def test_a_newcomer_receives_once_and_then_trains_as_everybody_does(place: Folder) -> None:
    alone, newcomer = (rounds_of(config("local"), held=0) for _ in range(2))
    newcomer.algorithm = newcomer.executor.runtime.algorithm = newcomer.expectations.algorithm = (
        JoiningClient()
    )  # type: ignore[attr-defined]
    for rounds in (alone, newcomer):
        rounds.run_round()
    for id in alone.federation.client_infos:
        assert same_bits(
            alone.store.get(id).models["model"], newcomer.store.get(id).models["model"]
        )
    card = newcomer.federation.client_infos["site_1"]
    taken = {
        n: t + 1
        for n, t in newcomer.server.models[card.arch.spec_id].items()
        if n.startswith("backbone.") and t.is_floating_point()
    }
    newcomer.server.state["backbone"] = taken
    newcomer.run_round()
    assert not same_bits(
        newcomer.store.get("site_1").models["model"], alone.store.get("site_1").models["model"]
    )
    assert all(body == broadcasts(newcomer, ["site_1"], for_evaluation=True)["site_1"] for body in
               broadcasts(newcomer, ["site_1", "site_2"], for_evaluation=True).values())  # fmt: skip
    assert (
        len(broadcasts(newcomer, ["site_1"])["site_1"])
        > 1000
        > len(broadcasts(newcomer, ["site_1"], for_evaluation=True)["site_1"])
    )


def test_the_consensus_is_the_mean_prediction(place: Folder) -> None:
    legacy = TransferSource(hetero_fl.Run(place / "run"))
    x = torch.from_numpy(np.load(place / "new.npz")["test_images"])[:, None]
    want = torch.stack(
        [legacy.run.predict(id, x, personal=False) for id in ("cnn_1", "cnn_2", "mlp")]
    ).mean(0)
    assert torch.allclose(legacy.consensus(x).exp(), want, atol=1e-6)


@pytest.mark.slow
def test_nobody_shared_a_backbone(place: Folder, tmp_path: Folder) -> None:
    with pytest.raises(UserError, match=r"--take: no client in .* shared the backbone of a vit"):
        join(place, tmp_path / "a", "vit", transfer="backbone")
    content = join(
        place, tmp_path / "b", "vit", patients=(20,), seeds=(0,), overrides=["optimizer.lr=0.002"]
    )
    assert {r["begins"] for r in content["rows"]} == {"scratch", "teacher"} and "no client" in content[
        "notes"
    ][0]
    finished(place, "alone", "local", proxy=0)
    with pytest.raises(UserError, match="shared the backbone of a cnn_gn_small"):
        join(place, tmp_path / "c", run="alone", transfer="backbone")
    content = join(place, tmp_path / "d", run="alone", patients=(20,), seeds=(0,))
    assert content["teacher_on"] == "the joining client's 500 training rows, without labels"


@pytest.mark.slow
def test_rows_that_the_run_has_trained_on_are_told(place: Folder, tmp_path: Folder) -> None:
    content = join(
        place,
        tmp_path / "out",
        data=str(place / "run.npz"),
        patients=(20,),
        seeds=(0,),
        transfer="both",
    )
    assert {r["begins"] for r in content["rows"]} == {"scratch", "both"}
    (note,) = content["notes"]
    assert "training rows are also in the run's training rows: scores are too optimistic for it" in note


def test_rows_are_looked_for_all_at_once(place: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    legacy = TransferSource(hetero_fl.Run(place / "run"))
    assert legacy.data is not None
    held = list(legacy.data.data.private_rows())
    other = torch.from_numpy(np.load(place / "new.npz")["train_images"])[:50, None]
    asked = torch.cat([held[0][:3], held[0][:1], held[2][-2:], other])
    taken: list[int] = []
    numpy = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: taken.append(len(self)) or numpy(self))
    assert legacy.num_seen(asked) == 6  # one of them twice
    assert taken == [len(asked), *map(len, held)]
    assert legacy.num_seen(asked[:, :, 1:]) == 0  # examples of another shape


def test_patients_stay_whole_and_more_of_them_contain_fewer() -> None:
    patient = [i // 3 for i in range(90)]
    examples = from_arrays(torch.rand(90, 4), [0, 1] * 45, patient=patient).train
    site = JoiningSite(examples, examples, (5, 20), "patients", Task("multiclass", 2))
    few, many = site.rows(5, 1), site.rows(20, 1)
    assert len(few) == 15 and len(many) == 60 and set(few.tolist()) <= set(many.tolist())
    assert not torch.equal(few, site.rows(5, 2))


def test_labels_come_in_the_mix_of_all() -> None:
    label = torch.tensor([0] * 30 + [1] * 90)
    site = JoiningSite(from_arrays(torch.rand(120, 4), label).train, from_arrays(torch.rand(4, 4), [0, 1, 1, 1]).train, (8,),
                "examples", Task("multiclass", 2))  # fmt: skip
    for seed in range(20):
        assert label[site.rows(8, seed)].sum() == 6 and len(site.rows(120, seed)) == 120
    assert len({tuple(site.rows(8, seed).tolist()) for seed in range(20)}) == 20


def test_ahead_means_by_more_than_both_deviations() -> None:
    scratch = {"accuracy": 0.6, "accuracy_std": 0.05, "mae": 2.0, "mae_std": 0.1}
    assert is_better({"accuracy": 0.72, "accuracy_std": 0.06}, scratch, "accuracy")
    assert not is_better({"accuracy": 0.70, "accuracy_std": 0.06}, scratch, "accuracy")
    assert is_better({"mae": 1.7, "mae_std": 0.1}, scratch, "mae") and not is_better(
        {"mae": 2.4, "mae_std": 0.1}, scratch, "mae"
    )
    assert not is_better({"accuracy": 0.9, "accuracy_std": None}, scratch, "accuracy")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "cnn_gn_smal"], "cnn_gn_smal"),
        (["--patients", "10,many"], "--patients: expected integers such as 0,1,2, got '10,many'"),
        (["--patients", "1"], "--patients: expected integers >= 2"),
        (["--patients", "5000"], "must be <= 500, the number of labeled training examples"),
        (["optimizer.lrr=1"], "clients.defaults.optimizer.lrr: unknown key"),
        (["--epochs", "0"], "'--epochs': 0 is not in the range"),
        (["--data", "chest_xray"], "10"),
    ],
)
def test_mistakes_are_one_line(
    place: Folder,
    tmp_path: Folder,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    data = [] if "--data" in arguments else ["--data", str(place / "new.npz")]
    assert (
        main(["join", str(place / "run"), *data, *arguments, "--out", str(tmp_path / "out")]) == 2
    )
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and told in line and not (tmp_path / "out").exists()


def test_the_command(place: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--patients", "10", "--seeds", "0", "--epochs", "1", "--take", "teacher"]
    assert (
        main(
            [str(place / "run"), "--data", str(place / "new.npz"), "--model", "mlp", *quick],
            command="join",
        )
        == 0
    )
    assert (
        "# mlp joins run" in capsys.readouterr().out
        and (place / "run" / "join-mlp" / "join.json").is_file()
    )
    assert (
        main(
            [str(place / "run"), "--data", str(place / "new.npz"), "--model", "mlp", *quick],
            command="join",
        )
        == 2
    )
    assert capsys.readouterr().err.endswith("join-mlp: already exists; choose another --out\n")


def test_a_band_of_shares_ends_where_they_do() -> None:
    row = {"begins": "scratch", **dict.fromkeys(("accuracy", "balanced_accuracy", "auroc"), 0.9)}
    wide = {f"{m}_std": 0.2 for m in row if m != "begins"}
    table = [{"patients": n, **row, **wide} for n in (10, 30)]
    content = {
        "table": table,
        "rows": [row],
        "patients": [10, 30],
        "unit": "patients",
        "consensus": dict.fromkeys(row),
    }
    for axes in draw_join(content, Task("multiclass", 2)).axes:
        (band,) = axes.collections
        assert band.get_paths()[0].vertices[:, 1].max() == 1


@pytest.mark.parametrize(("option", "times"), [(SCRATCH, LONGER), ("backbone", 1)])
def test_training_from_scratch_takes_more_steps(option: str, times: int) -> None:
    asked: list[int] = []

    def config(seed: int, longer: int) -> None:
        asked.append(longer)
        raise UserError("asked for")

    with pytest.raises(UserError, match="asked for"):
        JoiningClients.run_transfer(SimpleNamespace(config=config), 0, option, {}, None)  # type: ignore[arg-type]
    assert asked == [times]
