"""Untrained saved models of every family, each with different preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Block

BLOCKS = (Block("image", (1, 12, 12)), Block("genes", (6,)))
COLUMNS = ("age", "weight", "pulse", "lactate", "sodium", "glucose", "urea")
SCALE: dict[str, Any] = {"mean": (1.0, 20.0, -3.0), "std": (1.0, 2.0, 9.0)}
# Weight, pulse, glucose.
SPANS = ((1, 3), (5, 6))


def saved(
    name: str,
    shape: tuple[int, ...],
    view: dict[str, Any] | None = None,
    kind: Any = "multiclass",
    prior: bool = False,
    columns: tuple[str, ...] = (),
    vocabulary: int | None = None,
    **options: Any,
) -> SavedModel:
    """Return a model with four outputs."""
    arch = ModelSpec.from_config(name, 4, shape, None, options, vocabulary=vocabulary)
    tensors = arch.initial_tensors(3)
    # BatchNorm statistics that change the output.
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            generator = torch.Generator().manual_seed(len(tensor))
            tensor.add_(torch.rand(tensor.shape, generator=generator) / 2)
    return SavedModel(
        tensors,
        arch,
        view or {},
        Task(kind, 4),
        (-1.0, -2.5, -0.2, -4.0) if prior else None,
        columns=columns,
    )


def image_cases() -> dict[str, Callable[[], SavedModel]]:
    """Return builders of models for images, one from timm, with every image preprocessing."""
    colours = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.4, 0.3)}
    return {
        "cnn_bn": partial(saved, "cnn", (1, 12, 12), {"mean": 0.4, "std": 0.2}, width=4),
        "cnn_gn_resized": partial(
            saved, "cnn", (1, 12, 12), {"resize": 12}, prior=True, width=4, norm="group"
        ),
        "lenet_of_colours": partial(
            saved, "lenet", (1, 14, 14), {"channels": 1, "resize": 14, "mean": 0.5, "std": 0.3}
        ),
        "resnet_of_grey": partial(
            saved, "resnet", (3, 12, 12), {"channels": 3, **colours}, widths=(4, 8), blocks=(1, 1)
        ),
        "vit": partial(saved, "vit", (1, 12, 12), depth=1, width=16),
        "rows_of_an_image": partial(saved, "gru", (1, 12, 10), hidden=8),
        "timm": partial(saved, "timm:resnet10t", (3, 32, 32)),
    }


def other_cases() -> dict[str, Callable[[], SavedModel]]:
    """Return builders of models for tables, series, text and blocks, with and without gaps."""
    raw = {"raw": (7,), "spans": SPANS, **SCALE}
    steps = {"raw": (20, 3), "missing": "indicate", **SCALE}
    both = {"raw": (150,), "blocks": BLOCKS}
    return {
        "mlp_of_columns": partial(
            saved, "mlp", (3,), raw, "regression", columns=COLUMNS, hidden=(8,), norm="batch"
        ),
        "tabular_with_gaps": partial(
            saved,
            "tabular",
            (6,),
            raw | {"missing": "indicate"},
            "multilabel",
            columns=COLUMNS,
            width=8,
        ),
        "wide_deep": partial(saved, "wide_deep", (5,), prior=True, hidden=(8,)),
        "ft_transformer": partial(saved, "ft_transformer", (5,), width=8, heads=2),
        "lstm": partial(saved, "lstm", (3, 20), SCALE, hidden=8),
        "cnn1d_with_gaps": partial(saved, "cnn1d", (6, 20), steps, width=8),
        "transformer": partial(saved, "transformer", (3, 20), width=8, heads=2),
        "text_gru": partial(saved, "text_gru", (9,), vocabulary=30),
        "text_cnn": partial(saved, "text_cnn", (9,), vocabulary=30, width=8),
        "text_transformer": partial(
            saved, "text_transformer", (9,), vocabulary=30, width=8, heads=2
        ),
        "multimodal_with_gaps": partial(
            saved, "multimodal", (152,), both | {"missing": "indicate"}, blocks=BLOCKS, width=8
        ),
        "multimodal": partial(
            saved, "multimodal", (150,), both, blocks=BLOCKS, fusion="gated", width=8
        ),
        "one_block": partial(
            saved, "cnn", (1, 12, 12), both | {"spans": ((0, 144),), "blocks": BLOCKS[:1]}, width=4
        ),
        "one_block_of_numbers": partial(
            saved, "mlp", (6,), both | {"spans": ((144, 150),), "blocks": BLOCKS[1:]}, hidden=(8,)
        ),
    }


CASES = {**image_cases(), **other_cases()}


@cache
def case(name: str) -> SavedModel:
    """Return a model, which is built when the first test needs it."""
    return CASES[name]()
