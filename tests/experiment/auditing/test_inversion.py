"""Gradient inversion: exact reconstruction for linear models, descent, labels, similarity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hetero_fl.experiment import PreparedRun, prepare
from hetero_fl.experiment.auditing.inversion import (
    ObservedUpload,
    descend,
    first_layer_input,
    invert,
    observe_upload,
    psnr,
    read_label,
    reconstruct,
    ssim,
)
from tests.support.federations import config


def quiet(line: str) -> None:
    pass


def test_linear_models_reveal_the_image_exactly() -> None:
    for model in ("linear", "mlp"):
        prepared = prepare(config(models=model))
        (blind, attack), (picture,) = invert(
            {"as trained": (prepared, None)}, "site_1", images=1, seed=0, log=quiet
        )
        images = picture["images"]
        assert attack["label"] == "read"
        assert blind["psnr"] < 20
        assert attack["psnr"] > 60
        assert torch.allclose(images["as trained"], images["original"], atol=2e-3)


def observed(
    prepared: PreparedRun, row: torch.Tensor, protect: Any = None
) -> tuple[ObservedUpload, torch.Tensor, torch.Tensor]:
    """Return an upload of `site_1`, and the true image and label."""
    view = prepared.federation.client_infos["site_1"].preprocess
    data = prepared.data.columns("site_1", "train", view)
    return observe_upload(prepared, "site_1", row, protect), data["x"][row], data["y"][row]


def test_distance_is_zero_at_the_true_image() -> None:
    # The loss of hybrid depends on the client's label frequencies.
    for source in (config(models="cnn_gn_small"), config("hybrid", models="mlp")):
        upload, true, y = observed(prepare(source), torch.tensor([4]))

        assert float(upload.distance(true, y)) == pytest.approx(0, abs=1e-5)
        assert float(upload.distance(true.flip(-1), y)) > 0.01


def test_descent_improves_on_the_start() -> None:
    prepared = prepare(config(models="fedavg_cnn"))
    upload, true, y = observed(prepared, torch.tensor([2]))
    label = read_label(upload, prepared.data.task)
    assert label is not None and torch.equal(label, y)
    assert first_layer_input(upload) is None
    start = torch.rand(true.shape, generator=torch.Generator().manual_seed(0))
    image = descend(lambda pixels, create: upload.distance(pixels, y, create), start, steps=150)
    assert float(upload.distance(image, y)) < float(upload.distance(start, y)) / 10
    assert psnr(image, true) > psnr(start, true) + 3


def test_noise_on_the_update_prevents_inversion() -> None:
    prepared = prepare(config(models="mlp"))

    def noisy(update: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        draws = torch.Generator().manual_seed(0)
        return {n: t + 0.02 * torch.randn(t.shape, generator=draws) for n, t in update.items()}

    quality = {}
    for name, protect in {"plain": None, "noisy": noisy}.items():
        upload, true, y = observed(prepared, torch.tensor([0]), protect)
        pixel_range = (torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))
        image, distance = reconstruct(upload, y, pixel_range, "test", steps=40)
        assert distance == pytest.approx(float(upload.distance(image, y)), abs=1e-6)
        quality[name] = psnr(image, true)
    assert quality["plain"] > 60
    assert quality["noisy"] < 12


def test_label_cannot_be_read_without_the_head() -> None:
    prepared = prepare(config("fedper", models="mlp"))
    found = observe_upload(prepared, "site_1", torch.tensor([0]))
    assert all(n.startswith("backbone.") for n in found.gradient)
    assert read_label(found, prepared.data.task) is None


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


def test_psnr_and_ssim_of_known_images() -> None:
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert ssim(image, image) == pytest.approx(1)
    assert psnr(image, image + 0.1) == pytest.approx(20, abs=1e-4)
