"""Names, options and groups of models; tests/errors/model_zoo.yaml has the mistakes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from model_zoo import (
    check_options,
    create_model,
    group_models,
    list_groups,
    list_models,
    model_options,
)


def test_smallest_image_sizes_are_exact() -> None:
    for name, side, width in (("fedavg_cnn", 4, 512), ("cnn_bn_small", 4, 32), ("lenet", 12, 84)):
        assert create_model(name, 10, input_size=side).feature_dim == width


def test_options_have_defaults_and_are_checked_without_a_model() -> None:
    assert model_options("cnn") == {"width": 16, "norm": "batch", "dropout": 0.0, "scaler": 0.0}
    assert model_options("cnn_bn_small") == {"dropout": 0.0, "scaler": 0.0}
    assert model_options("mlp") == {"hidden": (128,), "dropout": 0.0, "scaler": 0.0, "norm": "none"}
    assert model_options("resnet20") == {"norm": "batch", "scaler": 0.0}
    assert model_options("resnet18") == model_options("linear") == {}
    assert model_options("timm:resnet10t") == {"drop_rate": None}
    check_options("cnn", {"width": 8, "norm": "group"})
    check_options("timm:resnet10t", {"drop_rate": None})


def test_list_models_filters_by_pattern() -> None:
    assert list_models() == sorted(list_models())
    assert list_models("cnn_bn_*") == ["cnn_bn_large", "cnn_bn_medium", "cnn_bn_small"]
    assert list_models("nothing*") == []
    assert {"linear", "mlp", "lenet", "fedavg_cnn", "resnet8", "resnet18", "gru", "vit"} <= set(
        list_models()
    )
    assert list_models("torchvision:resnet1*") == [
        "torchvision:resnet101",
        "torchvision:resnet152",
        "torchvision:resnet18",
    ]
    assert "timm:vit_tiny_patch16_224" in list_models("timm:vit_tiny*")
    assert all(name.startswith("timm:") for name in list_models("timm:*"))


def test_groups_resolve_to_models_that_exist() -> None:
    known = {*list_models(), *list_models("torchvision:*")}
    assert {"cnn_pair", "cnn_trio", "resnet_family", "small_mixed", "HtFE8"} <= set(list_groups())
    for group in list_groups():
        models = group_models(group)
        assert len(set(models)) == len(models) >= 2
        assert set(models) <= known, group
    for group, number in (
        ("HtFE2", 2),
        ("HtFE3", 3),
        ("HtFE4", 4),
        ("HtFE5", 5),
        ("HtFE8", 8),
        ("HtFE9", 9),
        ("HtM10", 10),
    ):
        assert len(group_models(group)) == number
    group_models("cnn_pair").append("mlp")
    assert group_models("cnn_pair") == ["cnn_bn_small", "cnn_bn_medium"]


def test_small_groups_can_be_built_with_a_common_width() -> None:
    groups = ("cnn_pair", "cnn_trio", "resnet_family", "small_mixed", "HtFE2", "HtFE4")
    names = {name for group in groups for name in group_models(group)}
    for name in sorted(names):
        assert create_model(name, 3, feature_dim=48).feature_dim == 48, name


@pytest.mark.slow
def test_import_does_not_load_optional_packages() -> None:
    code = (
        "import sys, model_zoo; "
        "model_zoo.create_model('cnn_bn_small', 10); model_zoo.list_models();"
        "print([m for m in ('timm', 'torchvision', 'hetero_fl', 'rich') if m in sys.modules])"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert completed.stdout.strip() == "[]"
