"""Scanner, preprocessing and augmentation of images and columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from hetero_fl.config.clients import AugmentConfig, Normalize, PreprocessConfig, ScannerConfig
from hetero_fl.data import Preprocess, apply_scanner, augment
from hetero_fl.utils.seeding import keyed_generator


def images(rows: int = 5, channels: int = 1, height: int = 12, width: int = 10) -> torch.Tensor:
    return torch.randint(
        0,
        256,
        (rows, channels, height, width),
        generator=keyed_generator("images"),
        dtype=torch.uint8,
    )


def scan(x: torch.Tensor, key: str = "noise", **config: Any) -> torch.Tensor:
    return apply_scanner(x, ScannerConfig(**config), keyed_generator(key))


class TestScanner:
    def test_plain_settings_and_no_rows_are_accepted(self) -> None:
        x = images()
        floats = x.float()
        assert torch.equal(scan(x), x)
        assert augment(floats, AugmentConfig(), keyed_generator("a")) is floats
        assert scan(images(0), blur=1, noise=1, resolution=0.5).shape == (0, 1, 12, 10)

    def test_each_part_keeps_shape_and_dtype_and_input(self, subtests: pytest.Subtests) -> None:
        for config in (
            {"contrast": 0.5},
            {"brightness": 0.1},
            {"blur": 1},
            {"noise": 0.1},
            {"resolution": 0.5},
        ):
            with subtests.test(config=config):
                for x in (images(channels=3), images().float() / 255, images().double() / 255):
                    before = x.clone()
                    seen = scan(x, **config)
                    assert (
                        seen.shape == x.shape and seen.dtype == x.dtype and not torch.equal(seen, x)
                    )
                    assert torch.equal(x, before)

    def test_contrast_and_brightness_match_formulas(self) -> None:
        x = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).view(1, 1, 2, 2)
        assert scan(x, contrast=0.5).flatten().tolist() == [64, 114, 164, 191]
        assert scan(x, brightness=0.2).flatten().tolist() == [51, 151, 251, 255]

    def test_blur_matches_scipy(self) -> None:
        x = images().double() / 255
        expected = gaussian_filter(x[0, 0].numpy(), sigma=0.8, mode="nearest", truncate=3 / 0.8)
        assert np.allclose(scan(x, blur=0.8)[0, 0].numpy(), expected, atol=1e-6)

    def test_resolution_loses_detail_and_keeps_the_mean(self) -> None:
        checks = (
            (torch.arange(16)[:, None] + torch.arange(16))
            .remainder(2)
            .double()
            .expand(1, 1, 16, 16)
        )
        seen = scan(checks, resolution=0.5)
        assert seen.std() < 0.1 * checks.std() and abs(seen.mean() - 0.5) < 1e-6
        line = torch.zeros(1, 1, 16, 16)
        line[..., 4] = 1
        # averaged over what it falls into, not skipped
        assert scan(line, resolution=0.25).max() > 0.1

    def test_noise_is_keyed_and_has_the_configured_strength(self) -> None:
        x = torch.full((600, 1, 12, 10), 0.5)
        seen = scan(x, noise=0.1)
        assert abs(seen.std() - 0.1) < 0.002 and abs(seen.mean() - 0.5) < 0.002
        assert torch.equal(seen, scan(x, noise=0.1)) and not torch.equal(
            seen, scan(x, "other", noise=0.1)
        )
        assert not torch.equal(seen[0], seen[-1])

    def test_global_generator_is_unchanged(self) -> None:
        before = torch.random.get_rng_state()
        scan(images(), noise=0.1, blur=1)
        augment(images().float(), AugmentConfig(crop=2, flip=True, rotate=10), keyed_generator("a"))
        assert torch.equal(before, torch.random.get_rng_state())


class TestPreprocess:
    def test_default_preprocessing_only_scales(self) -> None:
        x = images()
        assert torch.equal(Preprocess()(x), x.float() / 255)
        table = torch.randn(4, 3)
        assert torch.equal(Preprocess()(table), table)

    def test_resize_precedes_channels_and_normalization(self) -> None:
        x = images(channels=3)
        view = Preprocess.resolve(
            PreprocessConfig(resize=8, channels=1, normalize=Normalize(mean=0.4, std=0.2))
        )
        scaled = F.interpolate(x.float() / 255, size=(8, 8), mode="bilinear", align_corners=False)
        assert torch.allclose(view(x), (scaled.mean(1, keepdim=True) - 0.4) / 0.2, atol=1e-6)
        assert view.shape((3, 12, 10)) == (1, 8, 8) == tuple(view(x).shape[1:])
        assert view(images(0, 3)).shape == (0, 1, 8, 8)

    def test_grayscale_becomes_rgb(self) -> None:
        seen = Preprocess(channels=3)(images())
        assert seen.shape == (5, 3, 12, 10) and torch.equal(seen[:, 0], seen[:, 2])

    def test_client_statistics_normalize_images(self) -> None:
        x = images(9, 3)
        view = Preprocess.resolve(PreprocessConfig(normalize="own"), x)
        seen = view(x)
        assert abs(seen.mean()) < 1e-5 and abs(seen.std(correction=0) - 1) < 1e-5
        assert isinstance(view.mean, float) and hash(view) == hash(
            Preprocess(None, None, view.mean, view.std)
        )

    def test_client_statistics_normalize_columns(self) -> None:
        x = torch.randn(50, 3, generator=keyed_generator("t")) * torch.tensor(
            [1.0, 1e-3, 0.0]
        ) + torch.tensor([0.0, 1e3, 7.0])
        view = Preprocess.resolve(PreprocessConfig(normalize="own"), x)
        seen = view(x)
        assert seen.mean(0).abs().max() < 0.2 and seen[:, 2].abs().max() == 0
        assert isinstance(view.std, tuple) and view.std[2] == 1.0
        series = torch.randn(20, 6, 3)
        own = Preprocess.resolve(PreprocessConfig(normalize="own"), series)
        assert (
            isinstance(own.mean, tuple) and len(own.mean) == 3 and own(series).shape == (20, 3, 6)
        )
        assert own(series).mean((0, 2)).abs().max() < 1e-5

    def test_series_columns_become_channels(self) -> None:
        series = torch.randn(20, 6, 3)
        seen = Preprocess()(series)
        assert tuple(seen.shape[1:]) == Preprocess().shape((6, 3)) == (3, 6)
        assert torch.equal(seen[4, 2], series[4, :, 2])

    def test_mean_and_std_may_be_given_per_channel(self) -> None:
        config = PreprocessConfig(normalize=Normalize(mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0]))
        x, view = images(channels=3), Preprocess.resolve(config)
        plain = x.float() / 255
        for c in range(3):
            assert torch.equal(view(x)[:, c], (plain[:, c] - view.mean[c]) / view.std[c])  # type: ignore[index]
        assert hash(view) == hash(Preprocess.resolve(config)) and view.shape((3, 12, 10)) == (
            3,
            12,
            10,
        )
        columns = Preprocess.resolve(
            PreprocessConfig(normalize=Normalize(mean=[1.0, 2.0], std=1.0))
        )
        assert torch.equal(columns(torch.tensor([[1.0, 2.0]])), torch.zeros(1, 2))

    def test_output_follows_the_default_dtype(self) -> None:
        torch.set_default_dtype(torch.float64)
        try:
            assert Preprocess(mean=0.5, std=0.25)(images()).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


class TestAugment:
    def test_augment_is_keyed_and_not_in_place(self, subtests: pytest.Subtests) -> None:
        for config in (
            {"crop": 2},
            {"flip": True},
            {"rotate": 20.0},
            {"crop": 1, "flip": True, "rotate": 5.0},
        ):
            with subtests.test(config=config):
                x = images(20, 3).float()
                before = x.clone()
                first, again, other = (
                    augment(x, AugmentConfig(**config), keyed_generator(key)) for key in "aab"
                )
                assert (
                    torch.equal(first, again)
                    and not torch.equal(first, other)
                    and not torch.equal(first, x)
                )
                assert torch.equal(x, before) and first.shape == x.shape

    def test_flip_mirrors_entire_images(self) -> None:
        x = images(200).float()
        seen = augment(x, AugmentConfig(flip=True), keyed_generator("a"))
        same = (seen == x).flatten(1).all(1)
        mirrored = (seen == x.flip(-1)).flatten(1).all(1)
        assert (same ^ mirrored).all() and 60 < same.sum() < 140

    def test_crop_equals_pad_and_crop(self) -> None:
        x = images(300).float()
        seen = augment(x, AugmentConfig(crop=2), keyed_generator("a"))
        padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
        windows = torch.stack(
            [padded[:, :, i : i + 12, j : j + 10] for i in range(5) for j in range(5)]
        )
        hits = (windows == seen).flatten(2).all(2)  # [25, 300]
        # every image is one of the windows, every window occurs
        assert hits.any(0).all() and hits.any(1).all()

    def test_rotation_turns_about_the_middle(self) -> None:
        x = torch.zeros(40, 1, 21, 31)
        x[:, :, 10, 15:26] = 1  # a ray from the middle
        seen = augment(x, AugmentConfig(rotate=90), keyed_generator("a"))
        rows, columns = torch.meshgrid(
            torch.arange(21.0) - 10, torch.arange(31.0) - 15, indexing="ij"
        )
        mass = seen[:, 0] * (rows**2 + columns**2 <= 100)
        middle = torch.stack(
            [(mass * axis).sum((1, 2)) / mass.sum((1, 2)) for axis in (rows, columns)], dim=1
        )
        assert (middle.norm(dim=1) - 5).abs().max() < 0.5  # lengths stay, though the sides differ
        angle = torch.atan2(middle[:, 0], middle[:, 1]).rad2deg()
        assert angle.abs().max() <= 91 and angle.min() < -45 and angle.max() > 45

    def test_small_rotation_keeps_flat_images(self) -> None:
        x = torch.full((3, 1, 9, 9), 0.7)
        assert torch.allclose(augment(x, AugmentConfig(rotate=30), keyed_generator("a")), x)
