"""Image layouts and value ranges that users pass to data sources and `predict`, and resizing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetero_fl.core.images import channels_first, to_shape
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import Preprocess, from_arrays
from hetero_fl.data.inference import raw_examples
from hetero_fl.data.sources.npz_files import read_npz
from hetero_fl.utils.errors import UserError

Y = np.arange(6) % 2
BYTES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
BYTES[0, 0, 0] = 0, 100, 255


def test_images_are_returned_channels_first() -> None:
    for shape, documented, found in (
        ((5, 28, 28, 3), "first", (5, 3, 28, 28)),
        ((5, 3, 28, 28), "last", (5, 3, 28, 28)),
        ((5, 8, 8, 1), "first", (5, 1, 8, 8)),
        ((5, 28, 28, 4), "first", (5, 4, 28, 28)),
        ((5, 8, 6, 4), "first", (5, 8, 6, 4)),
        ((5, 8, 6, 4), "last", (5, 4, 8, 6)),
        ((5, 1, 3, 3), "last", (5, 1, 3, 3)),
        ((5, 3, 3, 1), "first", (5, 1, 3, 3)),
    ):
        assert channels_first(torch.zeros(shape), "x", documented).shape == found


def test_byte_images_in_any_dtype_are_equal(tmp_path: Path) -> None:
    front = np.moveaxis(BYTES, -1, 1)
    for x in (
        front,
        BYTES,
        BYTES.astype(float),
        front.astype(np.int64),
        torch.from_numpy(BYTES).float(),
    ):
        dataset = from_arrays(x, Y)
        assert dataset.train.x.dtype == torch.uint8 and np.array_equal(
            dataset.train.x.numpy(), front
        )
        np.savez(tmp_path / "x.npz", train_images=np.asarray(x), train_labels=Y)
        assert np.array_equal(read_npz(tmp_path / "x.npz", "npz").train.x.numpy(), front)
    notes = from_arrays(BYTES.astype(float), Y).notes
    assert [note.split(": ")[-1] for note in notes] == [
        "read as [rows, height, width, channels]",
        "floats from 0 to 255 are read as pixel values",
    ]
    assert from_arrays(front, Y).notes == ()


def test_float_images_are_scaled_to_unit_range(tmp_path: Path) -> None:
    unit = np.moveaxis(BYTES, -1, 1) / 255
    assert np.allclose(from_arrays(unit, Y).train.x, unit)
    # not integers; a dark test set is scaled like the other splits
    scaled = from_arrays(unit * 254.5, Y, test=(unit[:2] * 0.5, Y[:2]))
    assert scaled.test is not None and scaled.train.x.max() == pytest.approx(254.5 / 255)
    assert scaled.test.x.max() < 0.01
    np.savez(tmp_path / "x.npz", train_images=unit * 4, train_labels=Y)
    with pytest.raises(
        UserError,
        match=r"train_images: expected uint8 or .*, got floats from 0 to 4",
    ):
        read_npz(tmp_path / "x.npz", "npz")
    # tables are not images
    assert from_arrays(unit.reshape(6, -1) * 4000, Y).train.x.max() == pytest.approx(4000)


def saved(shape: tuple[int, ...], name: str = "mlp", **preprocess: object) -> SavedModel:
    arch = ModelSpec.from_config(name, 2, shape)
    return SavedModel(arch.initial_tensors(0), arch, dict(preprocess), Task("multiclass", 2))


def raw(model: SavedModel, x: Any) -> torch.Tensor:
    return raw_examples(model, x, Preprocess.of_model(model))


def test_predict_accepts_unambiguous_images() -> None:
    model, front = saved((3, 8, 8)), np.moveaxis(BYTES, -1, 1)
    for x in (
        front,
        BYTES,
        BYTES.tolist(),
        BYTES.astype(float),
        torch.from_numpy(front.copy()).long(),
    ):
        assert np.array_equal(raw(model, x).numpy(), front)
    assert raw(saved((1, 8, 8)), BYTES[..., 0]).shape == (6, 1, 8, 8)
    assert raw(saved((1, 3, 3)), np.zeros((5, 3, 3, 1))).shape == (5, 1, 3, 3)
    resized = saved((3, 32, 32), resize=32, channels=3)
    assert raw(resized, BYTES[..., :1]).shape == (6, 1, 8, 8)
    assert raw(saved((4,)), np.arange(8).reshape(2, 4)).dtype == torch.float32


def test_to_shape_converts_examples() -> None:
    x = torch.arange(32.0).reshape(2, 1, 4, 4)
    assert to_shape(x, (1, 4, 4)) is x
    assert torch.equal(to_shape(to_shape(x, (3, 4, 4)), (1, 4, 4)), x)
    assert to_shape(x, (3, 6, 2)).shape == (2, 3, 6, 2)
    stacked = torch.stack([x, 2 * x])
    assert torch.equal(
        torch.vmap(lambda one: to_shape(one, (3, 2, 2)))(stacked)[1], to_shape(2 * x, (3, 2, 2))
    )
