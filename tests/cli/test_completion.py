"""Completion in shells, without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hetero_fl.cli import main
from hetero_fl.cli.completion import COMPLETION_VARIABLE, SHELLS, known_names
from tests.support.plugins import install

ROOT = Path(__file__).parents[2]


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Return a function that maps the words of a command line to the completions in fish."""

    def run(*words: str) -> list[str]:
        monkeypatch.setenv(COMPLETION_VARIABLE, "bash_complete")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["hetero-fl", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        assert main([]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line.partition(",")[2] for line in lines]

    return run


def test_commands_and_options_are_completed(complete) -> None:  # type: ignore[no-untyped-def]
    assert complete("tr") == ["train"]
    assert complete("train", "--re") == ["--resume"]


def test_keys_are_completed(complete) -> None:  # type: ignore[no-untyped-def]
    assert complete("train", "data.partition.k") == ["data.partition.kind="]
    assert {"rounds=", "runtime.mode="} <= set(complete("train", "-c", "x.yaml", "r"))


@pytest.mark.parametrize(
    "words", [["data.partition.kind=dir"], ["rounds=1", "data.partition.kind", "=", "dir"]]
)
def test_values_are_completed_in_all_shells(complete, words: Sequence[str]) -> None:  # type: ignore[no-untyped-def]
    (found,) = complete("train", *words)

    assert found == ("dirichlet" if "=" in words else "data.partition.kind=dirichlet")


def test_values_are_listed_after_the_sign(complete) -> None:  # type: ignore[no-untyped-def]
    assert complete("train", "runtime.mode", "=") == ["async", "sync"]


def test_sign_without_a_key_is_ignored(complete) -> None:  # type: ignore[no-untyped-def]
    assert complete("train", "=", "runtime.mod") == ["runtime.mode="]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["output.logg"], ["output.loggers="]),
        (["output.loggers=cs"], ["output.loggers=[csv]"]),
        (["output.loggers=[cs"], ["output.loggers=[csv]"]),
        (["output.loggers=[csv,ten"], ["output.loggers=[csv,tensorboard]"]),
        (["output.loggers", "=", "ml"], ["[mlflow]"]),
        (["output.loggers", "="], ["[csv]", "[mlflow]", "[tensorboard]", "[wandb]"]),
    ],
)
def test_loggers_are_completed(complete, words: list[str], found: list[str]) -> None:  # type: ignore[no-untyped-def]
    assert complete("train", *words) == found


def test_methods_are_completed(complete) -> None:  # type: ignore[no-untyped-def]
    assert complete("methods", "kt") == ["kt_pfl"]
    assert complete("train", "algorithm.name=kt") == ["algorithm.name=kt_pfl"]
    assert complete("compare", "--algorithms", "local,kt") == ["local,kt_pfl"]


def test_methods_of_plugins_are_completed_without_import(  # type: ignore[no-untyped-def]
    complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {"hetero_fl.algorithms": {"zebra": "other_package:Missing"}}
    install(tmp_path, monkeypatch, groups, "1 / 0")

    assert complete("methods", "zeb") == ["zebra"]


def test_unknown_shell_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPLETION_VARIABLE, "tcsh_complete")

    assert main([]) == 1


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_call_the_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0

    script = capsys.readouterr().out
    assert COMPLETION_VARIABLE in script and f"{shell}_complete" in script
    assert "hetero-fl" in script
    assert ("compopt -o nospace" in script) == (shell == "bash")


def test_invalid_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2

    assert re.fullmatch(
        r"error: SHELL: expected one of bash, zsh, fish, powershell, got 'tcsh' .*\n",
        capsys.readouterr().err,
    )


def test_every_key_has_a_description() -> None:
    assert all(about["help"] for about in known_names()["keys"].values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(tmp_path: Path) -> None:
    program = tmp_path / "hetero-fl"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hetero_fl "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    script = tmp_path / "script.bash"
    words = "(hetero-fl train data.partition.kind = dir)"
    script.write_text(
        'eval "$(hetero-fl completion bash)"\n'
        f"COMP_WORDS={words}\nCOMP_CWORD=4\n_hetero_fl_completion hetero-fl\n"
        'echo "${COMPREPLY[@]}"\n',
        encoding="utf-8",
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}

    ended = subprocess.run(
        ["bash", str(script)], env=environment, capture_output=True, text=True, check=False
    )

    assert ended.stdout.strip() == "dirichlet", ended.stderr


@pytest.mark.slow
def test_completion_does_not_load_torch() -> None:
    code = (
        "import sys\nfrom hetero_fl.cli import main\nmain([])\n"
        "assert not sys.modules.keys() & {'torch', 'numpy', 'pydantic', 'rich'}"
    )
    environment = {
        **os.environ,
        COMPLETION_VARIABLE: "bash_complete",
        "COMP_WORDS": "hetero-fl\ntrain\nalgorithm.name=fed",
        "COMP_CWORD": "2",
    }

    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
