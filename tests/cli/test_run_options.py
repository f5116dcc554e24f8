"""Options of the commands that train."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from hetero_fl.cli.experiment_commands import comparison_command
from tests.support.cases import each_case


@pytest.mark.parametrize(
    ("method", "groups", "proxy", "algorithms"),
    [
        ("hybrid", ["a", "a", "b"], 0, "local,fedavg,hybrid"),
        ("fedavg", ["a", "a", "b"], 0, "local,fedavg"),
        ("fedmd", ["a", "b", "c"], 9, "local,hybrid,fedmd"),
        ("lg_fedavg", ["a", "b", "c"], 0, "local,lg_fedavg"),
        ("local", ["a", "b", "c"], 9, "local,hybrid"),
        ("local", ["a", "b", "c"], 0, None),
    ],
)
@each_case(
    ("settings", "options"),
    [
        ({"runtime": {"mode": "sync"}}, ""),
        ({"runtime": {"mode": "async"}}, " runtime.mode=sync"),
        ({"runtime": {"mode": "sync"}, "a": "python:mine:Net"}, " --allow-code"),
    ],
)
def test_comparison_command_names_methods_that_fit(
    method: str,
    groups: list[str],
    proxy: int,
    algorithms: str | None,
    settings: dict[str, Any],
    options: str,
) -> None:
    """FedAvg is compared if clients have the same architecture, otherwise Hybrid."""
    summary = {"algorithm": method, "seed": 3, "data": {"n_proxy": proxy}}
    finished = Mock(path=Path("runs/my run"), summary=summary)
    clients = {f"site_{n}": {"group": group} for n, group in enumerate(groups)}
    finished.directory.details.return_value = {"clients": clients}
    finished.directory.config.return_value = {"rounds": 4, **settings}

    expected = (
        f"hetero-fl compare --config 'runs/my run/config.yaml' --algorithms {algorithms} --seeds 3 "
        f"--out 'runs/my run-comparison-4' output.best_models=false{options}"
    )
    assert comparison_command(finished) == (expected if algorithms else "")
