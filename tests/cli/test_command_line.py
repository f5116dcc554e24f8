"""The command line: misspelled commands and options, and what every command has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hetero_fl.cli import main
from hetero_fl.cli.commands import COMMANDS

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits_quickstart.yaml")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian", "-c", "x.yaml"], "error: unknown command 'trian'; did you mean 'train'? (see hetero-fl --help)"),
        (["run"], "error: unknown command 'run'; choose from audit, certificates, compare, evaluate,"),
        (["train", "--conifg", "x.yaml"], "unknown option --conifg; did you mean '--config'? (see hetero-fl train"),
        (["train", "--conifg=x.yaml"], "unknown option --conifg; did you mean '--config'?"),
        (["train", "--chekc", "-c", "x.yaml"], "unknown option --chekc; did you mean '--check'?"),
        (["evaluate", "runs/x", "--dta", "x.npz"], "unknown option --dta; did you mean '--data'?"),
        (["train", "--zzz", "-c", "x.yaml"], "error: unknown option --zzz (see hetero-fl train --help)"),
        (["compare", "--jobs", "two"], "error: argument --jobs: expected an integer, got 'two' (see"),
    ],
)
def test_parser_suggests_what_was_meant(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert line in told and told.count("\n") == 1


def test_parser_suggests_to_a_script_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--conifg", "x.yaml"], command="train") == 2
    assert "unknown option --conifg; did you mean '--config'? (see train.py --help)" in capsys.readouterr().err


def without_reader(*arguments: str, stream: str, unbuffered: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command that writes to a pipe whose other end has been closed; the other stream is captured."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    command = [sys.executable, "-m", "hetero_fl.cli", *arguments]
    try:
        return subprocess.run(command, text=True, timeout=300, env=environment, **streams)  # type: ignore[call-overload]
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([command, "--help"] for command in COMMANDS),
        ["methods"],  # printed by rich
        ["methods", "hybrid"],
        ["train", "--check", "--config", DIGITS],  # by print, then by rich
    ],
)
def test_command_ends_quietly_where_nobody_reads(arguments: list[str]) -> None:
    ended = without_reader(*arguments, stream="stdout")

    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_command_ends_quietly_where_nobody_reads_unbuffered() -> None:
    ended = without_reader("methods", stream="stdout", unbuffered=True)

    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_run_ends_quietly_where_nobody_reads_its_progress(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = without_reader("train", "--config", DIGITS, "--out", str(run), "rounds=1", stream="stderr")

    assert (ended.returncode, ended.stdout) == (128 + signal.SIGPIPE, "")
    assert (run / "config.yaml").exists() and not (run / "summary.json").exists()


def test_a_broken_pipe_to_another_process_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("hetero_fl.cli.commands._carry_out_methods", broken)
    with pytest.raises(BrokenPipeError):
        main(["methods"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_under_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "hetero_fl.cli", "methods", "--help"]
        environment = {**os.environ, "PYTHONUNBUFFERED": ""}
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, env=environment)

    assert "Traceback" not in ended.stderr and ended.stderr.startswith("failed: no space left on the disk")
