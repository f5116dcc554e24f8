"""Contract of the command line: help, misspelled options, exit statuses, and files.

Mistakes in arguments, each of which gives one line, are listed in `tests/errors/commands.yaml`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hetero_fl
from hetero_fl.cli import main

DIGITS = Path(__file__).parents[2] / "configs" / "digits_quickstart.yaml"
SHARED_OPTIONS = ("--version", "-q, --quiet", "-v, --verbose")
FAILING = """
from hetero_fl.algorithms import FedAvg
trained = []
class Mine(FedAvg):
    def train(self, client, received):
        trained.append(client)
        if len(trained) > 8:
            raise {}
        return (yield from super().train(client, received))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(help_text: str) -> list[str]:
    """Return the names of the commands in a help text."""
    return re.findall(r"^  ([a-z][a-z-]+)(?:  |$)", help_text, re.MULTILINE)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["-h"], ["--quiet"]):
        assert main(arguments) == 0
        output = capsys.readouterr().out
        assert output.startswith("Usage:")
        assert {"train", "compare", "federate", "evaluate", "check"} < set(listed(output))


def test_each_command_has_help_and_suggests_the_nearest_option(
    folder: Path, subtests: pytest.Subtests, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"]) == 0
    commands = listed(capsys.readouterr().out)
    assert len(commands) > 12
    for command in commands:
        with subtests.test(command=command):
            assert main([command, "--help"]) == 0
            output, error = capsys.readouterr()
            assert all(option in output for option in SHARED_OPTIONS) and error == ""
            undescribed = re.findall(r"^  (-\S+(?: \S+)*)\n(?! {6})", output, re.MULTILINE)
            assert output.split("\n\n")[1].startswith("  ") and undescribed == []
            assert main([command, "--versoin"]) == 2
            line = "error: unknown option --versoin; did you mean '--version'? (see hetero-fl "
            assert capsys.readouterr() == ("", f"{line}{command} --help)\n")
            assert list(folder.iterdir()) == []


def test_help_of_train_describes_files_and_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-h"]) == 0

    output = " ".join(capsys.readouterr().out.split())
    assert "-c, --config, --conf FILE Configuration file (YAML or JSON)." in output
    assert "[key.path=value]... Configuration keys to override" in output


def test_script_names_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--conifg", "x.yaml"], command="train") == 2

    line = "unknown option --conifg; did you mean '--config'? (see train.py --help)"
    assert line in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    version = f"hetero-fl {hetero_fl.__version__}\n"
    for arguments, command in ((["--version"], None), (["--version"], "train")):
        assert main(arguments, command=command) == 0
        assert capsys.readouterr().out == version
    assert main(["audit", "--version"]) == 0
    assert capsys.readouterr().out == version
    for module in ("hetero_fl", "hetero_fl.cli"):
        words = [sys.executable, "-m", module, "--version"]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
        assert ended.stdout == version


def test_quiet_prints_errors_and_verbose_all_causes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(DIGITS, folder)
    line = "error: nope.yaml: file not found; the folder contains digits_quickstart.yaml"
    assert main(["-q", "train", "--config", "nope.yaml"]) == 2
    assert capsys.readouterr() == ("", f"{line}\n")
    for words in (["-v", "train"], ["-qv", "train"], ["train", "-qv"], ["train", "--verbose"]):
        assert main([*words, "--config", "nope.yaml"]) == 2
        output = capsys.readouterr().err
        assert output.count("Traceback (most recent call last)") == 2
        cause = output.index("FileNotFoundError")
        assert cause < output.index("hetero_fl.utils.errors.UserError")
        assert output.splitlines()[-1] == line


def test_check_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    serial = "runtime.executor=serial"  # the automatic choice prints a measured time
    for command in ("train", "federate"):
        assert main([command, "--config", str(DIGITS), "--check", serial]) == 0
        printed.append(capsys.readouterr().out)

    assert printed[0] == printed[1]
    assert "cost of " in printed[0] and "data: digits, 10 classes; method: " in printed[0]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        ("ValueError('no')", 1, "failed: "),
        ("KeyboardInterrupt", 130, "interrupted; to resume: "),
    ],
)
def test_exit_status_of_a_run_that_ends_early(
    error: str,
    status: int,
    line: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (folder / "mine.py").write_text(FAILING.format(error))
    options = ["--quiet", "--allow-code", "algorithm.name=python:mine:Mine"]
    options += ["runtime.executor=serial", "rounds=4"]

    found = main(["train", "-c", str(DIGITS), "--out", "run", *options])

    output = capsys.readouterr().err
    assert found == status and line in output and "Traceback" not in output
    assert (folder / "run" / "config.yaml").exists()
    assert not (folder / "run" / "summary.json").exists()
