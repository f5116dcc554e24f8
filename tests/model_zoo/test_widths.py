"""Narrow copies of models: slices, scaler and shares."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from model_zoo import can_narrow, create_model, list_models, narrow_options, share_of
from model_zoo.registry import MODELS
from tests.support.cases import each_case

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
        assert torch.allclose(scaled(x).logits, plain(x).logits, rtol=1e-4, atol=1e-4)


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
