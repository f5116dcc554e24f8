"""`Trainer`: models and scores between rounds, after the last round, and after an early end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hetero_fl as hfl
from hetero_fl.reporting.run_directory import is_locked
from hetero_fl.utils.errors import UserError
from tests.support.mistakes import refusal
from tests.support.python_federations import QUIET, rows


def federation() -> hfl.Federation:
    clients = [hfl.Client(name, "linear", rows(40, i)) for i, name in enumerate("ab")]
    return hfl.Federation(clients, test=rows(30, 9), proxy=rows(30, 8)[0])


def weights(module: nn.Module) -> list[torch.Tensor]:
    return list(module.state_dict().values())


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, weights(one), weights(other)))


def test_server_model_between_rounds() -> None:
    with hfl.Trainer(federation(), hfl.FedAvg(), rounds=2, overrides=QUIET) as trainer:
        next(trainer)

        server = trainer.model("server")

        (tensors,) = trainer.server.models.values()
        assert all(map(torch.equal, weights(server), tensors.values()))
        with pytest.raises(UserError, match="serv"):
            trainer.model("servers")


@pytest.mark.parametrize("executor", ["serial", pytest.param("processes", marks=pytest.mark.slow)])
def test_models_after_the_last_round_are_those_of_the_run(executor: str) -> None:
    overrides = [*QUIET, f"runtime.executor={executor}"]
    trainer = hfl.Trainer(federation(), hfl.FedAvg(), rounds=1, overrides=overrides)

    list(trainer)

    assert same_weights(trainer.model("a"), trainer.run.model("a"))
    with pytest.raises(UserError, match="the training has ended"):
        trainer.evaluate()


def test_early_end_has_no_models_and_failed_resume_unlocks_the_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings: dict[str, Any] = {"rounds": 3, "out": out, "overrides": QUIET}
    with hfl.Trainer(federation(), hfl.FedAvg(), **settings) as trainer:
        next(trainer)

    assert refusal(trainer.model, "a").endswith("has no models; the run has not finished")
    (out / "checkpoint").rename(tmp_path / "moved")
    # A caught error, like the last error of a notebook, refers to the trainer.
    with pytest.raises(UserError, match="restore it") as caught:
        hfl.Trainer(federation(), hfl.FedAvg(), **settings, resume=True)
    assert caught.value.__traceback__ is not None
    assert not is_locked(out)


def test_comparison_lists_runs_in_the_order_of_its_rows(tmp_path: Path) -> None:
    own = hfl.Federation.from_config({"data": {"name": "digits"}, "clients": {"count": 2}})

    comparison = own.compare(
        [hfl.FedMD(distance="mae"), hfl.Local()],
        rounds=1,
        seeds=[1, 0],
        jobs=1,
        overrides=["data.proxy.size=50", "output.plots=false", "output.report=false"],
    )

    assert comparison.frame["algorithm"].tolist()[:2] == ["fedmd:distance=mae", "local"]
    names = [(run.summary["algorithm"], run.summary["seed"]) for run in comparison.runs]
    expected = zip(comparison.frame["algorithm"], comparison.frame["seed"], strict=True)
    assert names == [(name.split(":")[0], seed) for name, seed in expected]
