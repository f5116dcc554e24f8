"""Facts about a comparison: data, clients, rounds, arguments, settings and notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hetero_fl
from hetero_fl.algorithms import Algorithm, register_algorithm
from hetero_fl.core.task import Task
from hetero_fl.reporting.comparison.facts import read_record, write_record
from hetero_fl.reporting.comparison.report import comparison_row, write_comparison
from hetero_fl.reporting.methods import describe_methods
from hetero_fl.reporting.run_directory import RunDirectory
from tests.reporting.test_report import Page
from tests.support.federations import config
from tests.support.run_directories import Case, write_run


def make_rows(out: Path, clients: int = 6, **case: Any) -> list[dict[str, Any]]:
    """Write two finished runs, an unfinished one, and return the rows of the finished ones."""
    rows = []
    for name in ("local", "fedmd"):
        run = write_run(
            out / "runs" / f"{name}-seed0", Case(algorithm=name, clients=clients, rounds=3, **case)
        )
        rows.append(comparison_row(run.summary()) | {"run": f"{name}-seed0"})
    (out / "runs" / "hybrid-seed0").mkdir()
    return rows


def details_of(out: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Write a comparison and return the facts of `comparison.md`."""
    write_comparison(out, rows, title="t", note="", task=Task("multiclass", 2))
    lines = (out / "comparison.md").read_text().partition("## Details")[2].splitlines()
    pairs = (line.removeprefix("- **").partition(":** ") for line in lines if line)
    return {name: text for name, _, text in pairs}


def test_facts_match_the_runs(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)

    facts = details_of(tmp_path, rows)

    assert facts["Data"].startswith("chest_xray: PneumoniaMNIST, CC BY 4.0. ")
    assert facts["Data"].endswith(
        " training rows, 624 in the global test set, 500 in the public proxy set."
    )
    assert facts["Clients"].startswith("6 clients: ") and " × " in facts["Clients"]
    assert (facts["Rounds"], facts["Seeds"]) == ("3", "0")
    details = RunDirectory.open(tmp_path / "runs" / "local-seed0").details()
    tested = {client: rows["test"] for client, rows in details["rows"].items()}
    smallest = min(tested, key=lambda client: tested[client])
    note = f"n = {min(tested.values())} to {max(tested.values())} rows per client."
    assert facts["Local test rows"].startswith(note)
    assert smallest in facts["Local test rows"]
    text = (tmp_path / "comparison.md").read_text()
    assert f"Local test: {note}" in text and "simulated" not in text
    assert "- **FedMD:** Distill the mean" in text


def test_many_models_are_not_listed(tmp_path: Path) -> None:
    facts = details_of(tmp_path, make_rows(tmp_path, clients=60))

    assert facts["Clients"].startswith("60 clients: ") and len(facts["Clients"]) < 300


def test_notes_name_the_methods_of_their_runs(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    details = tmp_path / "runs" / "fedmd-seed0" / "details.json"
    content = json.loads(details.read_text())
    details.write_text(json.dumps(content | {"notes": [*content["notes"], "only here"]}))

    details_of(tmp_path, rows)

    text = (tmp_path / "comparison.md").read_text()
    assert content["notes"]
    assert all(f"- **All methods:** {note}\n" in text for note in content["notes"])
    assert "- **FedMD:** only here\n" in text
    assert "<dt>FedMD</dt><dd>only here</dd>" in (tmp_path / "report.html").read_text()


def test_rows_without_runs_have_few_facts(tmp_path: Path) -> None:
    row = {"algorithm": "local", "seed": 3, "up_bytes": 0, "down_bytes": 0, "seconds_total": 1.0}

    assert details_of(tmp_path, [row]).keys() == {"Seeds", "## Methods", "Local"}


def test_record_keeps_the_largest_number_of_jobs(tmp_path: Path) -> None:
    write_record(tmp_path, {"seeds": [0]}, jobs=3)
    write_record(tmp_path, {"seeds": [0, 1]}, jobs=1)

    assert read_record(tmp_path) == {"seeds": [0, 1], "jobs": 3}


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


def test_reports_contain_the_facts(tmp_path: Path) -> None:
    write_record(tmp_path, {"config": str(tmp_path / "mine.yaml"), "overrides": ["a=1"]}, jobs=2)
    facts = details_of(tmp_path, make_rows(tmp_path, simulated=True))

    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    rows = {row[0].strip(): row for row in page.cells if row}
    assert rows["Rounds"][1].strip() == "3" and rows["Data"][1].startswith("chest_xray")
    assert rows["Method"][-1].strip() == "Time"
    assert "Seconds (2 runs at a time)" in page.text and "2 runs shared the machine" in page.text
    assert "upload logits, shape <code>[D, C]</code> for D proxy rows" in html
    assert "None" not in page.text and str(tmp_path) not in page.text
    assert facts["Configuration"] == "mine.yaml" and facts["Overrides"] == "a=1"
    text = (tmp_path / "comparison.md").read_text()
    assert all("The data is simulated, not real." in written for written in (html, text))


def settings_of(out: Path) -> list[str]:
    section = (out / "comparison.md").read_text().partition("## Settings")[2]
    section = section.partition("## Notes")[0].partition("## Methods")[0]
    return sorted(line for line in section.splitlines() if line)


def test_settings_that_differ_from_the_defaults_are_listed(tmp_path: Path) -> None:
    source = config(models="linear", clients=2, rounds=1)
    source["algorithm"] = {"name": "hybrid", "temperature": 2.0, "heads": "keep"}
    labels = ["local", "hybrid", "fedavg_ft", "fedprox:mu=0.5:clients.defaults.epochs=2"]

    comparison = hetero_fl.compare(source, labels, out=tmp_path, jobs=1, overrides=["rounds=2"])

    record = json.loads((tmp_path / "comparison.json").read_text())
    epochs = comparison.runs[0].directory.config()["clients"]["defaults"]["epochs"]
    assert settings_of(comparison.path) == [
        f"- **FedAvg-FT:** fine_tune_epochs = 5, clients.defaults.epochs = {epochs}",
        "- **FedProx (mu = 0.5, clients.defaults.epochs = 2):** mu = 0.5, "
        "clients.defaults.epochs = 2",
        "- **Hybrid:** heads = keep, logit_adjustment = true, "
        "recalibrate = [proxy_predictions, local_test], "
        f"clients.defaults.epochs = {epochs}",
        f"- **Local:** clients.defaults.epochs = {epochs}",
    ]
    assert (record["algorithms"], record["overrides"], record["jobs"]) == (labels, ["rounds=2"], 1)


def test_methods_without_settings_share_a_line(tmp_path: Path) -> None:
    source = config(models="linear", clients=2, rounds=1)
    source["algorithm"] = {"name": "hybrid", "heads": "keep"}

    hetero_fl.compare(source, "local,fedavg", out=tmp_path, jobs=1)

    assert settings_of(tmp_path) == ["- **Local, FedAvg:** defaults"]
