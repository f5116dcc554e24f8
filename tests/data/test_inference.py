"""Inputs of saved models with columns or blocks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from hetero_fl.config.clients import PreprocessConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import Block, ColumnLayout, Preprocess
from hetero_fl.data.inference import preprocess_inputs
from tests.support.cases import each_case
from tests.support.mistakes import check_refused

LAYOUT = ColumnLayout(blocks=(Block("image", (1, 4, 4)), Block("genes", (3,))))
NAN = float("nan")


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
