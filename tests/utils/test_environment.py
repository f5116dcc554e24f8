"""The description of the machine, with and without CUDA devices."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hetero_fl.utils.environment import describe_environment
from tests.support.cases import each_case


@each_case(
    ("device", "text"),
    [("cpu", "cpu"), ("mps", "mps"), ("cuda:0", "cuda:0 (Model of cuda:0)")],
)
def test_environment_names_the_device(
    device: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Model of {device}")

    assert describe_environment({"device": device, "threads": 1})["device"] == text


@each_case(
    ("user", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
)
def test_command_sets_spin_count_before_torch_is_loaded(user: dict[str, str], spins: str) -> None:
    rest = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = (
        "import sys, os, hetero_fl.cli; "
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], env=rest | user, capture_output=True, text=True, check=True
    )
    assert output.stdout.split() == [spins, "False"]
