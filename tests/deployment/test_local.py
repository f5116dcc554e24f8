"""`federate`: processes on this machine that are killed, or that end with an error."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hetero_fl
from tests.support.deployments import (
    Envelope,
    PipeTransport,
    run_local_federation,
    signed_entries,
)
from tests.support.federations import config

SOURCE = config("fedper", rounds=3, clients=2, runtime__executor="serial")


@pytest.mark.slow
def test_run_with_a_killed_process_equals_simulation(tmp_path: Path) -> None:
    killed: list[int | None] = []

    def kill_a_site(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            (site,) = [p for p in multiprocessing.active_children() if "Process" in p.name][:1]
            killed.append(site.pid)
            site.kill()

    federated = run_local_federation(SOURCE, out=tmp_path / "sites", callbacks=[kill_a_site])

    assert killed
    simulated = hetero_fl.run(SOURCE, out=tmp_path / "simulation")
    for key in ("personal", "global", "clients", "communication"):
        assert federated.summary[key] == simulated.summary[key]
    for name in simulated.models:
        path = Path("models") / f"{name}.safetensors"
        assert (federated.path / path).read_bytes() == (simulated.path / path).read_bytes()


@pytest.mark.slow
def test_rows_are_read_once_and_not_for_each_message(tmp_path: Path) -> None:
    file = tmp_path / "rows.npz"
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    np.savez(file, train_images=images, train_labels=np.arange(300) % 10)
    source = config("fedper", rounds=3, clients=2, data__name="npz", data__path=str(file))

    run = run_local_federation(
        source, out=tmp_path / "run", callbacks=[lambda record: file.unlink(missing_ok=True)]
    )

    assert not file.exists() and len(run.metrics) == 3
    assert signed_entries(tmp_path / "run" / "sites" / "site_1")


def test_answer_that_expired_during_another_call_never_arrives() -> None:
    transport = PipeTransport([])
    number = transport.push(1, Envelope(), within=-1.0)
    transport.pull([], wait=0.0)

    assert transport.pull([number], wait=60.0) == {number: None}


@pytest.mark.slow
def test_error_of_a_process_ends_the_run_with_its_last_line(tmp_path: Path) -> None:
    sites = tmp_path / "run" / "sites" / "site_1"
    sites.mkdir(parents=True)
    (sites / "audit.jsonl").write_text("not an entry\n")

    with pytest.raises(Exception, match=r"^site_1: its process ended: .*audit\.jsonl"):
        run_local_federation(SOURCE, out=tmp_path / "run")
