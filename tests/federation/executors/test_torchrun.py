"""Runs launched by torchrun: rank 0 coordinates, and all ranks end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hetero_fl.experiment import run
from hetero_fl.experiment.configuration import load_config
from tests.support.federations import MIXED, config
from tests.support.models import DRIFTING
from tests.support.workers import (
    PATIENCE,
    ROOT,
    environment,
    eventually,
    models,
    running_processes,
    start_session,
)

TRAIN = str(ROOT / "scripts" / "train.py")


def source(**changes: Any) -> dict[str, Any]:
    runtime = {"threads": 1, "executor": "torchrun"}
    return config(
        "hybrid",
        MIXED,
        clients=4,
        rounds=3,
        clients__per_round=3,
        runtime=runtime,
        algorithm__heads="keep",
        **changes,
    )


def launch(
    folder: Path, *arguments: str, ranks: int = 3, options: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Start torchrun with the command in that folder."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        *options,
        *arguments,
    ]
    return start_session(command, folder, environment(), stdout=subprocess.PIPE)


def rank_processes(out: Path) -> list[int]:
    """Return the process ids of a launched run by rank, found by torchrun's variables."""
    found = {
        int(variables[b"RANK"]): number
        for number, command, variables in running_processes()
        if b"TORCHELASTIC_RUN_ID" in variables and os.fsencode(out) in command
    }
    return [found[rank] for rank in sorted(found)]


def all_ended(out: Path) -> bool:
    return eventually(lambda: not rank_processes(out), 0.1)


def test_two_ranks_match_a_serial_run(tmp_path: Path) -> None:
    configuration = {**source(), "rounds": 2}
    configuration["clients"]["groups"][0]["model"] = [*MIXED, DRIFTING]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(configuration))
    out = tmp_path / "out"
    command = [TRAIN, "--config", "c.yaml", "--out", str(out), "--allow-code"]

    process = launch(tmp_path, *command, ranks=2)
    _, output = process.communicate(timeout=PATIENCE)

    assert process.returncode == 0, output
    configuration["runtime"]["executor"] = "serial"
    run(load_config(configuration, allow_code=True), out=tmp_path / "serial")
    assert models(out) == models(tmp_path / "serial")


@pytest.mark.slow
def test_killed_rank_is_restarted_with_same_results(tmp_path: Path) -> None:
    """Kill a rank in the middle of a task: torchrun restarts the job, which resumes."""
    sign, run_config = tmp_path / "sign", source()
    run_config["algorithm"] |= {
        "name": "python:tests.support.failing_methods:WaitsOnce",
        "sign": str(sign),
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(run_config))
    out = tmp_path / "out"
    process = launch(
        tmp_path,
        TRAIN,
        "--config",
        "c.yaml",
        "--resume",
        "--out",
        str(out),
        "--allow-code",
        options=("--max-restarts", "1"),
    )
    assert eventually(lambda: sign.exists() or process.poll() is not None) and sign.exists(), (
        process.communicate()
    )
    assert (out / "metrics.jsonl").exists() and int(sign.read_text()) in rank_processes(out)[1:]
    os.kill(int(sign.read_text()), signal.SIGKILL)
    printed, output = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and printed == f"{out}\n", output
    assert "resumed after round" in output and all_ended(out)
    run_config["runtime"]["executor"] = "serial"
    run(run_config, out=tmp_path / "serial")
    assert models(out) == models(tmp_path / "serial")


@pytest.mark.slow
def test_ctrl_c_stops_all_ranks_after_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**source(), "rounds": 100_000}))
    out = tmp_path / "out"
    process = launch(tmp_path, TRAIN, "--config", "c.yaml", "--out", str(out), ranks=2)
    assert eventually(lambda: (out / "metrics.jsonl").exists() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    _, output = process.communicate(timeout=PATIENCE)
    assert all_ended(out) and list((out / "checkpoint").glob("*.ckpt"))
    assert output.count("interrupted; to resume: torchrun --nproc-per-node 2 ") == 1


@pytest.mark.slow
def test_configuration_error_is_printed_once_by_rank_zero(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(source()))
    process = launch(
        tmp_path, "-m", "hetero_fl.cli", "train", "--config", "c.yaml", "runtime.executor=serial"
    )
    _, output = process.communicate(timeout=PATIENCE)
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: runtime.executor: must be torchrun, because torchrun started 3 processes, "
        "got 'serial'"
    ]
    assert (
        process.returncode != 0 and "exitcode  : 2 " in output and not (tmp_path / "runs").exists()
    )
