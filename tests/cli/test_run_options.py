"""Options of the commands that train."""

from __future__ import annotations

import pytest

from hetero_fl.cli import main


def test_resume_needs_a_run_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "x.yaml", "--resume"]) == 2

    assert (
        "--resume: requires --out, the directory of the run to continue" in capsys.readouterr().err
    )
