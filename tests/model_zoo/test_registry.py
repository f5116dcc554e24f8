"""Names, options, costs and widths of models; tests/errors/model_zoo.yaml has the mistakes."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from model_zoo import (
    can_narrow,
    check_options,
    create_model,
    describe,
    group_models,
    list_groups,
    list_models,
    model_options,
    narrow_options,
    share_of,
)
from model_zoo.__main__ import main
from model_zoo.description import format_count
from model_zoo.registry import MODELS
from tests.support.cases import each_case


def test_smallest_image_sizes_are_exact() -> None:
    for name, side, width in (("fedavg_cnn", 4, 512), ("cnn_bn_small", 4, 32), ("lenet", 12, 84)):
        assert create_model(name, 10, input_size=side).num_features == width


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
        assert create_model(name, 3, feature_dim=48).num_features == 48, name


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


def test_parameters_add_up() -> None:
    about = describe("cnn_bn_small", feature_dim=20)
    model = create_model("cnn_bn_small", 10, feature_dim=20)
    assert about.parameters == sum(p.numel() for p in model.parameters())
    assert about.parameters == about.backbone_parameters + about.head_parameters
    assert about.head_parameters == 20 * 10 + 10
    assert (about.name, about.feature_dim, about.has_batch_norm) == ("cnn_bn_small", 20, True)
    assert not describe("cnn_gn_small").has_batch_norm
    with pytest.raises(dataclasses.FrozenInstanceError):
        about.parameters = 0


FLOPS = [  # two for each multiply-add, biases and activations not counted
    ("linear", {}, 2 * 784 * 10),
    ("mlp", {}, 2 * (784 * 128 + 128 * 10)),
    ("lenet", {}, 2 * (25 * 6 * 28 * 28 + 150 * 16 * 10 * 10 + 400 * 120 + 120 * 84 + 84 * 10)),
    ("gru", {}, 2 * (28 * (28 + 64) * 64 * 3 + 640)),
    ("lstm", {}, 2 * (28 * (28 + 64) * 64 * 4 + 640)),
    (
        "transformer",
        {"depth": 1, "width": 8, "heads": 2},
        2 * (28 * 28 * 8 + 28 * 8 * 64 + 2 * 28 * 28 * 8 + 80),
    ),
]


def test_flops_match_counts_by_hand() -> None:
    for name, options, flops in FLOPS:
        assert describe(name, **options).forward_flops == flops, name


def test_describe_allocates_no_memory_for_images() -> None:
    assert describe("cnn_gn_small", input_size=10**6).forward_flops > 10**12


def test_describe_keeps_the_random_state() -> None:
    state = torch.get_rng_state()
    describe("timm:resnet10t")
    describe("lenet")
    assert torch.equal(torch.get_rng_state(), state)


def test_description_prints_as_text() -> None:
    text = str(describe("resnet20", in_channels=3, input_size=32))
    assert text.splitlines()[0].startswith("resnet20: 16-32-64 channels")
    assert "272,474 (backbone 271,824, head 650)" in text
    # 40.55 M multiply-adds of the plain network, 0.26 M of the shortcuts
    assert "81.6 MFLOP per example" in text


def test_numbers_are_readable() -> None:
    numbers = (12, 1_500, 2_000_000, 3.6e9, 1e13)
    assert [format_count(number) for number in numbers] == ["12 ", "1.5 k", "2 M", "3.6 G", "10 T"]


def test_describe_command_prints_json_or_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cnn_bn_*", "--classes", "3"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in list_models("cnn_bn_*"))
    assert "6,099" in out  # the small one, with 3 classes
    assert main(["timm:resnet10*"]) == 0
    assert "timm:resnet10t" in capsys.readouterr().out.split()
    assert main(["tabular"]) == 0


def test_invalid_arguments_of_describe_raise_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = {
        ("nothing",): "no model matches 'nothing'",
        ("lenet", "--size", "5"): "at least 12x12",
    }
    for arguments, message in mistakes.items():
        assert main(list(arguments)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err
        assert err.count("\n") == 1


ABLE = [name for name in list_models() if can_narrow(name)]


def make_model(name: str, options: dict[str, Any]) -> nn.Module:
    kinds = MODELS[name].kinds
    if "tokens" in kinds:
        return create_model(name, 5, 1, (9,), vocabulary=30, **options)
    size: Any = (16, 16) if "image" in kinds else ()
    return create_model(name, 5, 3 if size else 7, size, **options)


@each_case(("name", "share"), itertools.product(ABLE, (0.25, 0.3)))
def test_narrow_copy_is_a_leading_slice(name: Any, share: Any) -> None:
    wide = make_model(name, {}).state_dict()
    kind, options = narrow_options(name, {}, share)
    slim = make_model(kind, options).state_dict()
    assert slim.keys() == wide.keys()
    for n, t in slim.items():
        assert t.ndim == wide[n].ndim
        assert all(a <= b for a, b in zip(t.shape, wide[n].shape, strict=True)), n
    assert sum(t.numel() for t in slim.values()) < 0.5 * sum(t.numel() for t in wide.values())
    # rounded up, widths have other shares
    assert share_of(kind, options, name, {}) == 0.25 or share == 0.3
    assert share_of(name, {}, kind, options) is None  # the wide model is larger
    kind, options = narrow_options(name, {}, 1.0, scaler=True)
    same = make_model(kind, options).state_dict()
    assert {n: t.shape for n, t in same.items()} == {n: t.shape for n, t in wide.items()}
    assert not options["scaler"]


@each_case("name", ABLE)
def test_scaler_divides_outputs_of_backbone_layers(name: Any) -> None:
    kind, options = narrow_options(name, {}, 0.5, scaler=True)
    torch.manual_seed(0)
    scaled = make_model(kind, options).eval()
    plain = make_model(kind, {**options, "scaler": 0.0}).eval()
    plain.load_state_dict(scaled.state_dict())
    with torch.no_grad():
        for module in plain.backbone.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                module.weight /= 0.5
                if module.bias is not None:
                    module.bias /= 0.5
        x = torch.randn(4, *((3, 16, 16) if "image" in MODELS[name].kinds else (7,)))
        x = torch.randint(30, (4, 9)) if "tokens" in MODELS[name].kinds else x
        assert torch.allclose(scaled(x), plain(x), rtol=1e-4, atol=1e-4)


def test_share_of_wider_model() -> None:
    assert share_of("cnn_bn_small", {}, "cnn_bn_large", {}) == 0.25
    assert share_of("cnn", {"width": 8}, "cnn_bn_large", {}) == 0.25
    assert share_of("mlp", {"hidden": (32, 16)}, "mlp", {"hidden": (64, 32)}) == 0.5
    for own, wide in (
        (("cnn_gn_small", {}), ("cnn_bn_large", {})),
        (("mlp", {"hidden": (32, 32)}), ("mlp", {"hidden": (64, 32)})),
        (("mlp", {"hidden": (32,)}), ("mlp", {"hidden": (64, 32)})),
        (("resnet8", {}), ("resnet20", {})),
        (("gru", {}), ("gru", {})),
        (("mlp", {}), ("cnn", {})),
    ):
        assert share_of(*own, *wide) is None


def test_widths_are_rounded_up() -> None:
    for width, narrow in ((5, 2), (4, 2), (10, 3), (1, 1)):
        _, options = narrow_options("mlp", {"hidden": (width,)}, 0.3)
        assert tuple(options["hidden"]) == (narrow,)
    assert {"gru", "lstm", "transformer", "vit", "lenet", "fedavg_cnn", "linear"}.isdisjoint(ABLE)
