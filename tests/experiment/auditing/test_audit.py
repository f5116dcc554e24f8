"""Whole audits of small runs: who is found out and who is not, what is written, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hetero_fl
from hetero_fl.cli import main
from hetero_fl.data.federated_data import unprocessed_rows
from hetero_fl.experiment.auditing.audit import audit, without_protection
from hetero_fl.experiment.auditing.membership import candidates, train_shadow
from hetero_fl.experiment.preparation import prepare
from hetero_fl.utils.errors import UserError
from tests.helpers.small_federations import config

BARE = ["output.plots=false", "output.report=false", "evaluation.every=2"]
SPLIT = {"validation": 0.1, "test": 0.4}


def overfit(rounds: int = 2, epochs: int = 25, method: str = "local") -> dict[str, Any]:
    """Two clients whose models learn their few rows by heart."""
    source = config(
        method, models={"name": "mlp", "hidden": [64]}, clients=2, rounds=rounds, data__split=SPLIT
    )
    source["data"] |= {"proxy": {"size": 0}, "partition": {"kind": "iid"}}
    source["clients"]["defaults"] |= {"epochs": epochs, "scanner": {"noise": 0.2}}
    return source


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hetero_fl.Run:
    return hetero_fl.run(overfit(), out=tmp_path_factory.mktemp("audit") / "run", overrides=BARE)


def test_a_model_that_learnt_its_rows_by_heart_is_found_out_and_another_is_not(
    run: hetero_fl.Run, tmp_path: Path
) -> None:
    told: list[str] = []
    found = audit(run, clients=["site_1"], attack="membership", out=tmp_path, say=told.append)
    loss, lira = found["membership"]
    assert (loss["attack"], lira["attack"], lira["members"], lira["others"]) == (
        "loss",
        "lira",
        loss["others"],
        loss["members"],
    )
    for attack in (loss, lira):
        assert attack["auroc"] > 0.5 + 4 * attack["auroc_se"]
        assert not attack["at_chance"]
    assert lira["auroc"] > loss["auroc"]
    assert len(told) == 5  # what will be done, and each of four shadows
    # the same rows, and a model that saw none of them: the other client's in this one's place
    stranger = hetero_fl.Run(run.path)
    stranger.models["site_1"] = stranger.models["site_2"]
    for attack in audit(stranger, clients=["site_1"], attack="membership", out=tmp_path)[
        "membership"
    ]:
        assert attack["at_chance"], attack


def test_rows_in_question_are_matched_and_every_one_is_in_half_of_the_shadows() -> None:
    data = prepare(overfit(epochs=1)).data
    asked = candidates(data, "site_1", seed=0)
    y, member = asked.examples.y, asked.member
    assert y is not None and torch.equal(y[member].bincount(), y[~member].bincount())
    train = unprocessed_rows(data, "site_1", ["train"])
    assert len(asked.others) + int(member.sum()) == len(train)
    rows = {row.numpy().tobytes() for row in train.x}
    assert all(
        (row.numpy().tobytes() in rows) == bool(m)
        for row, m in zip(asked.examples.x, member, strict=True)
    )
    halves = asked.shadow_assignments(6, 0, "site_1")
    assert torch.equal(halves.sum(0), torch.full((len(member),), 3))
    assert len({tuple(h.tolist()) for h in halves}) == 6
    for half in halves:
        assert (y[half].bincount(minlength=10) - y[~half].bincount(minlength=10)).abs().max() <= 1
        training = asked.shadow_rows(half)
        assert abs(len(training) - len(train)) <= 5
        assert torch.equal(training.x[len(asked.others) :], asked.examples.x[half])


def test_a_patients_rows_are_in_or_out_together() -> None:
    asked = candidates(prepare(overfit(epochs=1)).data, "site_1", seed=0)
    patient = torch.arange(len(asked.member)) // 3
    grouped = type(asked)(asked.examples, asked.member, asked.others, patient, asked.stratum)
    for half in grouped.shadow_assignments(4, 0, "site_1"):
        assert all(half[patient == p].unique().numel() == 1 for p in patient.unique())


def test_a_shadow_with_the_runs_own_rows_and_seed_is_the_run(run: hetero_fl.Run) -> None:
    prepared = prepare(run.path / "config.yaml")
    rows = {"site_1": unprocessed_rows(prepared.data, "site_1", ["train"])}
    again = train_shadow(prepared, rows, prepared.config.seed, 2)["site_1"]
    assert all(torch.equal(again.tensors[n], t) for n, t in run.models["site_1"].tensors.items())
    other = train_shadow(prepared, rows, 7, 1)["site_1"]
    assert not torch.equal(other.tensors["head.weight"], again.tensors["head.weight"])


def test_the_command_leaves_figures_a_picture_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = hetero_fl.run(overfit(1, 1, "fedavg"), out=tmp_path / "run", overrides=BARE)
    flags = ["--shadows", "0", "--images", "1", "--clients", "site_2"]
    assert main(["audit", str(made.path), *flags]) == 0
    told = capsys.readouterr()
    assert "site_2" in told.out and "by the loss" in told.out and "PSNR" in told.out
    folder = made.path / "audit"
    content = json.loads((folder / "audit.json").read_text())
    assert [row["attack"] for row in content["membership"]] == ["loss"]
    assert [row["way"] for row in content["inversion"]] == ["blind", "as trained"]
    assert (folder / "audit.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "audit.html").read_text()
    assert "Gradient inversion" in page
    assert "who was among the training rows, and whether a client's upload shows the images" in page
    assert main(["audit", str(made.path), *flags]) == 0  # again, in place


def test_what_cannot_be_inverted_is_noted_or_refused_by_name(
    run: hetero_fl.Run, tmp_path: Path
) -> None:
    found = audit(run, clients=["site_1"], shadows=0, out=tmp_path)
    assert found["inversion"] == []
    assert found["notes"] == [
        "local: 'site_1' uploads no model parameters, so there is no gradient to invert"
    ]
    with pytest.raises(
        UserError, match="--attack: inversion does not apply: local: 'site_1' uploads no model parameters"
    ):
        audit(run, clients=["site_1"], attack="inversion", out=tmp_path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--clients", "siet_1"], "has no model of 'siet_1'; did you mean 'site_1'?"),
        (["--shadows", "3"], "--shadows: must be an even number >= 4, or 0"),
        (["--batch", "9"], "--batch: must be between 1 and 4, got 9"),
        (["--attack", "members"], "--attack: unknown attack 'members'; did you mean 'membership'?"),
    ],
)
def test_mistakes_are_one_line(
    run: hetero_fl.Run, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(run.path), *flags]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_no_such_run_and_other_data(
    run: hetero_fl.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("train_limit: 330", "train_limit: 300"))
    try:
        with pytest.raises(UserError, match="the data differs from the data that this run was trained on"):
            audit(run, attack="membership", shadows=0, out=tmp_path)
    finally:
        (run.path / "config.yaml").write_text(text)


def test_without_a_protection_the_configuration_is_as_it_was() -> None:
    plain = prepare(overfit(epochs=1)).config
    assert without_protection(plain) == plain
