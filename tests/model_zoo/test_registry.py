"""Names, options, costs and widths of models; tests/errors/model_zoo.yaml has the mistakes."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model_zoo import (
    ModelError,
    can_narrow,
    create_model,
    describe,
    group_models,
    list_groups,
    list_models,
    model_options,
    narrow_options,
    register_model,
    share_of,
)
from model_zoo.__main__ import main
from model_zoo.description import format_count
from model_zoo.plugins import PluginWarning
from model_zoo.registry import MODELS
from tests.support.cases import each_case
from tests.support.plugins import install

OPTIONS: dict[str, dict[str, Any]] = {
    "cnn": {"width": 16, "norm": "batch", "dropout": 0.0, "scaler": 0.0},
    "cnn_bn_small": {"dropout": 0.0, "scaler": 0.0},
    "mlp": {"hidden": (128,), "dropout": 0.0, "scaler": 0.0, "norm": "none"},
    "resnet20": {"norm": "batch", "scaler": 0.0},
    "resnet18": {},
    "lenet": {},
    "timm:resnet10t": {"drop_rate": None},
}


def test_options_have_defaults() -> None:
    assert {name: model_options(name) for name in OPTIONS} == OPTIONS


def test_list_models_filters_by_pattern() -> None:
    assert list_models() == sorted(list_models()) == sorted(MODELS)
    assert list_models("cnn_bn_*") == ["cnn_bn_large", "cnn_bn_medium", "cnn_bn_small"]
    assert list_models("nothing*") == []
    resnets = [f"torchvision:resnet{depth}" for depth in (101, 152, 18)]
    assert list_models("torchvision:resnet1*") == resnets
    assert "timm:vit_tiny_patch16_224" in list_models("timm:vit_tiny*")


def test_groups_resolve_to_models_that_exist() -> None:
    known = {*list_models(), *list_models("torchvision:*")}
    for group in list_groups():
        models = group_models(group)
        assert len(set(models)) == len(models) >= 2 and set(models) <= known, group
        if group.startswith("Ht"):
            assert len(models) == int(group.lstrip("HtFEM")), group
    for name in {*group_models("resnet_family"), *group_models("HtFE4")}:
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


# Two for each multiply-add; biases and activations are not counted.
FLOPS: list[tuple[str, dict[str, Any], int]] = [
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


@each_case("mode", [torch.no_grad, torch.inference_mode])
def test_operations_are_those_of_the_counter_of_torch(mode: Any) -> None:
    for name in ("cnn", "resnet20", "vit", "transformer"):
        model = create_model(name, 10, in_channels=3, input_size=32).eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model(torch.zeros(2, 3, 32, 32))
        by_operator = counter.get_flop_counts()["Global"]
        convolutions = by_operator.get(torch.ops.aten.convolution, 0)

        with mode():
            about = describe(name, in_channels=3, input_size=32)

        assert about.forward_flops == counter.get_total_flops() // 2, name
        assert about.convolution_flops == convolutions // 2, name


class Attention(nn.Module):
    """A model with a layer of attention and a higher-order operator."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(in_channels, 1, batch_first=True)
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = x.transpose(1, 2)
        mixed, _ = self.attention(steps, steps, steps, need_weights=False)
        features = torch.cond(mixed.sum() > 0, torch.clone, torch.neg, (mixed.mean(1),))
        return self.head(features)


def test_operations_of_own_models_are_counted() -> None:
    attention = 2 * (4 * 9 * 4 * 4 + 2 * 9 * 9 * 4)

    about = describe(f"python:{__name__}:Attention", 2, 4, (9,))

    assert about.forward_flops == attention + 2 * 4 * 2
    assert torch.backends.mha.get_fastpath_enabled()


def test_no_memory_is_allocated_for_attention_between_many_values() -> None:
    for name, channels, size in (("transformer", 3, (30_000,)), ("ft_transformer", 6_000, ())):
        assert describe(name, 2, channels, size).forward_flops > 10**9


def test_description_counts_parameters_and_operations() -> None:
    for name, options, flops in FLOPS:
        assert describe(name, **options).forward_flops == flops, name
    state = torch.get_rng_state()
    about = describe("cnn_bn_small", feature_dim=20)
    assert torch.equal(torch.get_rng_state(), state)
    assert about.parameters == about.backbone_parameters + 20 * 10 + 10
    assert (about.feature_dim, about.has_batch_norm) == (20, True)
    # No memory is allocated for the images.
    assert describe("cnn_gn_small", input_size=10**6).forward_flops > 10**12
    text = str(describe("resnet20", in_channels=3, input_size=32))
    assert "272,474 (backbone 271,824, head 650)" in text and "81.6 MFLOP per example" in text
    numbers = (12, 1_500, 2_000_000, 3.6e9, 1e13)
    assert [format_count(number) for number in numbers] == ["12 ", "1.5 k", "2 M", "3.6 G", "10 T"]


def test_command_prints_a_table_or_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["cnn_bn_*"], "6,330"),
        (["timm:resnet10*"], "timm:resnet10t"),
        (["tabular"], "tabular"),
        (["text_gru"], "text_gru"),
    ):
        assert main(arguments) == 0
        assert words in capsys.readouterr().out
    for arguments, words in (
        (["nothing"], "no model matches 'nothing'"),
        (["tim:*"], "prefix 'tim'"),
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and words in err and err.count("\n") == 1


ABLE = [name for name in MODELS if can_narrow(name)]


def make_model(name: str, options: dict[str, Any]) -> nn.Module:
    kinds = MODELS[name].kinds
    if "tokens" in kinds:
        return create_model(name, 5, 1, (9,), vocabulary=30, **options)
    size: Any = (16, 16) if "image" in kinds else ()
    return create_model(name, 5, 3 if size else 7, size, **options)


@each_case(("name", "share"), itertools.product(ABLE, (0.25, 0.3, 1.0)))
def test_narrow_copy_is_a_leading_slice(name: str, share: float) -> None:
    wide = make_model(name, {}).state_dict()
    kind, options = narrow_options(name, {}, share, scaler=share == 1.0)
    slim = make_model(kind, options).state_dict()

    assert slim.keys() == wide.keys()
    for n, t in slim.items():
        assert all(a <= b for a, b in zip(t.shape, wide[n].shape, strict=True)), n
    size, wide_size = (sum(t.numel() for t in state.values()) for state in (slim, wide))
    assert size < 0.5 * wide_size or (share == 1.0 and size == wide_size and not options["scaler"])
    # Widths that are rounded up have other shares.
    assert share_of(kind, options, name, {}) == share or share == 0.3
    assert share_of(name, {}, kind, options) == (1.0 if share == 1.0 else None)


@each_case("name", ABLE)
def test_scaler_divides_outputs_of_backbone_layers(name: str) -> None:
    kind, options = narrow_options(name, {}, 0.5, scaler=True)
    scaled = make_model(kind, options).eval()
    plain = make_model(kind, {**options, "scaler": 0.0}).eval()
    plain.load_state_dict(scaled.state_dict())
    x = torch.randn(4, *((3, 16, 16) if "image" in MODELS[name].kinds else (7,)))
    x = torch.randint(30, (4, 9)) if "tokens" in MODELS[name].kinds else x
    with torch.no_grad():
        for module in plain.backbone.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                for parameter in module.parameters():
                    parameter.div_(0.5)
        assert torch.allclose(scaled(x), plain(x), rtol=1e-4, atol=1e-4)


def test_share_is_known_for_narrow_copies_only() -> None:
    for own, wide, share in (
        (("cnn_bn_small", {}), ("cnn_bn_large", {}), 0.25),
        (("cnn", {"width": 8}), ("cnn_bn_large", {}), 0.25),
        (("mlp", {"hidden": (32, 16)}), ("mlp", {"hidden": (64, 32)}), 0.5),
        (("cnn_gn_small", {}), ("cnn_bn_large", {}), None),
        (("mlp", {"hidden": (32, 32)}), ("mlp", {"hidden": (64, 32)}), None),
        (("mlp", {"hidden": (32,)}), ("mlp", {"hidden": (64, 32)}), None),
        (("resnet8", {}), ("resnet20", {}), None),
        (("gru", {}), ("gru", {}), None),
        (("mlp", {}), ("cnn", {}), None),
    ):
        assert share_of(*own, *wide) == share
    for width, narrow in ((5, 2), (4, 2), (10, 3), (1, 1)):
        assert narrow_options("mlp", {"hidden": (width,)}, 0.3)[1]["hidden"] == (narrow,)


GROUP = "hetero_fl.models"
PLUGINS: Any = register_model.plugins
CODE = """
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

class Tiny(nn.Module):
    def __init__(self, num_classes, in_channels, input_size, width=3):
        super().__init__()
        self.fc = nn.Linear(in_channels * input_size[0] * input_size[1], num_classes)

    def forward(self, x):
        return self.fc(x.flatten(1))

def broken(num_classes):
    raise RuntimeError('no images')

NOT_A_MODEL = 3
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that installs a package with models until the end of the test."""

    def install_package(code: str = CODE, package: str = "other_package", **models: str) -> None:
        monkeypatch.delitem(sys.modules, package, raising=False)
        install(tmp_path, monkeypatch, {GROUP: models}, code, package)
        PLUGINS.refresh()

    yield install_package
    PLUGINS.refresh()


def test_model_of_a_plugin_is_created_by_name(packages: Any, capsys: Any) -> None:
    packages(tiny="other_package:Tiny", tiny_function="other_package:broken")
    create_model("mlp", num_classes=2)
    assert "other_package" not in sys.modules

    model = create_model("tiny", num_classes=4, input_size=8)

    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 4)
    assert model_options("tiny") == {"width": 3}
    assert describe("tiny").summary == "from other_package 1.0"
    assert list_models("ti*") == ["tiny", "tiny_function"]
    with pytest.raises(ModelError, match="did you mean 'tiny'"):
        create_model("tinny", num_classes=2)
    assert main(["tiny*"]) == 0
    out = capsys.readouterr().out
    assert "7,850" in out and "no images" in out


def test_registered_model_is_created_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register_model, "_known", dict(register_model._known))

    @register_model("halves")
    def halves(num_classes: int, width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, num_classes))

    model = create_model("halves", 3, input_size=8, width=6)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3) and model.num_features == 6
    assert "halves" in list_models() and model_options("halves") == {"width": 4}
    assert describe("halves", 3, input_size=8).summary == f"from {__name__}"
    with pytest.raises(ValueError, match="'mlp' is a built-in model; choose another name"):
        register_model("mlp")(halves)


def test_broken_plugin_gives_one_warning_and_the_others_remain(packages: Any) -> None:
    packages(broken="other_package:Missing", tiny="other_package:Tiny", mlp="other_package:Tiny")
    second = "second_package"
    packages(CODE, second, tiny="second_package:Tiny")

    with pytest.warns(PluginWarning) as caught:
        names = list_models()

    assert sorted(str(warning.message) for warning in caught) == [
        "model 'broken' of other_package 1.0 cannot be loaded: AttributeError: module "
        "'other_package' has no attribute 'Missing'; it is ignored",
        "model 'mlp' of other_package 1.0: 'mlp' is a built-in model; the plug-in is ignored",
        "model 'tiny' of second_package 1.0: other_package 1.0 also provides this model; the "
        "plug-in is ignored",
    ]
    assert "tiny" in names and "broken" not in names
    assert describe("tiny").summary == "from other_package 1.0"
    assert type(create_model("mlp", num_classes=2)).__module__.startswith("model_zoo.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list_models() == names
    for _ in range(2):
        with pytest.raises(
            ModelError, match=r"^model broken: model 'broken' of other_package 1\.0"
        ):
            create_model("broken", num_classes=2)
