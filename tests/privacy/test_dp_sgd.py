"""DP-SGD compared with Opacus and with a loop over rows, and the scale of its noise."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.mutual_objectives import MutualDistillation
from hetero_fl.core.objectives import (
    Batch,
    Context,
    ModelView,
    ModelViews,
    Objective,
    Proximal,
    ProxyReplay,
    Supervised,
)
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit, Rows, SampledBatches
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.templates import Templates
from hetero_fl.engine.training import run_fit
from hetero_fl.experiment import prepare
from hetero_fl.federation.store import PrivateState
from hetero_fl.privacy import dp_sgd
from hetero_fl.privacy.dp_sgd import PoissonBatches, PrivateGradients, sampling_plan
from hetero_fl.privacy.noise import KeyedNoiseSource, NoiseSource, SecretNoiseSource
from tests.support.cases import each_case
from tests.support.federations import config

CPU = torch.device("cpu")
NOISE = KeyedNoiseSource(0)
SGD = OptimizerConfig(name="sgd", lr=1.0)


def client(model: Any = "cnn_gn_small") -> Participant:
    federation = prepare(config("fedavg", models=model, clients=2)).federation
    return federation.client("site_1", PrivateState(), 0)


def moved(
    participant: Participant, fit: Fit, clip: float, z: float = 0.0, slot: str = "model"
) -> dict[str, Tensor]:
    """Return the gradients of a private fit, from one step of plain SGD with rate one."""
    before = dict(participant.models[slot])
    run_fit(participant, fit, Templates(DeviceMemory(CPU)), PrivateGradients(clip, z, NOISE))
    return {n: before[n] - t for n, t in participant.models[slot].items()}


def whole(participant: Participant, objective: Objective | None = None, **changes: Any) -> Fit:
    """Return one step on all rows."""
    n = len(participant.data("train", None)["y"])
    return Fit({"model": None}, objective or Supervised(), batch_size=n, optimizer=SGD, **changes)


@each_case(
    ("clip", "model"),
    itertools.product([0.5, 1e3], ["cnn_gn_small", {"name": "mlp", "hidden": [24]}]),
)
def test_private_gradients_match_opacus(model: Any, clip: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer
    participant = client(model)
    columns = participant.data("train", None)
    module = participant.arch["model"].build()
    module.load_state_dict(participant.models["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampled = GradSampleModule(module)
        plain, n = torch.optim.SGD(sampled.parameters(), 1.0), len(columns["y"])
        optimizer = DPOptimizer(
            plain, noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=n
        )
        F.cross_entropy(sampled(columns["x"]), columns["y"]).backward()
        optimizer.pre_step()
    expected = {n.removeprefix("_module."): p.grad for n, p in sampled.named_parameters()}
    found = moved(participant, whole(participant), clip=clip)
    assert all(float((found[n] - g).abs().max()) < 1e-6 for n, g in expected.items())
    assert sum(float(g.norm()) for g in expected.values()) > 0.1


def by_hand(
    participant: Participant, objective: Objective, clip: float, slots: tuple[str, ...]
) -> dict[str, Tensor]:
    """Return Σ clipped gradients of single rows / n, computed row by row."""
    columns = participant.data("train", None)
    modules = {slot: participant.arch[slot].build() for slot in slots}
    for slot, module in modules.items():
        module.load_state_dict(participant.models[slot])
    nets = ModelViews({slot: ModelView.from_module(module) for slot, module in modules.items()})
    parameters = {f"{s}:{n}": p for s, m in modules.items() for n, p in m.named_parameters()}
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for i in range(len(columns["y"])):
        loss = objective.private_loss(
            nets, Batch({n: t[i : i + 1] for n, t in columns.items()}), {}
        )
        gradients = torch.autograd.grad(loss.sum(), list(parameters.values()))
        norm = float(torch.cat([g.flatten() for g in gradients]).norm())
        for name, g in zip(parameters, gradients, strict=True):
            total[name] += g * min(1.0, clip / norm) / len(columns["y"])
    return total


def test_gradients_of_two_models_are_clipped_jointly() -> None:
    participant = client()
    participant.arch["mentee"] = participant.arch["model"]
    participant.models["mentee"] = participant.arch["mentee"].initial_tensors(7)
    objective = MutualDistillation(shape=participant.arch["mentee"].input_shape)
    expected = by_hand(participant, objective, 0.3, ("model", "mentee"))
    fit = replace(whole(participant, objective), train={"model": None, "mentee": None})
    before = {s: dict(participant.models[s]) for s in ("model", "mentee")}
    run_fit(participant, fit, Templates(DeviceMemory(CPU)), PrivateGradients(0.3, 0.0, NOISE))
    for name, gradient in expected.items():
        slot, n = name.split(":")
        assert torch.allclose(before[slot][n] - participant.models[slot][n], gradient, atol=1e-6)


def test_models_without_vmap_support_run_row_by_row() -> None:
    participant = client("gru")
    expected = by_hand(participant, Supervised(), 0.2, ("model",))
    found = moved(participant, whole(participant), clip=0.2)
    assert all(torch.allclose(found[n.split(":")[1]], g, atol=1e-6) for n, g in expected.items())


def test_large_models_run_row_by_row_with_equal_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Include dropout, whose masks differ by row in both cases."""
    model = {"name": "cnn", "width": 4, "norm": "group", "dropout": 0.3}
    found = [moved(client(model), whole(client(model)), clip=0.2)]
    monkeypatch.setattr(dp_sgd, "MEMORY", 1)
    found.append(moved(client(model), whole(client(model)), clip=0.2))
    assert all(torch.allclose(found[0][n], t, atol=1e-6) for n, t in found[1].items())
    assert any(float(t.abs().max()) > 1e-4 for t in found[0].values())


def test_penalties_and_public_rows_are_not_clipped() -> None:
    participant = client()
    start = participant.models["model"]
    anchor = {n: t + 1 for n, t in start.items()}
    found = moved(
        participant, whole(participant, Proximal(mu=0.5), context={"anchor": anchor}), clip=1e-9
    )
    names = participant.arch["model"].parameter_names
    assert all(
        torch.allclose(found[n], torch.full_like(t, -0.5), atol=1e-5)
        for n, t in start.items()
        if n in names
    )
    x = participant.data("proxy", None)["x"][:8]
    extra_batches = {
        "public": SampledBatches(lambda g, size: {"x": x, "teacher": torch.eye(10)[:8] * 3}, 8)
    }
    found = moved(
        client(),
        whole(participant, ProxyReplay(weight=2.0), extra_batches=extra_batches),
        clip=1e-9,
    )
    module = participant.arch["model"].build()
    module.load_state_dict(start)
    nets = ModelViews(model=ModelView.from_module(module))
    objective = ProxyReplay(weight=2.0)
    loss = objective.public_loss(nets, Batch(public_x=x, public_teacher=torch.eye(10)[:8] * 3), {})
    loss.backward()
    assert all(
        torch.allclose(found[n], p.grad, atol=1e-6)
        for n, p in module.named_parameters()
        if p.grad is not None
    )


@each_case("value", [float("inf"), 1e30])
def test_non_finite_row_gradients_count_as_zero(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check both computations: a failing fit would reveal the row."""

    def spoilt(rows: int) -> dict[str, Tensor]:
        participant = client("mlp")
        columns = {n: t[:rows].clone() for n, t in participant.data("train", None).items()}
        columns["x"][0] *= value
        participant.data = lambda name, through: columns
        return moved(participant, whole(participant), clip=0.2)

    found = spoilt(24)
    monkeypatch.setattr(dp_sgd, "MEMORY", 1)
    one_by_one = spoilt(24)
    single = spoilt(1)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in single.values())
    assert all(torch.allclose(found[n], t, atol=1e-6) for n, t in one_by_one.items())
    assert sum(float(t.square().sum()) for t in found.values()) > 0


class Silent(Objective):
    """A loss without gradients."""

    def loss(self, nets: ModelViews, batch: Batch, context: Context) -> Tensor:
        return 0.0 * nets.model(batch.x).sum(-1)


def test_noise_scale_and_sampling_rate() -> None:
    """Train on noise only: steps follow N(0, (z·clip / expected batch)²)."""
    participant = client({"name": "mlp", "hidden": [64]})
    fit = Fit({"model": None}, Silent(), batch_size=16, steps=20, optimizer=SGD)
    n = len(participant.data("train", None)["y"])
    found = moved(participant, fit, clip=0.7, z=1.5)
    numbers = torch.cat([t.flatten() for t in found.values()])
    expected = 1.5 * 0.7 / 16 * 20**0.5
    assert abs(float(numbers.std()) / expected - 1) < 4 / (2 * len(numbers)) ** 0.5
    batches = PoissonBatches(participant, replace(fit, steps=400), DeviceMemory(CPU), NOISE)
    sizes = torch.tensor([len(rows) for rows in batches.indices], dtype=torch.float64)
    q = 16 / n
    assert batches.expected == pytest.approx(16)
    assert abs(float(sizes.mean()) - 16) < 4 * (n * q * (1 - q) / 400) ** 0.5
    assert abs(float(sizes.var()) / (n * q * (1 - q)) - 1) < 4 * (2 / 400) ** 0.5


def test_accounting_of_sampling_matches_opacus() -> None:
    fit = Fit({"model": None}, Supervised(), batch_size=32, epochs=2)
    assert sampling_plan(110, fit) == (32 / 110, 2 * 3)
    assert sampling_plan(20, fit) == (1.0, 2)
    assert sampling_plan(110, replace(fit, steps=5)) == (32 / 110, 5)


def test_deployment_noise_depends_only_on_the_secret() -> None:
    fit = Fit({"model": None}, Supervised(), Rows(), batch_size=16, steps=2, optimizer=SGD)
    secret = SecretNoiseSource()

    def trained(noise: NoiseSource) -> Tensor:
        participant = client()
        run_fit(participant, fit, Templates(DeviceMemory(CPU)), PrivateGradients(1.0, 1.0, noise))
        return participant.models["model"]["head.bias"]

    assert torch.equal(trained(NOISE), trained(KeyedNoiseSource(0)))
    assert torch.equal(trained(secret), trained(secret))
    different = [
        trained(noise) for noise in (NOISE, KeyedNoiseSource(1), secret, SecretNoiseSource())
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
