"""Code of a user that calls sys.exit ends a command in one line that names the code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from hetero_fl.cli import main
from tests.support.cases import each_case

METHOD = """
from hetero_fl.algorithms import register_algorithm
class Mine(register_algorithm["fedavg"]):
    def train(self, client, received):
        raise SystemExit(3)
"""
MODEL = """
from torch import nn
class Mine(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        raise SystemExit(3)
"""
MODULE = """
import argparse
argparse.ArgumentParser().parse_args(["--unknown"])
"""
FUNCTION = """
def Mine(first, second=None):
    raise SystemExit(3)
"""


@each_case(
    ("code", "key", "message", "status"),
    [
        (METHOD, "algorithm.name", "mine.py:5, in train: SystemExit: 3", 1),
        (MODEL, "model", "cannot create the model: SystemExit: 3", 2),
        (MODULE, "model", "cannot import mine: SystemExit: 2", 2),
        (MODULE, "data.name", "data.name: cannot import 'mine': SystemExit: 2", 2),
        (FUNCTION, "data.name", "data.name: python:mine:Mine raised SystemExit: 3", 2),
        (FUNCTION, "data.partition.kind", "python:mine:Mine raised SystemExit: 3", 2),
        (FUNCTION, "evaluation.metrics.mine", "mine.py:3, in Mine: SystemExit: 3", 1),
    ],
)
def test_exit_of_user_code_is_one_line(
    code: str,
    key: str,
    message: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(code)
    model = "python:mine:Mine" if key == "model" else "mlp"
    config = {
        "rounds": 1,
        "data": {"name": "digits", "train_limit": 120},
        "clients": {"groups": [{"name": "site", "count": 2, "model": model}]},
        "runtime": {"executor": "serial", "threads": 1},
    }
    Path("c.yaml").write_text(yaml.safe_dump(config))
    override = [] if key == "model" else [f"{key}=python:mine:Mine"]

    found = main(["train", "-c", "c.yaml", "--out", "run", "--quiet", "--allow-code", *override])

    error = capsys.readouterr().err.splitlines()[-1]
    assert found == status and message in error
    assert error.startswith(("error: ", "failed: "))
