"""Torch's own generators, seeded for a fit: the same draws as torch.manual_seed gives, and nothing left behind."""

from __future__ import annotations

import traceback

import pytest
import torch

from hetero_fl.seeding import seed_torch
from tests.small import config, rounds_of


def test_the_draws_are_those_of_manual_seed() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = torch.randn(5)
        seed_torch(7, torch.device("cpu"))
        assert torch.equal(torch.randn(5), expected)


def test_training_takes_no_stack_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = rounds_of(config(), held=1)
    monkeypatch.setattr(traceback, "format_stack", lambda *_, **__: pytest.fail("torch notes a call for later"))
    monkeypatch.setattr(traceback, "extract_stack", lambda *_, **__: pytest.fail("torch notes a call for later"))
    rounds.round()
