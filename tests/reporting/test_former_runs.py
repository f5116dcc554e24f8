"""Run directories of version 0.2, whose files have other keys, are read as the current ones.

`former_comparison.zip` contains a comparison with one run, written by version 0.2.0.
"""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import ZipFile

import pytest

import hetero_fl
from tests.support.run_directories import report_page


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    with ZipFile(Path(__file__).with_name("former_comparison.zip")) as archive:
        archive.extractall(tmp_path)
    return tmp_path


@pytest.fixture
def former(comparison: Path) -> hetero_fl.Run:
    return hetero_fl.Run.load(comparison / "runs" / "fedavg-seed0")


def test_keys_of_former_records_are_renamed(former: hetero_fl.Run) -> None:
    record = {"round": 1, "unread": {"unread": "lost"}, "anew": ["anew"]}  # style: ok (former name)
    (former.path / "metrics.jsonl").write_text(json.dumps(record) + "\n")

    (found,) = former.metrics

    # Ids of clients are kept.
    renamed = {"absent": {"unread": "lost"}, "reset": ["anew"]}  # style: ok (ids of clients)
    assert found == {"round": 1, **renamed}


def test_former_runs_are_read_and_reported(former: hetero_fl.Run) -> None:
    malicious = [record["attacks"]["malicious"] for record in former.metrics]

    page = report_page(former.path)

    assert malicious == [["site_2"], ["site_2"]]
    assert former.summary["attacks"] == {"name": "backdoor", "malicious": ["site_2"], "success": 0}
    assert "1 client sent malicious uploads (backdoor): site_2" in page


def test_former_comparisons_are_read(comparison: Path, former: hetero_fl.Run) -> None:
    found = hetero_fl.Comparison(comparison)

    assert [run.summary for run in found.runs] == [former.summary]
    assert list(found.frame["algorithm"]) == ["fedavg"]
    assert "accuracy" in found.to_markdown()


def test_former_runs_are_exported(former: hetero_fl.Run, tmp_path: Path) -> None:
    exported = hetero_fl.export(former, "site_1", "safetensors", tmp_path / "exported")

    card = exported["site_1"].card.read_text()
    assert "1 client sent malicious uploads (backdoor): site_2" in card
    assert "After round 2; evaluated after aggregation" in card
