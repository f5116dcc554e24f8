"""The description of the machine, on devices that are no CUDA ones, too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hetero_fl.utils.environment import describe_environment


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_devices_without_cuda(device: str) -> None:
    assert describe_environment({"device": device, "threads": 1})["device"] == device


def test_a_cuda_device_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Model of {device}")
    assert (
        describe_environment({"device": "cuda:0", "threads": 1})["device"]
        == "cuda:0 (Model of cuda:0)"
    )


@pytest.mark.parametrize(
    ("user", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
)
def test_the_command_says_how_long_threads_spin_before_torch_is_loaded_unless_the_user_does(
    user: dict[str, str], spins: str
) -> None:
    rest = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import sys, os, hetero_fl.cli; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code], env=rest | user, capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == [spins, "False"]
