"""Each site's log agrees with the server's byte counts, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.deployment.audit_log import traffic_totals, verify
from hetero_fl.reporting.run import Run
from tests.support.deployments import SITES, Federation, small, twice
from tests.support.federations import MIXED, TOP

SECURE = {"channel__secure_sum": {"threshold": 2}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid, compressed": ("hybrid", {"channel": TOP, "models": MIXED}),
    "a secure sum": ("hybrid", {**SECURE, "models": MIXED}),
    "a cohort of some": ("fedavg", {"clients__per_round": 2}),
    "seldom read": ("fedproto", {"evaluation__every": 2}),
}


def counted(run: Run, folder: Path, name: str = "") -> tuple[int, int]:
    """Return the bytes sent and received in a run, from the sites' logs."""
    known = json.loads((run.path / "federation.json").read_text())["run"]
    found = [traffic_totals(verify(folder / site / "audit.jsonl"), known) for site in SITES]
    return sum(f.up for f in found), sum(f.down for f in found)


def recorded_bytes(run: Run) -> tuple[int, int]:
    """Return the bytes sent and received in a run, from the server's summary."""
    communication = run.summary["communication"]
    return communication["up_bytes"], communication["down_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_byte_counts_of_logs_match_the_server(case: str, tmp_path: Path) -> None:
    method, changes = CASES[case]
    federation = Federation(tmp_path)
    # whatever comes twice is counted once
    run_config = small(method, **changes, output__best_models=False)
    run = federation.serve(run_config, {"site_2": twice})
    assert counted(run, tmp_path) == recorded_bytes(run) and min(recorded_bytes(run)) > 0
    lines = verify(tmp_path / "site_2" / "audit.jsonl")
    again = [line for line in lines if line["outcome"] == "again"]
    assert len(again) == len([line for line in lines if line["ask"] == "do"]) / 2


@pytest.mark.slow
def test_log_names_the_kinds_of_sent_data(tmp_path: Path) -> None:
    run = Federation(tmp_path).serve(small("hybrid", MIXED))
    lines = [line for line in verify(tmp_path / "site_1" / "audit.jsonl") if line["ask"] == "do"]
    sent = {line["what"]: line["kinds"] for line in lines}
    trained = {"model: params", "logits: rows", "counts: counts", "training loss"}
    assert set(sent["train"]) == trained and sent["read"] == ["scores"]
    assert [line["round"] for line in lines if line["what"] == "train"] == [0, 1]
    assert run.summary["rounds_completed"] == 2


def test_log_marks_masked_uploads(tmp_path: Path) -> None:
    Federation(tmp_path).serve(small("fedavg", **SECURE))
    lines = [line for line in verify(tmp_path / "site_1" / "audit.jsonl") if line["ask"] == "do"]
    sent = [(line["what"], line["kinds"]) for line in lines if line["round"] == 0]
    assert sent == [
        ("keys", ["keys"]),
        ("shares", ["shares"]),
        ("train", ["masked sum of model: params, training loss"]),
        ("consistency", ["consistency"]),
        ("unmask", ["unmask"]),
    ]


def test_refused_upload_counts_no_bytes(tmp_path: Path) -> None:
    federation = Federation(tmp_path, {"site_3": {"allows": {"upload_bytes": 100}}})
    run = federation.serve(small(evaluation__every=2))
    assert counted(run, tmp_path) == recorded_bytes(run)
    log = traffic_totals(verify(tmp_path / "site_3" / "audit.jsonl"))
    assert log.up == 0 and log.down > 0
