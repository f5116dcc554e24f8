"""The command line: suggestions, common options, help and exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from hetero_fl.cli import main
from hetero_fl.cli.commands import APP

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits_quickstart.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--quiet", "train"], ["-qv", "train"], ["train", "-q"]])
def test_quiet_keeps_results(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run = ["--config", DIGITS, "--out", str(out), "--resume", "rounds=1"]

    assert main([*arguments, *run]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    assert "round 1/1" in (out / "log.txt").read_text(), (
        "the log of the run is written all the same"
    )


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_works_without_posix_features(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("select.poll")
    monkeypatch.delattr("signal.SIGPIPE")
    with open(os.devnull, "w") as out:
        monkeypatch.setattr("sys.stdout", out)

        assert main(["train", option]) == 0


def without_reader(
    *arguments: str, stream: str, unbuffered: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command with one stream connected to a closed pipe; the other stream is captured."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    command = [sys.executable, "-m", "hetero_fl.cli", *arguments]
    try:
        return subprocess.run(  # type: ignore[call-overload]
            command, text=True, timeout=300, env=environment, check=False, **streams
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    "arguments",
    [
        ["methods"],  # printed by rich
        *(
            pytest.param(arguments, marks=pytest.mark.slow)
            for arguments in (
                ["--help"],
                *([command, "--help"] for command in APP.commands),
                ["methods", "hybrid"],
                ["train", "--check", "--config", DIGITS],  # by print, then by rich
            )
        ),
    ],
)
def test_closed_pipe_ends_command_silently(arguments: list[str]) -> None:
    ended = without_reader(*arguments, stream="stdout")

    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.slow
def test_closed_pipe_ends_unbuffered_command_silently() -> None:
    ended = without_reader("methods", stream="stdout", unbuffered=True)

    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.slow
def test_closed_stderr_ends_run_silently(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = without_reader(
        "train", "--config", DIGITS, "--out", str(run), "rounds=1", stream="stderr"
    )

    assert (ended.returncode, ended.stdout) == (128 + signal.SIGPIPE, "")
    assert (run / "config.yaml").exists() and not (run / "summary.json").exists()


def test_broken_pipe_to_another_process_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(APP.commands["methods"], "callback", Mock(side_effect=BrokenPipeError))
    with pytest.raises(BrokenPipeError):
        main(["methods"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_prints_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "hetero_fl.cli", "methods", "--help"]
        environment = {**os.environ, "PYTHONUNBUFFERED": ""}
        ended = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            env=environment,
            check=False,
        )

    assert "Traceback" not in ended.stderr and ended.stderr.startswith(
        "failed: no space left on the disk"
    )


def test_headline_marks_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["data.train_limit=60", "data.test_limit=20", "clients.groups=[{name: a, model: linear}]"]
    (tmp_path / "c.yaml").write_text("rounds: 1\noutput: {plots: false, report: false}\n")
    command = ["train", "--config", str(tmp_path / "c.yaml"), "--out"]

    assert main([*command, str(tmp_path / "a"), *few]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert (
        main([*command, str(tmp_path / "b"), *few, "data.name=digits", "algorithm.name=local"]) == 0
    )
    second = capsys.readouterr().err.splitlines()[0]

    assert first == (
        "data: chest_xray (default), 2 classes: normal, "
        "pneumonia; method: fedavg (default); 1 client"
    )
    assert second == "data: digits, 10 classes; method: local; 1 client"
