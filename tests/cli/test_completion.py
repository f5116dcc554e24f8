"""Completion in shells, without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hetero_fl.cli import main
from tests.support.cases import each_case

ROOT = Path(__file__).parents[2]
VARIABLE = "_HETERO_FL_COMPLETE"
SHELLS = ("bash", "zsh", "fish", "powershell")


@each_case(
    ("words", "found"),
    [
        (["tr"], ["plain,train"]),
        (["train", "--re"], ["plain,--resume"]),
        (["completion", "zs"], ["plain,zsh"]),
    ],
)
def test_commands_options_and_choices_are_completed(
    words: list[str],
    found: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(VARIABLE, "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "\n".join(["hetero-fl", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))

    assert main([]) == 0
    assert capsys.readouterr().out.splitlines() == found


def test_unknown_shell_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "tcsh_complete")

    assert main([]) == 1


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_call_the_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0

    script = capsys.readouterr().out
    assert VARIABLE in script and f"{shell}_complete" in script
    assert "hetero-fl" in script


def test_invalid_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2

    assert re.fullmatch(
        r"error: invalid value for 'SHELL': 'tcsh' is not one of 'bash', .*\n",
        capsys.readouterr().err,
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(tmp_path: Path) -> None:
    program = tmp_path / "hetero-fl"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hetero_fl "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    script = tmp_path / "script.bash"
    script.write_text(
        'eval "$(hetero-fl completion bash)"\n'
        "COMP_WORDS=(hetero-fl train --re)\nCOMP_CWORD=2\n_hetero_fl_completion hetero-fl\n"
        'echo "${COMPREPLY[@]}"\n',
        encoding="utf-8",
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}

    ended = subprocess.run(
        ["bash", str(script)], env=environment, capture_output=True, text=True, check=False
    )

    assert ended.stdout.strip() == "--resume", ended.stderr


@pytest.mark.slow
def test_completion_does_not_load_torch() -> None:
    code = (
        "import sys\nfrom hetero_fl.cli import main\nmain([])\n"
        "assert not sys.modules.keys() & {'torch', 'numpy', 'pydantic', 'rich'}"
    )
    environment = {
        **os.environ,
        VARIABLE: "bash_complete",
        "COMP_WORDS": "hetero-fl\ntrain\n--re",
        "COMP_CWORD": "2",
    }

    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
