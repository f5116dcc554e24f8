"""The description of the machine, on devices that are no CUDA ones, too."""

from __future__ import annotations

import pytest
import torch

from hetero_fl.environment import describe_environment


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_devices_without_cuda(device: str) -> None:
    assert describe_environment({"device": device, "threads": 1})["device"] == device


def test_a_cuda_device_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Model of {device}")
    assert describe_environment({"device": "cuda:0", "threads": 1})["device"] == "cuda:0 (Model of cuda:0)"
