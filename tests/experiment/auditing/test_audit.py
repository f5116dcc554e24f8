"""Audits of small finished runs: detected and undetected members, output files, messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hetero_fl
from hetero_fl.cli import main
from hetero_fl.data.federated_data import unprocessed_rows
from hetero_fl.experiment.auditing.audit import audit
from hetero_fl.experiment.auditing.membership import candidates, train_shadow
from hetero_fl.experiment.preparation import prepare
from hetero_fl.utils.errors import UserError
from tests.support.federations import config

BARE = ["output.plots=false", "output.report=false", "evaluation.every=2"]
SPLIT = {"validation": 0.1, "test": 0.4}


def overfit(rounds: int = 2, epochs: int = 25, method: str = "local") -> dict[str, Any]:
    """Return a configuration with two clients whose models overfit their few rows."""
    source = config(
        method, models={"name": "mlp", "hidden": [64]}, clients=2, rounds=rounds, data__split=SPLIT
    )
    source["data"] |= {"proxy": {"size": 0}, "partition": {"kind": "iid"}}
    source["clients"]["defaults"] |= {"epochs": epochs, "scanner": {"noise": 0.2}}
    return source


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hetero_fl.Run:
    return hetero_fl.run(overfit(), out=tmp_path_factory.mktemp("audit") / "run", overrides=BARE)


def test_membership_attack_detects_an_overfit_model(run: hetero_fl.Run, tmp_path: Path) -> None:
    messages: list[str] = []
    found = audit(run, clients=["site_1"], attack="membership", out=tmp_path, log=messages.append)
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
    # one message about the plan, and one for each of four shadows
    assert len(messages) == 5
    # replace the model with one that has seen none of these rows
    swapped = hetero_fl.Run(run.path)
    swapped.models["site_1"] = swapped.models["site_2"]
    for attack in audit(swapped, clients=["site_1"], attack="membership", out=tmp_path)[
        "membership"
    ]:
        assert attack["at_chance"], attack


def test_candidates_are_balanced_over_classes_and_shadows() -> None:
    data = prepare(overfit(epochs=1)).data
    selected = candidates(data, "site_1", seed=0)
    y, member = selected.examples.y, selected.member
    assert y is not None and torch.equal(y[member].bincount(), y[~member].bincount())
    train = unprocessed_rows(data, "site_1", ["train"])
    assert len(selected.others) + int(member.sum()) == len(train)
    rows = {row.numpy().tobytes() for row in train.x}
    assert all(
        (row.numpy().tobytes() in rows) == bool(is_member)
        for row, is_member in zip(selected.examples.x, member, strict=True)
    )
    halves = selected.shadow_assignments(6, 0, "site_1")
    assert torch.equal(halves.sum(0), torch.full((len(member),), 3))
    assert len({tuple(half_mask.tolist()) for half_mask in halves}) == 6
    for half in halves:
        assert (y[half].bincount(minlength=10) - y[~half].bincount(minlength=10)).abs().max() <= 1
        training = selected.shadow_rows(half)
        assert abs(len(training) - len(train)) <= 5
        assert torch.equal(training.x[len(selected.others) :], selected.examples.x[half])


def test_shadow_assignments_keep_patients_together() -> None:
    selected = candidates(prepare(overfit(epochs=1)).data, "site_1", seed=0)
    patient = torch.arange(len(selected.member)) // 3
    grouped = type(selected)(
        selected.examples, selected.member, selected.others, patient, selected.stratum
    )
    for half in grouped.shadow_assignments(4, 0, "site_1"):
        assert all(half[patient == p].unique().numel() == 1 for p in patient.unique())


def test_shadow_with_rows_and_seed_of_the_run_equals_it(run: hetero_fl.Run) -> None:
    prepared = prepare(run.path / "config.yaml")
    rows = {"site_1": unprocessed_rows(prepared.data, "site_1", ["train"])}
    retrained = train_shadow(prepared, rows, prepared.config.seed, 2)["site_1"]
    assert all(
        torch.equal(retrained.tensors[n], t) for n, t in run.models["site_1"].tensors.items()
    )
    other = train_shadow(prepared, rows, 7, 1)["site_1"]
    assert not torch.equal(other.tensors["head.weight"], retrained.tensors["head.weight"])


def test_audit_command_writes_json_figure_and_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = hetero_fl.run(overfit(1, 1, "fedavg"), out=tmp_path / "run", overrides=BARE)
    flags = ["--shadows", "0", "--images", "1", "--clients", "site_2"]
    assert main(["audit", str(result.path), *flags]) == 0
    printed = capsys.readouterr()
    assert "site_2" in printed.out and " loss " in printed.out and "PSNR" in printed.out
    folder = result.path / "audit"
    content = json.loads((folder / "audit.json").read_text())
    assert [row["attack"] for row in content["membership"]] == ["loss"]
    assert [row["way"] for row in content["inversion"]] == ["blind", "as trained"]
    page = (folder / "audit.html").read_text()
    for words in (
        "whether its models reveal which rows they were trained on, and",
        "whether the images can be reconstructed from a client's upload",
        "data:image/png;base64,",
    ):
        assert words in page
    # a second audit overwrites the first
    assert main(["audit", str(result.path), *flags]) == 0


def test_audit_flags_raise_one_line(
    run: hetero_fl.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inversion = "inversion does not apply: local: 'site_1' uploads no model parameters"
    for place, flags, message in (
        (run.path, ["--clients", "siet_1"], "no model of 'siet_1'; did you mean 'site_1'?"),
        (run.path, ["--shadows", "3"], "--shadows: must be an even number >= 4, or 0"),
        (run.path, ["--attack", "members"], "unknown attack 'members'; did you mean 'membership'?"),
        (run.path, ["--attack", "inversion", "--clients", "site_1"], inversion),
        (tmp_path / "none", [], "none: folder not found; expected a run directory"),
    ):
        assert main(["audit", str(place), *flags]) == 2
        line = capsys.readouterr().err
        assert message in line
        assert line.count("\n") == 1


def test_inversion_without_parameters_is_noted(run: hetero_fl.Run, tmp_path: Path) -> None:
    found = audit(run, clients=["site_1"], shadows=0, out=tmp_path)
    assert found["inversion"] == []
    assert found["notes"] == [
        "local: 'site_1' uploads no model parameters, so there is no gradient to invert"
    ]


def test_audit_refuses_changed_data(run: hetero_fl.Run, tmp_path: Path) -> None:
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("train_limit: 330", "train_limit: 300"))
    try:
        with pytest.raises(UserError, match="data differs from the data that this run was trained"):
            audit(run, attack="membership", shadows=0, out=tmp_path)
    finally:
        (run.path / "config.yaml").write_text(text)
