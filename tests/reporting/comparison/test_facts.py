"""Facts about a comparison: data, clients, rounds, command and methods."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import hetero_fl
from hetero_fl.algorithms import Algorithm, register_algorithm
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.facts import gather_facts
from hetero_fl.reporting.comparison.report import comparison_row, write_comparison
from hetero_fl.reporting.methods import describe_methods
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import PACKAGE
from tests.reporting.test_report import Page
from tests.support.cases import each_case
from tests.support.run_directories import Case, write_run

SCRIPT = str(Path(hetero_fl.__file__).parents[1] / "scripts" / "compare.py")


def make_rows(out: Path, clients: int = 6, **case: Any) -> list[dict[str, Any]]:
    """Return two finished runs, an unfinished one, and the rows of the finished ones."""
    rows = []
    for name in ("local", "fedmd"):
        run = write_run(
            out / "runs" / f"{name}-seed0", Case(algorithm=name, clients=clients, rounds=3, **case)
        )
        rows.append(comparison_row(run.summary()))
    (out / "runs" / "hybrid-seed0").mkdir()
    (out / "log.txt").write_text(
        "2026-01-01 10:00:00  2 runs, 8 at a time\n2026-01-01 10:00:09  1/2 local seed 0\n"
    )
    return rows


def test_facts_match_the_runs(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    found = gather_facts(tmp_path, rows)
    facts = dict(found.facts)
    assert facts["Data"].startswith("chest_xray: PneumoniaMNIST, CC BY 4.0. ")
    assert facts["Data"].endswith(
        " training rows, 624 in the global test set, 500 in the public proxy set."
    )
    assert facts["Clients"].startswith(
        "6 clients, 2 models: 4 × cnn_bn_small (hospital_1, hospital_2, "
    ) or facts["Clients"].startswith(
        "6 clients, 3 models: 2 × cnn_bn_small (hospital_1, hospital_2); 2 × resnet18 (hospital_3, "
    )
    assert (facts["Rounds"], facts["Seeds"]) == ("3", "0")
    assert found.jobs == 2, "no more than there are runs"
    tested = [
        r["test"]
        for r in RunDirectory.open(tmp_path / "runs" / "local-seed0").details()["rows"].values()
    ]
    assert found.local_test_note.startswith(
        f"Local test: n = {min(tested)} to {max(tested)} rows per client."
    )
    assert (
        f"hospital_{tested.index(min(tested)) + 1}" in facts["Local test rows"] and min(tested) < 20
    )
    assert not found.warning


def test_many_clients_are_not_listed(tmp_path: Path) -> None:
    facts = dict(gather_facts(tmp_path, make_rows(tmp_path, clients=60)).facts)
    assert (
        "20 × resnet18 (clinic_003, clinic_004 … clinic_058)" in facts["Clients"]
        and len(facts["Clients"]) < 300
    )


def test_notes_name_the_methods_of_their_runs(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    rows = [row | {"run": f"{row['algorithm']}-seed0"} for row in rows]
    details = tmp_path / "runs" / "fedmd-seed0" / "details.json"
    content = json.loads(details.read_text())
    common = tuple(("All methods", note) for note in content["notes"])
    details.write_text(json.dumps(content | {"notes": [*content["notes"], "only here"]}))

    write_comparison(tmp_path, rows, title="t", note="", task=Task("multiclass", 2))

    assert common
    assert gather_facts(tmp_path, rows).notes == (*common, ("FedMD", "only here"))
    assert "- **FedMD:** only here\n" in (tmp_path / "comparison.md").read_text()
    assert "<dt>FedMD</dt><dd>only here</dd>" in (tmp_path / "report.html").read_text()


def test_facts_without_runs_come_from_the_rows(tmp_path: Path) -> None:
    found = gather_facts(tmp_path, [{"algorithm": "local", "seed": 3}])
    assert found.facts == (("Seeds", "3"),) and found.jobs is None and found.local_test_note == ""


@each_case(
    ("line", "command"),
    [
        ([SCRIPT, "--seeds", "0,1", "rounds=3"], "python scripts/compare.py --seeds 0,1 rounds=3"),
        (["/usr/bin/hetero-fl", "compare", "--out", "runs/x"], "hetero-fl compare --out runs/x"),
        (
            [SCRIPT, "--out", "/far/away/x", "data.path=/far/y"],
            "python scripts/compare.py --out /far/away/x data.path=/far/y",
        ),
        ([SCRIPT, f"--out={os.getcwd()}/runs/x"], "python scripts/compare.py --out=runs/x"),
        (["/my/compare.py"], 'hetero_fl.compare(source, "local,fedmd", seeds=[0], out=…)'),
        (
            ["/usr/bin/hetero-fl", "train"],
            'hetero_fl.compare(source, "local,fedmd", seeds=[0], out=…)',
        ),
    ],
)
def test_command_is_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str], command: str
) -> None:
    monkeypatch.setattr(sys, "argv", line)
    rows = [{"algorithm": name, "seed": 0} for name in ("local", "fedmd")]
    assert gather_facts(tmp_path, rows).command == command


def test_methods_are_described_by_their_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Algorithm):
        """Half of the clients wait (Doe 2020).

        More of it.
        """

    class Silent(Algorithm):
        pass

    monkeypatch.setattr(
        register_algorithm, "_known", {**register_algorithm._known, "mine": Mine, "silent": Silent}
    )
    found = {
        name: text
        for name, *text in describe_methods(["fedmd", "fedmd:temperature=2", "mine:a=1", "silent"])
    }
    assert list(found) == ["FedMD", "mine", "silent"]
    assert found["mine"][:2] == ["Half of the clients wait (Doe 2020).", "More of it."]
    assert found["silent"][0] == "No docstring."
    assert found["FedMD"][0].startswith("Distill the mean of all clients' predictions")
    assert "Wang 2019" in found["FedMD"][1]
    assert found["FedMD"][2] == "Evaluated: after local training, as in the paper."


@each_case(
    ("program", "launcher", "before"),
    [
        ("/opt/venv/bin/hetero-fl", "hetero-fl", []),
        ("/opt/venv/bin/hetero-fl", "hetero-fl", ["--quiet"]),
        (str(PACKAGE / "__main__.py"), "python -m hetero_fl", ["--quiet"]),
        (str(PACKAGE / "cli" / "__main__.py"), "python -m hetero_fl", []),
    ],
)
def test_command_of_a_comparison_can_be_repeated(
    program: str, launcher: str, before: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = "compare --config '{config}' --out {out} --search optuna rounds=2 data.path={data}"
    outside = tmp_path.parent / "my data" / "c.yaml"
    given = line.format(config=outside, out=tmp_path / "out", data=tmp_path / "x.csv")
    monkeypatch.setattr("sys.argv", [program, *before, *shlex.split(given)])

    facts = gather_facts(tmp_path, [])

    relative = line.format(config=outside, out="out", data="x.csv")
    assert facts.command == " ".join([launcher, *before, relative])


def test_reports_contain_the_facts(tmp_path: Path) -> None:
    rows_of_runs = make_rows(tmp_path, simulated=True)
    write_comparison(tmp_path, rows_of_runs, title="t", note="", task=Task("multiclass", 2))
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    rows = {row[0].strip(): row for row in page.cells}
    assert rows["Rounds"][1].strip() == "3" and rows["Data"][1].startswith("chest_xray")
    assert "hetero_fl.compare(" in rows["Command"][1] and rows["Method"][-1].strip() == "Time"
    assert "Seconds (2 runs at a time)" in page.text and "2 runs shared the machine" in page.text
    assert "upload logits, shape <code>[D, C]</code> for D proxy rows" in html
    assert "None" not in page.text and str(tmp_path) not in page.text
    text = (tmp_path / "comparison.md").read_text()
    assert all("The data is simulated, not real." in written for written in (html, text))
    assert (
        "- **Clients:** 6 clients" in text
        and "- **FedMD:** Distill the mean" in text
        and "Command: `" in text
    )
