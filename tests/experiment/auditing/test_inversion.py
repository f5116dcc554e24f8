"""Gradient inversion: exact reconstruction for linear models, descent, labels, similarity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hetero_fl.experiment import PreparedRun, prepare
from hetero_fl.experiment.auditing.inversion import (
    Inverter,
    first_layer_input,
    invert,
    match_order,
    observe_upload,
    psnr,
    read_labels,
    reason_not_invertible,
    ssim,
)
from tests.support.federations import config


def quiet(line: str) -> None:
    pass


def test_linear_models_reveal_the_image_exactly() -> None:
    for model in ("linear", "mlp"):
        prepared = prepare(config(models=model))
        step = next(
            invert({"as trained": (prepared, None)}, "site_1", images=1, batch=1, seed=0, log=quiet)
        )
        assert step.rows[1]["label"] == "read"
        assert step.rows[0]["psnr"] < 20
        assert step.rows[1]["psnr"] > 60
        assert torch.allclose(step.found["as trained"], step.true, atol=2e-3)


def observed(
    prepared: PreparedRun, rows: torch.Tensor, protect: Any = None
) -> tuple[Inverter, torch.Tensor]:
    """Return an inverter of an upload of `site_1`, and the true images."""
    view = prepared.federation.client_infos["site_1"].preprocess
    data = prepared.data.columns("site_1", "train", view)
    found = observe_upload(prepared, "site_1", rows, protect)
    return Inverter(found, data["y"][rows], lambda pixels: pixels), data["x"][rows]


def test_upload_of_one_step_is_the_gradient() -> None:
    prepared = prepare(config(models="cnn_gn_small"))
    client_info, rows = prepared.federation.client_infos["site_1"], torch.tensor([4, 9])
    found = observe_upload(prepared, "site_1", rows)
    data = prepared.data.columns("site_1", "train", client_info.preprocess)
    module = client_info.arch.build()
    module.load_state_dict(prepared.federation.initial_tensors(client_info.arch))
    torch.nn.functional.cross_entropy(module(data["x"][rows]).logits, data["y"][rows]).backward()
    assert found.gradient.keys() == dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(found.gradient[name], parameter.grad, atol=1e-5), name


def test_distance_is_zero_at_the_true_images() -> None:
    # The loss of hybrid depends on the client's label frequencies.
    for source in (config(models="cnn_gn_small"), config("hybrid", models="mlp")):
        inverter, true = observed(prepare(source), torch.tensor([4, 9]))

        assert float(inverter.distance(true)) == pytest.approx(0, abs=1e-5)
        assert float(inverter.distance(true.flip(-1))) > 0.01


def test_descent_improves_on_the_start() -> None:
    prepared = prepare(config(models="fedavg_cnn"))
    row = torch.tensor([2])
    found = observe_upload(prepared, "site_1", row)
    inverter, true = observed(prepared, row)
    label = read_labels(found, "multiclass")
    assert label is not None and torch.equal(label, inverter.labels)
    assert first_layer_input(inverter.module, found.gradient) is None
    start = torch.rand(true.shape, generator=torch.Generator().manual_seed(0))
    image = inverter.descend(start, steps=150)
    assert float(inverter.distance(image)) < float(inverter.distance(start)) / 10
    assert psnr(image, true) > psnr(start, true) + 3


def test_noise_on_the_update_prevents_inversion() -> None:
    prepared = prepare(config(models="mlp"))

    def noisy(update: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        draws = torch.Generator().manual_seed(0)
        return {n: t + 0.02 * torch.randn(t.shape, generator=draws) for n, t in update.items()}

    quality = {}
    for name, protect in {"plain": None, "noisy": noisy}.items():
        inverter, true = observed(prepared, torch.tensor([0]), protect)
        image, distance = inverter.invert_from_starts((1, 8, 8), "test", steps=40)
        assert distance == pytest.approx(float(inverter.distance(image)), abs=1e-6)
        quality[name] = psnr(image, true)
    assert quality["plain"] > 60
    assert quality["noisy"] < 12


def test_reason_not_invertible_names_the_missing_parameters() -> None:
    prepared = prepare(config("fedmd"))
    assert (
        reason_not_invertible(prepared, "site_1")
        == "fedmd: 'site_1' uploads no model parameters, so there is no gradient to invert"
    )
    assert reason_not_invertible(prepare(config("local")), "site_1") is not None
    assert reason_not_invertible(prepare(config("fedper")), "site_1") is None


def test_labels_cannot_be_read_without_the_head() -> None:
    found = observe_upload(prepare(config("fedper", models="mlp")), "site_1", torch.tensor([0]))
    assert all(n.startswith("backbone.") for n in found.gradient)
    assert read_labels(found, "multiclass") is None


def test_ssim_is_the_mean_over_windows() -> None:
    a, b = np.random.default_rng(0).random((2, 9, 10))
    found = []
    for i in range(3):
        for j in range(4):
            p, q = (x[i : i + 7, j : j + 7].ravel() for x in (a, b))
            (vp, both), (_, vq) = np.cov(p, q)
            shape = (2 * both + 0.03**2) / (vp + vq + 0.03**2)
            found.append(
                (2 * p.mean() * q.mean() + 0.01**2)
                / (p.mean() ** 2 + q.mean() ** 2 + 0.01**2)
                * shape
            )
    assert ssim(torch.tensor(a)[None], torch.tensor(b)[None]) == pytest.approx(np.mean(found))


def test_psnr_ssim_and_match_order_of_known_images() -> None:
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert ssim(images[0], images[0]) == pytest.approx(1)
    assert psnr(images[0], images[0] + 0.1) == pytest.approx(20, abs=1e-4)
    assert torch.equal(match_order(images[[2, 0, 1]], images), images)
