"""Model specs: initial tensors and reuse of built models."""

from __future__ import annotations

import pytest
import torch

from hetero_fl.core.model_spec import ModelSpec
from tests.support.federations import config, rounds_of


def linear() -> ModelSpec:
    return ModelSpec.from_config("linear", 3, (4,))


def test_initial_tensors_follow_the_seed_and_the_default_dtype() -> None:
    a = linear().initial_tensors(1)
    assert all(torch.equal(t, linear().initial_tensors(1)[n]) for n, t in a.items())
    assert not all(torch.equal(t, linear().initial_tensors(2)[n]) for n, t in a.items())
    torch.set_default_dtype(torch.float64)
    try:
        assert {t.dtype for t in linear().initial_tensors(1).values()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)
    a.clear()
    assert linear().initial_tensors(1)


def test_models_are_built_in_the_first_round_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("fml", "fedkd", "fedproto", "fedavg"):
        rounds = rounds_of(config(method), num_rounds=1)
        rounds.evaluate()
        with monkeypatch.context() as patch:
            patch.setattr(ModelSpec, "build", lambda *_: pytest.fail("a model is built"))
            rounds.run_round()
            rounds.evaluate()
