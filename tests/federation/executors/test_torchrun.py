"""Runs launched by torchrun: rank 0 is the run, the others its workers; however it ends, all of them end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from hetero_fl.experiment import run
from hetero_fl.federation.executors import torchrun
from hetero_fl.federation.executors.workers import JobResult
from tests.helpers.small_federations import MIXED, config
from tests.helpers.workers import (
    PATIENCE,
    ROOT,
    comes,
    environment,
    first_job,
    left_sealed,
    setup_of,
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
    """torchrun with the command in that folder."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        *options,
        *arguments,
    ]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


class Sent(Exception):
    """In place of the next job."""


def test_what_a_rank_sends_carries_its_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a job may be on several machines."""
    setup, sent = setup_of("fedavg"), list[JobResult]()

    def send(done: list[JobResult], dst: int) -> None:
        sent.extend(done)
        raise Sent

    messages = iter([setup, first_job(setup)])

    def receive(source: int) -> Any:
        message = next(messages, None)
        return message or threading.Event().wait()  # there is no other one

    monkeypatch.setattr(torchrun, "_receive_object", receive)
    monkeypatch.setattr("torch.distributed.send_object_list", send)
    with pytest.raises(Sent):
        torchrun._serve_rank_zero()
    assert left_sealed(sent[0])


def at_work(out: Path) -> list[int]:
    """The processes of a launched run by rank, found by what torchrun has set for them."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line, variables = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        known = dict(pair.split(b"=", 1) for pair in variables.split(b"\0") if b"=" in pair)
        if str(out).encode() in line and b"TORCHELASTIC_RUN_ID" in known:
            found[int(known[b"RANK"])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def nobody(out: Path) -> bool:
    return comes(lambda: not at_work(out), 0.1)


def models(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (out / "models").iterdir()}


def test_two_ranks_leave_the_models_of_a_serial_run(tmp_path: Path) -> None:
    configuration = {**source(), "rounds": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(configuration))
    out = tmp_path / "out"

    process = launch(tmp_path, TRAIN, "--config", "c.yaml", "--out", str(out), ranks=2)
    _, said = process.communicate(timeout=PATIENCE)

    assert process.returncode == 0, said
    configuration["runtime"]["executor"] = "serial"
    run(configuration, out=tmp_path / "serial")
    assert models(out) == models(tmp_path / "serial")


@pytest.mark.slow
def test_same_bits_and_a_rank_that_dies_is_started_again(tmp_path: Path) -> None:
    """torchrun ends a job of which a rank died; with restarts, --resume goes on by itself. It dies in the middle of a task."""
    sign, held = tmp_path / "sign", source()
    held["algorithm"] |= {"name": "python:tests.helpers.failing_methods:Held", "sign": str(sign)}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(held))
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
    assert comes(lambda: sign.exists() or process.poll() is not None) and sign.exists(), (
        process.communicate()
    )
    assert (out / "metrics.jsonl").exists() and int(sign.read_text()) in at_work(out)[1:]
    os.kill(int(sign.read_text()), signal.SIGKILL)
    printed, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and printed == f"{out}\n", said
    assert "resumed after round" in said and nobody(out)
    held["runtime"]["executor"] = "serial"
    run(held, out=tmp_path / "serial")
    assert models(out) == models(tmp_path / "serial")


@pytest.mark.slow
def test_ctrl_c_ends_all_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**source(), "rounds": 100_000}))
    out = tmp_path / "out"
    process = launch(tmp_path, TRAIN, "--config", "c.yaml", "--out", str(out), ranks=2)
    assert comes(lambda: (out / "metrics.jsonl").exists() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert nobody(out) and list((out / "checkpoint").glob("*.ckpt"))
    assert said.count("interrupted; to resume: torchrun --nproc-per-node 2 ") == 1


@pytest.mark.slow
def test_a_users_mistake_is_one_line_by_rank_0(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(source()))
    process = launch(
        tmp_path, "-m", "hetero_fl.cli", "train", "--config", "c.yaml", "runtime.executor=serial"
    )
    _, said = process.communicate(timeout=PATIENCE)
    told = [line for line in said.splitlines() if line.startswith("error:")]
    assert told == [
        "error: runtime.executor: must be torchrun, because torchrun started 3 processes, "
        "got 'serial'"
    ]
    assert process.returncode != 0 and "exitcode  : 2 " in said and not (tmp_path / "runs").exists()


def test_without_torchrun_one_line_says_how_to_launch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hetero_fl.cli import main

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(source()))
    arguments = ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")]
    assert main(arguments, command="train") == 2
    told = capsys.readouterr().err
    assert (
        told.count("\n") == 1
        and "torchrun --nproc-per-node 3" in told
        and not (tmp_path / "out").exists()
    )
    assert main([*arguments, "--check"], command="train") == 0  # which needs nobody
