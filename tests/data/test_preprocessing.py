"""Preprocessing of images, columns, blocks and missing values, and inputs of saved models."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.config.clients import (
    AugmentConfig,
    ClientSettings,
    Normalize,
    PreprocessConfig,
    ScannerConfig,
)
from hetero_fl.config.data import DataConfig, PartitionConfig, ProxyConfig, SourceConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import (
    Block,
    ColumnLayout,
    Dataset,
    Examples,
    FederatedData,
    Preprocess,
    apply_scanner,
    augment,
    federate,
    from_arrays,
    load_source,
)
from hetero_fl.data.external import match_inputs
from hetero_fl.data.inference import preprocess_inputs
from hetero_fl.utils.seeding import keyed_generator
from hetero_fl.utils.text import Caution
from tests.support.cases import each_case
from tests.support.mistakes import check_refused


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


NAN = float("nan")
TABLE = ColumnLayout(("age", "crp", "bmi", "dose"))
BLOCKS = ColumnLayout(blocks=(Block("image", (1, 2, 3)), Block("genes", (4,))))


def table() -> Tensor:
    x = torch.randn(20, 4, generator=keyed_generator("t"))
    x[3, 1] = x[5, 1] = x[7, 2] = NAN
    return x


def rows() -> Tensor:
    """Return six pixels and four genes; rows 2, 4 and 5 lack genes, the image and one gene."""
    x = torch.rand(12, 10, generator=keyed_generator("b"))
    x[2, 6:] = NAN
    x[4, :6] = NAN
    x[5, 7] = NAN
    return x


def view(x: Tensor, layout: ColumnLayout, **config: Any) -> Preprocess:
    return Preprocess.resolve(
        PreprocessConfig(**config), x, "preprocess", layout, tuple(x.shape[1:])
    )


def test_columns_are_taken_in_the_order_of_the_data() -> None:
    x = table()
    seen = view(x, TABLE, columns=["dose", "age"])
    assert seen.spans == ((0, 1), (3, 4)) and seen.shape((4,)) == (2,)
    assert torch.equal(seen(x), x[:, [0, 3]]) and seen == view(x, TABLE, columns=["age", "dose"])
    assert view(x, TABLE, columns=["crp", "bmi"]).spans == (
        (1, 3),
    )  # adjacent columns are one span
    series = torch.randn(5, 6, 4)
    assert torch.equal(
        view(series, TABLE, columns=["bmi"])(series), series[..., 2:3].transpose(1, 2)
    )
    assert view(series, TABLE, columns=["bmi"]).shape((6, 4)) == (1, 6)


def test_client_statistics_cover_used_columns_and_ignore_missing_values() -> None:
    x = table()
    seen = view(x, TABLE, columns=["crp", "dose"], normalize="own", missing="indicate")
    known = x[:, 1][~x[:, 1].isnan()].double()
    assert isinstance(seen.mean, tuple) and isinstance(seen.std, tuple)
    assert seen.mean[0] == pytest.approx(float(known.mean())) and seen.std[0] == pytest.approx(
        float(known.std(correction=0))
    )
    z = seen(x)
    assert z.shape == (20, 4) and seen.shape((4,)) == (4,)
    assert z[:, 2].nonzero().flatten().tolist() == [3, 5] and not z[:, 3].any()
    assert z[3, 0] == z[5, 0] == 0 and torch.allclose(
        z[0, 0], ((x[0, 1] - seen.mean[0]) / seen.std[0]).float()
    )
    empty = view(torch.full((4, 4), NAN), TABLE, normalize="own", missing="indicate")
    assert empty.mean == (0.0,) * 4 and empty.std == (1.0,) * 4


def test_single_block_keeps_its_shape() -> None:
    x = rows()[6:]
    image = view(x, BLOCKS, columns=["image"], normalize="own")
    assert image.shape((10,)) == (1, 2, 3) and isinstance(image.mean, float)
    assert torch.allclose(image(x).mean(), torch.tensor(0.0), atol=1e-6)
    assert torch.equal(view(x, BLOCKS, columns=["image"])(x), x[:, :6].reshape(-1, 1, 2, 3))
    assert view(x, BLOCKS, columns=["image"], resize=8, channels=3)(x).shape == (6, 3, 8, 8)
    genes = view(x, BLOCKS, columns=["genes"], normalize="own")
    assert torch.allclose(genes(x).mean(0), torch.zeros(4), atol=1e-6) and genes.shape((10,)) == (
        4,
    )


def test_blocks_are_missing_entirely() -> None:
    x = rows()
    seen = view(x, BLOCKS, normalize="own", missing="indicate")
    z = seen(x)
    assert z.shape == (12, 12) and seen.shape((10,)) == (12,) and not z.isnan().any()
    assert z[:, 10].nonzero().flatten().tolist() == [4] and z[
        :, 11
    ].nonzero().flatten().tolist() == [2]
    # one missing gene is imputed; the block is present
    assert not z[2, 6:10].any() and z[5, 7] == 0 and z[5, 6] != 0
    assert (
        isinstance(seen.mean, tuple)
        and len(set(seen.mean[:6])) == 1
        and len(set(seen.mean[6:])) == 4
    )  # pixels share theirs
    pixels = x[:, :6][~x[:, :6].isnan()].double()
    assert seen.mean[0] == pytest.approx(float(pixels.mean())) and isinstance(seen.std, tuple)
    assert seen.std[0] == pytest.approx(float(pixels.std(correction=0)))
    single = view(x, BLOCKS, columns=["genes"], missing="indicate")
    assert single(x).shape == (12, 5) and single(x)[:, 4].nonzero().flatten().tolist() == [2]


def test_columns_may_occur_once() -> None:
    with pytest.raises(ValueError, match="each entry may occur once"):
        PreprocessConfig(columns=["a", "a"])


def hospitals(
    x: Tensor, layout: ColumnLayout, clients: dict[str, PreprocessConfig], **config: Any
) -> FederatedData:
    """Assign rows to clients in turn, with a complete test set."""
    names = list(clients)
    y = torch.arange(len(x)) % 2
    x = x.repeat(6, 1)
    group = [names[i % len(names)] for i in range(len(x))]
    full = torch.rand(20, x.shape[1], generator=keyed_generator("full"))
    dataset = from_arrays(
        x,
        y.repeat(6),
        test=(full, torch.arange(20) % 2),
        validation=(full, torch.arange(20) % 2),
        group=group,
        columns=layout.columns,
        blocks=layout.blocks,
    )
    settings = {name: ClientSettings(preprocess=p) for name, p in clients.items()}
    kind = PartitionConfig(kind="natural", min_size=5)
    return federate(dataset, DataConfig(**{"partition": kind, **config}), settings, 0)


def test_missing_values_require_a_setting() -> None:
    both, images = PreprocessConfig(missing="indicate"), PreprocessConfig(columns=["image"])
    x = rows()
    # the second hospital's patients have no genes, and row 4 of the first no image
    x[1::2, 6:] = NAN
    data = hospitals(x, BLOCKS, {"a": both, "b": images})
    assert data.columns("b", "train", data.preprocess("b"))["x"].shape[1:] == (1, 2, 3)
    assert data.columns("a", "train", data.preprocess("a"))["x"].shape[1:] == (12,)
    pooled = data.columns("server", "pooled", data.preprocess("b"))["x"]
    assert not pooled.isnan().any() and len(pooled) == int(
        (~x[:, 0].isnan()).repeat(6)[_train(data)].sum()
    )
    check_refused(
        r"clients: 'b': preprocess\.missing: arrays: row \d+ has "
        r"no value in column 'genes'; set clients\.defaults\.preprocess\.missing=indicate, or ",
        hospitals,
        x,
        BLOCKS,
        {"a": both, "b": PreprocessConfig()},
    )
    check_refused(
        r"clients: 'a': preprocess\.missing: arrays: row \d+ has no value in column 'image'",
        hospitals,
        x,
        BLOCKS,
        {"a": images, "b": images},
    )


def _train(data: FederatedData) -> Tensor:
    return torch.cat([data.client_rows[c]["train"].rows for c in data.client_ids])


def test_public_rows_may_lack_blocks() -> None:
    both, images, genes = (
        PreprocessConfig(columns=c, missing=m)
        for c, m in ((None, "indicate"), (["image"], None), (["genes"], "indicate"))
    )
    x = torch.rand(30, 10, generator=keyed_generator("full"))
    clients = {"a": both, "b": images, "c": genes}
    data = hospitals(x, BLOCKS, clients, proxy=ProxyConfig(size=20, columns=["image"]))
    seen = {c: data.columns(c, "proxy", data.preprocess(c))["x"] for c in clients}
    assert seen["a"][:, 11].all() and not seen["a"][:, 10].any() and not seen["a"][:, 6:10].any()
    assert not seen["b"].isnan().any() and seen["c"][:, 4].all()
    assert [data.has_proxy(data.preprocess(c)) for c in clients] == [True, True, False]
    # All rows of a client are equal.
    assert [note for note in data.notes if not isinstance(note, Caution)] == [
        "client 'c' has none of the values of the proxy set and is excluded from training on it"
    ]
    check_refused(
        r"clients: 'a': preprocess\.missing: arrays: row \d+ has no value in column 'genes'",
        hospitals,
        x,
        BLOCKS,
        {**clients, "a": PreprocessConfig()},
        proxy=ProxyConfig(size=20, columns=["image"]),
    )
    check_refused(
        r"data\.proxy\.columns: unknown name 'images'; did you mean 'image'",
        hospitals,
        x,
        BLOCKS,
        clients,
        proxy=ProxyConfig(size=20, columns=["images"]),
    )


def test_external_sets_are_matched_by_name() -> None:
    common = from_arrays(
        torch.rand(6, 10), torch.arange(6) % 2, blocks=BLOCKS.blocks, name="common"
    )
    pixels = torch.randint(0, 256, (5, 1, 2, 3), dtype=torch.uint8)
    own = Dataset("own", common.task, Examples(pixels))
    seen = match_inputs(own, common, "here", needed=())
    assert torch.equal(seen[:, :6], pixels.flatten(1) / 255) and seen[:, 6:].isnan().all()
    swapped = ColumnLayout(blocks=BLOCKS.blocks[::-1])
    x = BLOCKS.match(torch.arange(10.0)[None], swapped, "here")
    assert x[0].tolist() == [4, 5, 6, 7, 8, 9, 0, 1, 2, 3]
    other = ColumnLayout(("bmi", "age", "new"))
    x = TABLE.match(torch.arange(3.0)[None], other, "here", needed={"age"}, may_have_more=True)
    assert x[0, [0, 2]].tolist() == [1, 0] and x[0, [1, 3]].isnan().all()
    wards = ColumnLayout(("age", "ward=A", "ward=B"), categories=(("ward", ("A", "B")),))
    own = ColumnLayout(("ward=B", "age"), categories=(("ward", ("B",)),))
    assert wards.match(torch.tensor([[1.0, 30.0]]), own, "here").tolist() == [[30, 0, 1]]


def test_table_with_missing_values_trains(tmp_path: Any) -> None:
    path = tmp_path / "t.csv"
    lines = [f"{i},{'' if i == 4 else i * 2},{i % 2}" for i in range(60)]
    path.write_text("\n".join(["age,crp,ill", *lines]))
    source = SourceConfig(name="table", path=str(path), label="ill")
    check_refused(
        r"row 5, column 'crp': missing value \(1 in 60 rows\); "
        r"fill or remove missing values, or set",
        load_source,
        source,
        tmp_path,
    )
    found = load_source(source, tmp_path, missing=True)
    config = DataConfig(partition=PartitionConfig(min_size=5))

    def federated(**view: Any) -> FederatedData:
        return federate(
            found, config, {"a": ClientSettings(preprocess=PreprocessConfig(**view))}, 0
        )

    assert (
        federated(missing="indicate")
        .columns("a", "train", federated(missing="indicate").preprocess("a"))["x"]
        .shape[1]
        == 4
    )
    assert federated(columns=["age"]).preprocess("a").shape((2,)) == (1,)
    check_refused(
        r"clients: 'a': preprocess\.missing: path: .*t\.csv: row 5 has "
        r"no value in column 'crp'",
        federated,
    )


def test_federate_keeps_block_layout() -> None:
    dataset = from_arrays(
        torch.rand(30, 10), torch.arange(30) % 2, blocks=[["image", [1, 2, 3]], ("genes", (4,))]
    )
    assert isinstance(dataset, Dataset) and dataset.layout == BLOCKS
    data = federate(
        dataset, DataConfig(partition=PartitionConfig(min_size=5)), {"a": ClientSettings()}, 0
    )
    assert data.layout == BLOCKS and data.input_shape == (10,)


LAYOUT = ColumnLayout(blocks=(Block("image", (1, 4, 4)), Block("genes", (3,))))


def saved(tmp_path: Any, **config: Any) -> SavedModel:
    """Return a saved model with named columns or blocks."""
    view = Preprocess.resolve(PreprocessConfig(**config), torch.rand(9, 19), "p", LAYOUT, (19,))
    arch = ModelSpec.from_config("linear", 2, view.shape((19,)))
    model = SavedModel(arch.initial_tensors(0), arch, asdict(view), Task("multiclass", 2))
    (tmp_path / "m.safetensors").write_bytes(model.encode())
    found = SavedModel.load(tmp_path / "m.safetensors")
    assert Preprocess(**found.preprocess) == view
    return found


def test_blocks_by_name_equal_full_rows(tmp_path: Any) -> None:
    model = saved(tmp_path, normalize="own", missing="indicate")
    images, genes = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8), torch.randn(3, 3)
    rows = torch.cat([images.flatten(1) / 255, genes], 1)
    assert torch.allclose(
        preprocess_inputs(model, {"genes": genes, "image": images}), preprocess_inputs(model, rows)
    )
    single = preprocess_inputs(model, {"image": images})
    assert single.shape == (3, 21) and single[:, 20].all() and not single[:, 19].any()
    for x, words in (
        ({"gene": genes}, "unknown block 'gene'; did you mean 'genes'"),
        ({"genes": genes, "image": images[:2]}, "image: expected 3 rows as in genes, got 2"),
        (
            images,
            r"expected shape \(N, 19\) as in the data set, got \(3, 1, 4, 4\)",
        ),
        (rows / 0, "row 0: NaN or infinite value"),
    ):
        check_refused(words, preprocess_inputs, model, x)


def test_image_blocks_are_scaled_like_image_sets(tmp_path: Any) -> None:
    blocks = ColumnLayout(blocks=(Block("image", (3, 4, 4)), Block("marks", (3,))))
    view = Preprocess.resolve(PreprocessConfig(missing="indicate"), None, "p", blocks, (51,))
    arch = ModelSpec.from_config("linear", 2, view.shape((51,)))
    model = SavedModel(arch.initial_tensors(0), arch, asdict(view), Task("multiclass", 2))
    images, marks = (
        torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8),
        torch.randint(0, 2, (5, 3)),
    )
    images[0, 0, 0, 0] = 255
    expected = preprocess_inputs(model, torch.cat([images.flatten(1) / 255, marks], 1))
    for same in (
        images,
        images.float(),
        images / 255,
        images.long(),
        images.movedim(1, -1),
        images.flatten(1),
    ):
        assert torch.allclose(
            preprocess_inputs(model, {"image": same, "marks": marks.to(torch.uint8)}), expected
        )
    lacking = images.float()
    lacking[2] = NAN
    seen = preprocess_inputs(model, {"image": lacking, "marks": marks})
    assert torch.allclose(seen[[0, 1, 3, 4]], expected[[0, 1, 3, 4]]) and seen[2, 51] == 1
    check_refused(
        "image: expected uint8 or floats from 0 to 1, got floats from",
        preprocess_inputs,
        model,
        {"image": images.float() - 128, "marks": marks},
    )


def test_single_block_accepts_image_dict_or_rows(tmp_path: Any) -> None:
    model = saved(tmp_path, columns=["image"], resize=6)
    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    rows = torch.cat([images.flatten(1) / 255, torch.full((3, 3), NAN)], 1)
    assert preprocess_inputs(model, images).shape == (3, 1, 6, 6)
    assert torch.allclose(
        preprocess_inputs(model, images), preprocess_inputs(model, rows), atol=1e-6
    )
    assert torch.allclose(
        preprocess_inputs(model, {"image": images}), preprocess_inputs(model, rows), atol=1e-6
    )
    rows[1, 2] = NAN
    check_refused("row 1: NaN or infinite value", preprocess_inputs, model, rows)


@each_case("x", ({}, {"image": torch.zeros(2, 1, 4, 4)}))
def test_dictionaries_are_for_models_with_blocks(x: Any) -> None:
    arch = ModelSpec.from_config("linear", 2, (1, 4, 4))
    model = SavedModel(arch.initial_tensors(0), arch, asdict(Preprocess()), Task("multiclass", 2))

    check_refused("got a dictionary; the model uses no blocks", preprocess_inputs, model, x)
