"""The initial phase of FedMD and KT-pFL: once per client, in any kind of run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.requirements import describe_needs, format_needs
from hetero_fl.experiment import prepare, run
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.report import report_facts
from hetero_fl.reporting.run_directory import RunDirectory
from tests.engine.test_vectorized_runs import agree
from tests.support import asynchronous_runs
from tests.support.federations import MIXED, config, poison_upload, rounds_of

ON = {"initial_phase": True, "initial_private_epochs": 2}


def federation(
    method: str = "fedmd", clients: int = 4, per_round: int = 2, **changes: Any
) -> dict[str, Any]:
    """Return a run that samples clients, so that they first participate in different rounds."""
    settings = {"name": method, **ON, **({"initial_public_epochs": 3} if method == "fedmd" else {})}
    labels = method == "fedmd"
    source = config(
        method, MIXED, clients, rounds=4, clients__per_round=per_round, data__proxy__labels=labels
    )
    return {**source, "algorithm": {**settings, **changes}}


def watched(rounds: FederatedTrainer) -> Counter[str]:
    """Count how often each client starts a fit of each label, as in `site_1: initial private`."""
    seen: Counter[str] = Counter()
    rounds.executor.set_listener(lambda line: seen.update([line]))
    return seen


def test_refused_first_upload_repeats_it() -> None:
    rounds = rounds_of(federation(per_round=4), num_rounds=0)
    seen = watched(rounds)
    poison_upload(rounds, "site_1", 0, "logits")

    assert list(rounds.run_round()["failed"]) == ["site_1"]
    rounds.run_round()
    rounds.run_round()

    counts = [seen[f"{name}: initial private"] for name in rounds.federation.client_infos]
    assert counts == [2, 1, 1, 1]


def test_proxy_labels_are_not_needed_without_public_epochs() -> None:
    source = federation(initial_public_epochs=0)
    source["data"]["proxy"]["labels"] = False
    rounds = rounds_of(source, num_rounds=0)
    seen = watched(rounds)

    (first, *_) = rounds.run_round()["cohort"]

    assert seen[f"{first}: initial private"] == 1 and seen[f"{first}: initial public"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["fedmd", "kt_pfl"])
def test_batched_run_matches_serial_run(method: str) -> None:
    agree({**federation(method, clients=6, per_round=6), "rounds": 3})


def test_asynchronous_run_has_it_once_per_client() -> None:
    source = asynchronous_runs.source(
        "fedmd", algorithm=federation()["algorithm"], data__proxy__labels=True, faults={}
    )
    session = asynchronous_runs.session(source)
    seen = watched(session)

    for _ in range(3):
        session.run_round()

    started = {line.partition(":")[0] for line in seen}
    assert len(started) > 2 and sum(seen.values()) > 3 * len(started)
    assert all(seen[f"{client_id}: initial private"] == 1 for client_id in started)


def test_requirements_are_declared() -> None:
    fedmd, kt_pfl = register_algorithm["fedmd"], register_algorithm["kt_pfl"]

    assert format_needs(describe_needs(fedmd())) == "proxy set"
    assert format_needs(describe_needs(fedmd(initial_phase=True))) == "labeled proxy set"
    assert (
        format_needs(describe_needs(fedmd(initial_phase=True, initial_public_epochs=0)))
        == "proxy set"
    )
    assert format_needs(describe_needs(kt_pfl(initial_phase=True))) == "proxy set, single uploads"
    assert any(
        "trains on the labels of the proxy set" in note for note in prepare(federation()).notes
    )


def test_report_names_use_of_proxy_labels(tmp_path: Path) -> None:
    off = {"name": "fedmd"}
    for settings, words in (
        (federation()["algorithm"], "clients train on once"),
        (off, "are never used"),
    ):
        source = {
            **federation(),
            "rounds": 1,
            "algorithm": settings,
            "output": {"plots": False, "report": False},
        }
        run(source, out=tmp_path / words.split()[0])
        written = RunDirectory(tmp_path / words.split()[0])
        facts = report_facts(written.summary(), written.details())
        assert f"60 rows, whose labels {words}" in render("report_story.html", **facts)
