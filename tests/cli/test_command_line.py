"""The command line: suggestions, common options, help and exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

import hetero_fl
from hetero_fl.cli import main
from hetero_fl.cli.commands import APP, methods

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits_quickstart.yaml")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["trian", "-c", "x.yaml"],
            "error: unknown command 'trian'; did you mean 'train'? (see hetero-fl --help)",
        ),
        (
            ["run"],
            "error: unknown command 'run'; choose from audit, benchmark, certificates, check,",
        ),
        (
            ["train", "--conifg", "x.yaml"],
            "unknown option --conifg; did you mean '--config'? (see hetero-fl train",
        ),
        (["train", "--conifg=x.yaml"], "unknown option --conifg; did you mean '--config'?"),
        (["train", "--chekc", "-c", "x.yaml"], "unknown option --chekc; did you mean '--check'?"),
        (
            ["train", "-c", "x.yaml", "--round", "3"],
            "unknown option --round; did you mean rounds=3?",
        ),
        (["train", "-c", "x.yaml", "-rq"], "error: unknown option -r (see hetero-fl train --help)"),
        (["evaluate", "runs/x", "--dta", "x.npz"], "unknown option --dta; did you mean '--data'?"),
        (
            ["join", "runs/x", "--data", "y", "--take", "head"],
            "error: --take: expected one of backbone, teacher, both, got 'head' (see",
        ),
        (["evaluate", "runs/x"], "error: --data: missing (see hetero-fl evaluate --help)"),
        (["check"], "error: RUN: missing (see hetero-fl check --help)"),
        (
            ["train", "--zzz", "-c", "x.yaml"],
            "error: unknown option --zzz (see hetero-fl train --help)",
        ),
        (
            ["compare", "--jobs", "two"],
            "error: --jobs: expected an integer, got 'two' (see",
        ),
    ],
)
def test_parser_suggests_the_nearest_name(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr().err
    assert line in output and output.count("\n") == 1


def test_parser_of_a_script_suggests_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--conifg", "x.yaml"], command="train") == 2
    assert (
        "unknown option --conifg; did you mean '--config'? (see train.py --help)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "command"),
    [(["--version"], None), (["--version"], "train"), (["audit", "--version"], None)],
)
def test_version_is_that_of_the_package(
    arguments: list[str], command: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments, command=command) == 0
    assert capsys.readouterr().out == f"hetero-fl {hetero_fl.__version__}\n"


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


def test_quiet_prints_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-q", "train", "--config", "nope.yaml"]) == 2
    assert capsys.readouterr() == (
        "",
        "error: nope.yaml: file not found; the folder contains compose.yaml, mkdocs.yml\n",
    )


@pytest.mark.parametrize(
    "arguments", [["-v", "train"], ["-qv", "train"], ["train", "-qv"], ["train", "--verbose"]]
)
def test_verbose_prints_the_tracebacks_of_all_causes(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--config", "nope.yaml"]) == 2
    output = capsys.readouterr().err
    assert output.count("Traceback (most recent call last)") == 2 and "FileNotFoundError" in output
    assert output.index("FileNotFoundError") < output.index("hetero_fl.utils.errors.UserError")
    assert (
        output.splitlines()[-1]
        == "error: nope.yaml: file not found; the folder contains compose.yaml, mkdocs.yml"
    )


@pytest.mark.parametrize("command", APP.commands)
def test_every_command_takes_the_common_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0

    output = capsys.readouterr().out
    assert all(option in output for option in ("--version", "-q, --quiet", "-v, --verbose"))


def test_help_lists_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["-h"]) == main(["--quiet"]) == 0
    output = capsys.readouterr().out
    assert [line.split()[0] for line in output.splitlines() if line[:3].strip()].count(
        "Usage:"
    ) == 3
    assert all(f"\n  {command} " in output for command in APP.commands)

    assert main(["train", "-h"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "-c, --config, --conf FILE Configuration file (YAML or JSON)." in output
    assert "[key.path=value]... Configuration keys to override" in output


@pytest.mark.parametrize("module", ["hetero_fl", "hetero_fl.cli"])
def test_package_runs_as_a_module(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)

    assert ended.stdout == f"hetero-fl {hetero_fl.__version__}\n"


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
    monkeypatch.setattr(methods, "callback", Mock(side_effect=BrokenPipeError))
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


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        (["--rounds", "3"], "rounds=3"),
        (["--rounds=3"], "rounds=3"),
        (["--algorithm", "hybrid"], "algorithm.name=hybrid"),
        (["--data.proxy.size", "50"], "data.proxy.size=50"),
        (["--batch-size", "16"], "clients.defaults.batch_size=16"),
        (["--rounds"], "rounds=…"),
    ],
)
def test_option_with_a_configuration_key_suggests_the_override(
    option: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", DIGITS, *option]) == 2

    name = option[0].partition("=")[0]
    line = f"error: unknown option {name}; did you mean {meant}? (see hetero-fl train --help)\n"
    assert capsys.readouterr().err == line


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


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--grid", "=1,2"], "error: --grid: expected key=a,b,c, got '=1,2'"),
        (["--grid", "a=1,2", "--grid", "a=3"], "error: --grid: a: given twice; write all values"),
        (
            ["--search", "optuna", "--space", "a=1,2", "--space", "a=1..3"],
            "error: --space: a: given twice; write all values in one option",
        ),
        (["--budget", "5"], "error: --budget: use it together with --search"),
    ],
)
def test_contradictory_options_of_compare_are_refused(
    options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "-c", DIGITS, "--algorithms", "fedavg", "--out", "unused", *options]

    assert main(arguments) == 2

    assert line in capsys.readouterr().err
