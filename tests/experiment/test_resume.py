"""Resuming runs: by the printed command, after a full disk, with misspelled names."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from hetero_fl.cli import main
from hetero_fl.federation.store import Checkpoints
from hetero_fl.federation.trainer import FederatedTrainer
from tests.support.federations import config

WORK = (
    "experiment.auditing.audit.attack_membership",
    "experiment.evaluation.score",
    "experiment.exporting.export._export_model",
    "experiment.joining.join.JoiningClients.run_transfer",
    "federation.store.Checkpoints.save",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with a configuration file."""
    monkeypatch.chdir(tmp_path)
    small = config("local", "linear", 2, rounds=3)
    Path("c.yaml").write_text(yaml.safe_dump(small))
    return tmp_path


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, int]]:
    """Return a dictionary that maps a number of rounds to a signal sent after it, once."""
    signals: dict[int, int] = {}
    run_round = FederatedTrainer.run_round

    def round_then_stop(self: FederatedTrainer) -> Any:
        if (signal_number := signals.pop(self.completed, None)) is not None:
            os.kill(os.getpid(), signal_number)
        return run_round(self)

    monkeypatch.setattr(FederatedTrainer, "run_round", round_then_stop)
    old_handlers = {
        signal_number: signal.getsignal(signal_number)
        for signal_number in (signal.SIGINT, signal.SIGTERM)
    }
    # in the background, SIGINT may be ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signals
    for signal_number, handler in old_handlers.items():
        signal.signal(signal_number, handler)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_printed_command_resumes_an_interrupted_run(
    signal_number: int,
    folder: Path,
    stopped_after: dict[int, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped_after[1] = signal_number
    assert main(["train", "--config", "c.yaml", "seed=4"]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("interrupted; to resume: hetero-fl train --resume --out runs/small-")
    Path("c.yaml").unlink()
    assert main(shlex.split(line.partition(": ")[2])[1:]) == 0
    (run_path,) = Path("runs").iterdir()
    assert len((run_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_full_disk_prints_one_line_and_run_resumes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Checkpoints.save

    def save_until_full(self: Checkpoints, round_idx: int, *arguments: Any) -> Path:
        if round_idx:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, round_idx, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_until_full)
        assert main(["train", "--config", "c.yaml", "--out", "run"]) == 1
        line = capsys.readouterr().err.strip()
        assert line.splitlines()[-1].startswith("failed: no space left") and "Traceback" not in line
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) < 3
    assert main(["train", "--resume", "--out", "run"]) == 0
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3


def start(preparation: str, *arguments: str) -> subprocess.Popen[str]:
    """Train in another process, which first runs some code."""
    code = f"{preparation}\nfrom hetero_fl.cli import main; raise SystemExit(main())"
    options = ["train", "-c", "c.yaml", "--out", "run", "--quiet", *arguments]
    return subprocess.Popen([sys.executable, "-c", code, *options], stderr=PIPE, text=True)


def test_file_above_the_size_limit_prints_one_line(folder: Path) -> None:
    limit = "from resource import *; setrlimit(RLIMIT_FSIZE, (80_000, 80_000))"

    process = start(limit, "clients.groups.0.model={name: mlp, hidden: [512]}")

    line = "failed: a file would exceed the limit of file sizes; raise it (ulimit -f)"
    assert process.communicate()[1].startswith(line) and process.returncode == 1


# A process in the background may ignore the signal, and the run takes a while to end.
SLOW_END = """
from signal import *; signal(SIGINT, default_int_handler)
from time import sleep; from hetero_fl.experiment.session import RunSession
close = RunSession.close
RunSession.close = lambda self: (sleep(0.5), close(self), open('closed', 'w'))
"""


def test_second_ctrl_c_does_not_disturb_the_first(folder: Path) -> None:
    process = start(SLOW_END, "rounds=5000", "evaluation.every=5000")
    while process.poll() is None and not Path("run/checkpoint/round-000001.ckpt").exists():
        time.sleep(0.02)

    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)

    line = "interrupted; to resume: hetero-fl train --resume --out run\n"
    assert process.communicate()[1] == line and process.returncode == 130
    assert Path("closed").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["train", "-c", "c.yaml", "--out", "full"],
        ["evaluate", "run", "--data", "digits", "--json", "full/scores.json"],
        ["export", "run", "--format", "safetensors", "--out", "full"],
        ["join", "run", "--data", "digits", "--patients", "10", "--out", "full"],
        ["audit", "run", "--attack", "membership", "--shadows", "0", "--out", "full"],
    ],
    ids=lambda command: command[0],
)
def test_full_disk_is_noticed_before_the_work(
    command: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["train", "-c", "c.yaml", "--out", "run", "--quiet", "rounds=1"])
    Path("full").mkdir()
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("hetero_fl.utils.serialization.TemporaryFile", Mock(side_effect=error))
    for work in WORK:
        monkeypatch.setattr(f"hetero_fl.{work}", Mock(side_effect=AssertionError))
    capsys.readouterr()

    assert main([*command, "--quiet"]) == 2
    line = "error: full: not writable (No space left on device); choose another folder\n"
    assert capsys.readouterr().err == line


def test_signal_handlers_are_restored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def handler(_signal_number: int, _frame: object) -> None:
        pass

    old_handler = signal.signal(signal.SIGTERM, handler)
    try:
        for arguments, status in (
            (["--config", "c.yaml", "--out", "a"], 0),
            (["--config", "none.yaml"], 2),
        ):
            assert main(["train", *arguments]) == status
            assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, old_handler)


def test_resume_command_names_the_script_as_started(
    folder: Path,
    stopped_after: dict[int, int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped_after[0] = signal.SIGINT
    given = ["--config", "c.yaml", "--out", "a run"]
    monkeypatch.setattr("sys.argv", ["scripts/train.py", *given])
    monkeypatch.setattr("sys.orig_argv", ["python3", "scripts/train.py", *given])
    assert main(command="train") == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "interrupted; to resume: python3 scripts/train.py --resume --out 'a run'"


@pytest.mark.parametrize(
    ("work", "arguments", "message"),
    [
        (
            "experiment.runner.prepare",
            ["train", "--config", "c.yaml", "--out", "a"],
            "interrupted before the first checkpoint; there is no run to resume\n",
        ),
        ("reporting.run.Run", ["join", "a run", "--data", "digits"], "interrupted\n"),
        (
            "experiment.comparison.compare.plan_comparison",
            ["compare", "--config", "c.yaml", "--algorithms", "local", "--out", "a b"],
            "interrupted; to resume: hetero-fl compare --config c.yaml --algorithms local "
            "--out 'a b'\n",
        ),
    ],
    ids=["train", "join", "compare"],
)
def test_interrupt_before_the_first_checkpoint_says_how_to_resume(
    work: str,
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"hetero_fl.{work}", Mock(side_effect=KeyboardInterrupt))

    assert main(arguments) == 130

    assert capsys.readouterr().err == message


def test_resume_suggests_the_nearest_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "c.yaml", "--out", "runs/first", "rounds=1"]) == 0
    assert "no run to resume" not in capsys.readouterr().err
    assert main(["train", "--resume", "--out", "runs/frist"]) == 2
    message = (
        "error: --out: runs/frist is not a run directory; did you mean runs/first? "
        "(a new run requires --config)\n"
    )
    assert capsys.readouterr().err == message and not Path("runs/frist").exists()
    assert main(["train", "--config", "c.yaml", "--resume", "--out", "runs/frist", "rounds=1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "runs/frist: no run to resume; starting a new one" in lines
    assert main(["train"]) == 2
    assert "--config: missing" in capsys.readouterr().err


def write_table(num_rows: int) -> None:
    lines = [f"{i % 7},{i % 5},{i % 2}" for i in range(num_rows)]
    Path("rows.csv").write_text("\n".join(["a,b,label", *lines]), encoding="utf-8")


@pytest.mark.parametrize("state", ["finished", "interrupted", "extended"])
def test_run_on_changed_data_is_refused(
    state: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(200)
    small = config("local", {"name": "mlp", "hidden": [4]}, 2, rounds=1)
    small["data"] = {"name": "table", "path": "rows.csv", "label": "label"}
    Path("table.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    train = ["train", "--config", "table.yaml", "--out", "a", "--resume"]
    assert main(train) == 0
    assert main(train) == 0
    assert "this run has finished" in capsys.readouterr().err
    if state == "interrupted":
        Path("a/summary.json").unlink()
    write_table(150)
    assert main([*train, *(["rounds=2"] if state == "extended" else [])]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: a: the data has changed since this run; restore it, delete the folder, or choose "
        "another one"
    )


@pytest.mark.parametrize("state", ["finished", "interrupted", "extended"])
def test_run_with_changed_code_is_refused(
    state: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    code = "from hetero_fl.algorithms import FedAvg\n\n\nclass Mine(FedAvg):\n    title = 'Mine'\n"
    name = f"{state}_code"
    Path(f"{name}.py").write_text(code, encoding="utf-8")
    setting = f"algorithm.name=python:{name}:Mine"
    train = ["train", "--config", "c.yaml", "--out", "a", "--resume", "--allow-code", setting]
    assert main(train) == 0
    assert main(train) == 0
    if state == "interrupted":
        Path("a/summary.json").unlink()
    Path(f"{name}.py").write_text(code + "\n# changed\n", encoding="utf-8")
    capsys.readouterr()

    assert main([*train, *(["rounds=9"] if state == "extended" else [])]) == 2

    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: a: the code of {name} has changed since this run; restore it, delete the folder, "
        "or choose another one"
    )


@pytest.mark.parametrize("change", ["report=true", "plots=true", "loggers=[csv]"])
def test_output_may_change_on_resume(change: str, folder: Path) -> None:
    off = ["output.report=false", "output.plots=false"]
    train = ["train", "--config", "c.yaml", "--out", "a", "--resume"]
    assert main([*train, *off]) == 0
    Path("a/summary.json").unlink()

    assert main([*train, *off, f"output.{change}"]) == 0

    assert Path("a/report.html").exists() == (change == "report=true")
    key, _, value = change.partition("=")
    recorded = yaml.safe_load(Path("a/config.yaml").read_text())["output"][key]
    assert recorded == (True if value == "true" else [{"kind": "csv"}])
