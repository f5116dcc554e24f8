"""SIGKILL at random and at chosen moments: a resumed run ends with bit-identical models."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.experiment import run
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.processes import worker_context
from tests.support import asynchronous_runs, server_crash
from tests.support.federations import MIXED, TOP, config

# At random moments in both modes, and at the points of `server_crash`.
KILLS = 6
CONTEXT = worker_context()


def source(**changes: Any) -> dict[str, Any]:
    return config(
        "hybrid",
        MIXED,
        clients=4,
        rounds=4,
        clients__per_round=3,
        server={"model": "mlp"},
        # Clients with private state.
        algorithm__heads="keep",
        devices={"speed": {"median": 1e6, "sigma": 0.9}, "up": 1e5},
        faults={"lost": 0.1, "corrupted": 0.1, "twice": 0.1},
        cohort={"sampling": "oort", "deadline": 60, "too_few": "repeat"},
        # And residuals of compression.
        channel=TOP,
        **changes,
    )


def at_any_time() -> dict[str, Any]:
    """Return an asynchronous configuration with the same clients and all kinds of faults."""
    run_config = source()
    run_config["runtime"] |= {"mode": "async", "buffer": 2}
    return {
        **run_config,
        "devices": asynchronous_runs.SLOW,
        "faults": asynchronous_runs.FAULTS,
        "cohort": {},
    }


MODES = {"sync": source, "async": at_any_time}


def resume_run(out: str, mode: str) -> None:
    run(MODES[mode](), out=out, resume=True)


def wait_at(point: str, out: str, mode: str) -> None:
    """Return a configuration that waits at this point for the kill."""
    server_crash.wait_at(point, Path(f"{out}.waits"))
    resume_run(out, mode)


def spawn(out: Path, mode: str, at: str | None = None) -> Any:
    target, given = (
        (resume_run, (str(out), mode)) if at is None else (wait_at, (at, str(out), mode))
    )
    process = CONTEXT.Process(target=target, args=given)
    process.start()
    return process


def models(out: Path) -> dict[str, bytes]:
    files = sorted((out / "models").rglob("*.safetensors"))
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def figures(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_killed_run_resumes_with_same_results(mode: str, tmp_path: Path) -> None:
    # The server process imports the package once, before the timing.
    spawn(tmp_path / "warm", mode).join()
    started = time.monotonic()
    plain = spawn(tmp_path / "plain", mode)
    plain.join()
    took = time.monotonic() - started
    assert plain.exitcode == 0
    expected, records = models(tmp_path / "plain"), figures(tmp_path / "plain")
    last = [name for name in expected if "best_" not in name]
    assert len(last) == 5 and len(records) == 4
    lines = (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()
    course = sum(sum(json.loads(line)["seconds"].values()) for line in lines)
    rng = random.Random(os.urandom(8))
    for i, at in enumerate([*(None for _ in range(KILLS)), *server_crash.POINTS]):
        out = tmp_path / f"killed{i}"
        process = spawn(out, mode, at)
        if at is not None:
            while not Path(f"{out}.waits").exists() and process.is_alive():
                time.sleep(0.002)
        elif i % 2:
            # At any moment, including imports and plots, or only during rounds.
            time.sleep(rng.uniform(0.02, 0.97) * took)
        else:
            while not (out / "metrics.jsonl").exists() and process.is_alive():
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.9) * course)
        process.kill()
        process.join()
        ended = process.exitcode != -signal.SIGKILL or (out / "summary.json").exists()
        # During rounds, however fast they are.
        assert at is None or not ended, at
        again = spawn(out, mode)
        again.join()
        assert again.exitcode == 0
        assert models(out) == expected and figures(out) == records, f"kill {i}"
        assert not list(out.glob(".*.tmp"))


def killed_before_its_report(out: str) -> None:
    server_crash.kill_before_report()
    run(source(output__report=True), out=out)


@pytest.mark.slow
def test_resume_after_kill_writes_missing_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = CONTEXT.Process(target=killed_before_its_report, args=(str(out),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (out / "summary.json").exists() and not (out / "report.html").exists()
    expected = models(out)
    run(source(output__report=True), out=out, resume=True)
    assert (out / "report.html").exists() and models(out) == expected


def test_resume_with_other_device_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "devices.csv"
    file.write_text("speed\n1e6\n")
    run_config = config(
        "fedavg",
        "mlp",
        rounds=2,
        devices={"file": str(file)},
    )
    run(run_config, out=tmp_path / "a")
    (tmp_path / "a" / "summary.json").unlink()
    file.write_text("speed\n2e6\n")
    with pytest.raises(UserError, match=r"^devices\.file: .*devices\.csv differs from the file"):
        run(run_config, out=tmp_path / "a", resume=True)
    file.write_text("speed\n1000000\n")
    run(run_config, out=tmp_path / "a", resume=True)
