"""Options of the commands that train."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from hetero_fl.cli import main
from hetero_fl.cli.commands import comparison_command


def test_resume_needs_a_run_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "x.yaml", "--resume"]) == 2

    assert (
        "--resume: requires --out, the directory of the run to continue" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("method", "groups", "algorithms"),
    [
        ("hybrid", ["a", "a", "b"], "local,fedavg,hybrid"),
        ("fedavg", ["a", "a", "b"], "local,fedavg"),
        ("fedmd", ["a", "b", "c"], "local,fedmd"),
        ("local", ["a", "b", "c"], "local,hybrid"),
    ],
)
def test_comparison_command_names_methods_that_fit(
    method: str, groups: list[str], algorithms: str
) -> None:
    """FedAvg is compared if clients have the same architecture."""
    finished = Mock(path=Path("runs/my run"), summary={"algorithm": method})
    clients = {f"site_{n}": {"group": group} for n, group in enumerate(groups)}
    finished.directory.details.return_value = {"clients": clients}

    assert comparison_command(finished) == (
        f"hetero-fl compare --config 'runs/my run/config.yaml' --algorithms {algorithms} "
        "--out 'runs/my run-comparison'"
    )
