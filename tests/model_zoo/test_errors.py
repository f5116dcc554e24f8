"""Invalid models raise one line with the model, the value found and the nearest choice."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from model_zoo import (
    ModelError,
    check_options,
    create_model,
    group_models,
    list_groups,
    list_models,
    model_options,
)

WRONG: list[tuple[str, dict[str, Any], list[str]]] = [
    ("cnn_bn_smal", {}, ["cnn_bn_smal", "cnn_bn_small"]),
    ("ResNet18", {}, ["unknown model", "did you mean 'resnet18'"]),
    ("nothing-like-it", {}, ["unknown model; choose from model_zoo.list_models()"]),
    ("", {}, ["unknown model"]),
    ("tim:resnet18", {}, ["unknown prefix 'tim'", "'timm'"]),
    ("timm:resnet10x", {}, ["unknown image classifier of timm", "timm:resnet10t"]),
    ("torchvision:resnet181", {}, ["unknown image classifier", "torchvision:resnet18"]),
    ("torchvision:fasterrcnn_resnet50_fpn", {}, ["unknown image classifier"]),
    ("cnn", {"widht": 8}, ["unknown option 'widht'; did you mean 'width'?"]),
    ("cnn", {"zzzzz": 8}, ["unknown option 'zzzzz'; choose from width, norm, dropout"]),
    ("lenet", {"width": 8}, ["unknown option 'width'", "has no options"]),
    ("cnn_bn_small", {"width": 8}, ["unknown option 'width'", "choose from dropout"]),
    ("timm:resnet10t", {"dropout": 0.1}, ["unknown option 'dropout'", "drop_rate"]),
    ("torchvision:resnet18", {"dropout": 0.1}, ["dropout"]),
    ("torchvision:mobilenet_v2", {"dropout": 1.5}, ["option dropout", "1.5"]),
    ("cnn", {"width": 0}, ["option width: expected an integer >= 1, got 0"]),
    ("cnn", {"width": "wide"}, ["option width", "'wide'"]),
    ("cnn", {"width": True}, ["option width", "True"]),
    ("cnn", {"norm": "layer"}, ["option norm", "'layer'", "batch, group, none"]),
    ("resnet8", {"norm": "none"}, ["option norm", "batch, group"]),
    ("cnn", {"dropout": 1.0}, ["option dropout: expected a number in [0, 1), got 1.0"]),
    ("cnn", {"dropout": -0.1}, ["option dropout", "-0.1"]),
    ("cnn", {"dropout": "0.1"}, ["option dropout", "'0.1'"]),
    ("mlp", {"hidden": []}, ["option hidden", "[]"]),
    ("mlp", {"hidden": [10, 0]}, ["option hidden", "[10, 0]"]),
    ("mlp", {"hidden": "10"}, ["option hidden", "'10'"]),
    ("resnet", {"widths": [16, 32]}, ["option blocks: expected 2 stages as in widths, got 3"]),
    ("transformer", {"width": 30}, ["option heads", "4", "30"]),
    ("vit", {"patch": 5}, ["option patch", "got 5", "28x28", "nearest is 4"]),
    ("mlp", {"num_classes": 0}, ["num_classes", "got 0"]),
    ("mlp", {"num_classes": 2.5}, ["num_classes", "2.5"]),
    ("mlp", {"in_channels": 0}, ["in_channels", "got 0"]),
    ("mlp", {"input_size": 0}, ["input_size", "got 0"]),
    ("mlp", {"input_size": (28, 28, 28)}, ["input_size", "(28, 28, 28)"]),
    ("mlp", {"input_size": "28"}, ["input_size", "'28'"]),
    ("mlp", {"input_size": (28, -1)}, ["input_size", "(28, -1)"]),
    ("mlp", {"input_size": None}, ["input_size", "None"]),
    ("mlp", {"feature_dim": 0}, ["feature_dim", "got 0"]),
    ("mlp", {"feature_dim": "64"}, ["feature_dim", "'64'"]),
    ("cnn_bn_small", {"input_size": ()}, ["expected images", "table row"]),
    ("cnn_bn_small", {"input_size": (100,)}, ["expected images", "series of length 100"]),
    ("resnet18", {"input_size": ()}, ["expected images", "table row"]),
    ("timm:resnet10t", {"input_size": (9,)}, ["expected images", "series"]),
    ("cnn1d", {"pool": "first"}, ["option pool", "first", "both, mean, last"]),
    ("gru", {"input_size": ()}, ["expected series or images", "table row"]),
    ("tabular", {}, ["expected table rows", "28x28"]),
    ("lenet", {"input_size": 11}, ["at least 12x12", "11x11"]),
    ("lenet", {"input_size": (28, 11)}, ["at least 12x12", "28x11"]),
    ("fedavg_cnn", {"input_size": 3}, ["at least 4x4", "3x3"]),
    ("cnn_gn_large", {"input_size": 3}, ["at least 4x4", "3x3"]),
    ("torchvision:vit_b_16", {"input_size": (32, 48)}, ["square", "32x48"]),
    ("lenet", {"pretrained": True}, ["pretrained", "no published weights", "resnet18"]),
]


@pytest.mark.parametrize(("name", "arguments", "message"), WRONG)
def test_invalid_models_raise_one_line(
    name: str, arguments: dict[str, Any], message: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        create_model(name, **{"num_classes": 10, **arguments})
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"model {name}: ")
    assert text.count("model " + name) == 1
    for part in message:
        assert part in text, text


def test_name_must_be_a_string() -> None:
    with pytest.raises(ModelError, match=r"^model 3: expected a name$"):
        create_model(3, 10)


@pytest.mark.parametrize("size", [12, 13])
def test_lenet_accepts_its_smallest_image(size: int) -> None:
    assert create_model("lenet", 10, input_size=size).feature_dim == 84


def test_smallest_image_sizes_are_exact() -> None:
    for name in ("fedavg_cnn", "cnn_bn_small"):
        assert create_model(name, 10, input_size=4).feature_dim in (512, 32)


def test_options_are_keyword_only() -> None:
    assert model_options("cnn") == {"width": 16, "norm": "batch", "dropout": 0.0, "scaler": 0.0}
    assert model_options("cnn_bn_small") == {"dropout": 0.0, "scaler": 0.0}
    assert model_options("mlp") == {"hidden": (128,), "dropout": 0.0, "scaler": 0.0, "norm": "none"}
    assert model_options("resnet20") == {"norm": "batch", "scaler": 0.0}
    assert model_options("resnet18") == model_options("linear") == {}
    assert model_options("timm:resnet10t") == {"drop_rate": None}
    with pytest.raises(ModelError, match="did you mean 'mlp'"):
        model_options("mpl")


def test_options_are_checked_without_building_the_model() -> None:
    check_options("cnn", {"width": 8, "norm": "group"})
    check_options("timm:resnet10t", {"drop_rate": None})
    for name, options, message in (
        ("cnn", {"wdth": 8}, "unknown option 'wdth'"),
        ("cnn", {"width": -8}, "got -8"),
        ("timm:resnet10t", {"drop_rate": 2}, "got 2"),
        ("cnnn", {}, "unknown model"),
    ):
        with pytest.raises(ModelError, match=message):
            check_options(name, options)


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
    with pytest.raises(ModelError, match="unknown prefix 'python'; choose from torchvision, timm"):
        list_models("python:*")


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


def test_groups_cannot_be_changed_from_outside() -> None:
    group_models("cnn_pair").append("mlp")
    assert group_models("cnn_pair") == ["cnn_bn_small", "cnn_bn_medium"]


def test_unknown_group_suggests_nearest_group() -> None:
    with pytest.raises(ModelError, match=r"^group HtFE7: unknown group; did you mean 'HtFE"):
        group_models("HtFE7")


@pytest.mark.parametrize(
    "group", ["cnn_pair", "cnn_trio", "resnet_family", "small_mixed", "HtFE2", "HtFE4"]
)
def test_small_groups_can_be_built_with_a_common_width(group: str) -> None:
    assert {create_model(name, 3, feature_dim=48).feature_dim for name in group_models(group)} == {
        48
    }


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
