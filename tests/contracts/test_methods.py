"""Every built-in method is short, and runs on a mixed federation by its name alone."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from hetero_fl.algorithms import register_algorithm
from hetero_fl.experiment import prepare
from tests.support.federations import METHODS

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.slow
@pytest.mark.parametrize("config", ["digits_quickstart", "medical_hetero"])
def test_every_method_is_prepared_for_a_mixed_federation(config: str) -> None:
    for method in METHODS:
        prepared = prepare(CONFIGS / f"{config}.yaml", [f"algorithm.name={method}"])

        assert prepared.config.algorithm["name"] == method


def test_methods_are_short() -> None:
    for method in METHODS:
        tree = ast.parse(inspect.getsource(register_algorithm[method]))
        num_statements = sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
        assert num_statements <= 95, method
