"""The code of users draws equal random numbers in each run and on each executor."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hetero_fl as hfl
from hetero_fl.data import Units
from hetero_fl.privacy import dp_sgd
from model_zoo.generators import generator_hash
from tests.support.python_federations import QUIET, images, same_models, without_seconds

HERE = f"python:{__name__}"
DRAWS = [lambda: float(torch.rand(())), np.random.rand, random.random]


def draw() -> float:
    """Return the sum of a draw from each global generator."""
    return sum(function() for function in DRAWS)


class Noisy(nn.Module):
    """A model that draws in its constructor and in both modes, as plain torch code may do."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.shift = draw()
        self.scale = nn.Parameter(torch.tensor(draw()))
        self.hidden = nn.Linear(64, 8)
        self.out = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.hidden(x.flatten(1) + draw()) * self.scale + self.shift).relu())


class NumpyNoise(Noisy):
    """A model that does not draw from the generator of torch in `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        noise = np.random.rand() + random.random()
        return self.out(self.hidden(x.flatten(1) + noise).relu() * self.scale)


class FaintNoise(Noisy):
    """A model whose draws change results less than the tolerance of a trial."""

    def forward(self, x: Tensor) -> Tensor:
        noise = 1e-3 * np.random.rand()
        return self.out(self.hidden(x.flatten(1) + noise).relu() * self.scale)


class Plain(nn.Module):
    """A model that draws nothing."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.flatten(1))


def noisy_loss(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits * random.random(), y, reduction="none")


def noisy_transform(x: Tensor) -> Tensor:
    return x + draw()


def noisy_optimizer(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    def change_rate(*_: object) -> None:
        optimizer.param_groups[0]["lr"] = random.random()

    optimizer.register_step_pre_hook(change_rate)
    return optimizer


def noisy_metric(_predictions: Tensor, _y: Tensor) -> float:
    return draw()


def random_parts(units: Units) -> list[Tensor]:
    return list(torch.from_numpy(np.random.permutation(len(units))).chunk(4))


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), generator_hash()]


def federation(model: type[nn.Module], **settings: Any) -> hfl.Federation:
    clients = [hfl.Client(f"client_{i}", model, **settings) for i in range(4)]
    parts = hfl.Partition(kind=f"{HERE}:random_parts")
    return hfl.Federation(clients, data=images(160, 0), partition=parts, test=images(30, 9))


def train(own: hfl.Federation, executor: str = "serial") -> hfl.Run:
    workers = [f"runtime.executor={executor}", "runtime.workers=2"]
    metric = f"evaluation.metrics.noise={HERE}:noisy_metric"
    return own.train(hfl.FedAvg(), rounds=2, overrides=[*QUIET, *workers, metric], quiet=True)


CODE: dict[str, dict[str, Any]] = {
    "model": {"model": Noisy},
    "model without torch": {"model": NumpyNoise},
    "loss": {"model": Plain, "objective": noisy_loss},
    "preprocess": {"model": Plain, "preprocess": hfl.Preprocess(transform=noisy_transform)},
    "augment": {"model": Plain, "augment": hfl.Augment(transform=noisy_transform)},
    "optimizer": {"model": Plain, "optimizer": noisy_optimizer},
}


@pytest.mark.parametrize("code", CODE)
def test_draws_of_user_code_are_keyed(code: str) -> None:
    np.random.seed(3)
    random.seed(3)
    np.random.randn()
    before = states()

    first = train(federation(**CODE[code]))

    assert states() == before
    torch.rand(1)
    np.random.rand()
    random.random()
    second = train(federation(**CODE[code]))
    stacked = train(federation(**CODE[code]), "batched")
    assert same_models(first, second)
    assert without_seconds(first) == without_seconds(second)
    noise = first.metrics[-1]["personal"]["noise"]
    assert stacked.metrics[-1]["personal"]["noise"] == noise > 0
    for client, model in first.models.items():
        for name, tensor in model.tensors.items():
            assert torch.allclose(tensor, stacked.models[client].tensors[name], atol=1e-6), name


@pytest.mark.slow
def test_draws_are_equal_in_worker_processes() -> None:
    runs = [train(federation(Noisy), name) for name in ("serial", "processes")]

    assert same_models(*runs)
    assert without_seconds(runs[0]) == without_seconds(runs[1])


def test_draws_do_not_depend_on_the_code_between_rounds(tmp_path: Path) -> None:
    own = federation(Noisy)
    settings: dict[str, Any] = {"rounds": 2, "overrides": QUIET, "quiet": True}
    whole = own.train(hfl.FedAvg(), **settings)

    with hfl.Trainer(own, hfl.FedAvg(), **settings, out=tmp_path / "run") as trainer:
        for _ in trainer:
            random.random()
            np.random.rand()
            before = states()
            trainer.evaluate()
            assert states() == before

    assert same_models(whole, trainer.run)


def test_numpy_draws_of_stacked_models_are_noticed() -> None:
    run = train(federation(NumpyNoise), "batched")

    log = (run.path / "log.txt").read_text()
    assert "draws from the generators of NumPy or Python" in log


@pytest.mark.parametrize("model", [Noisy, FaintNoise])
def test_trial_of_private_gradients_does_not_change_draws(
    model: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def private_run() -> hfl.Run:
        privacy = hfl.Privacy(noise_multiplier=1.0, delta=1e-3)
        return federation(model).train(
            hfl.FedAvg(), rounds=1, privacy=privacy, overrides=QUIET, quiet=True
        )

    tried = private_run()
    # With room for the gradients of one row, there is neither a stack nor a trial.
    monkeypatch.setattr(dp_sgd, "MEMORY", 1)
    alone = private_run()

    assert same_models(tried, alone)
