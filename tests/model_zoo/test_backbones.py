"""All models of the package: shapes, training, splitting, vmap and randomness."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo import (
    Outputs,
    SplitModel,
    batch_norm_buffers,
    create_model,
    is_batch_norm,
    model_options,
)
from model_zoo.registry import MODELS
from tests.support.cases import each_case
from tests.support.models import Size, batch, check_vmap, make

IMAGE_MODELS = [name for name in sorted(MODELS) if "image" in MODELS[name].kinds]
SERIES_MODELS = [name for name in sorted(MODELS) if "series" in MODELS[name].kinds]
NUMBER_MODELS = [name for name in sorted(MODELS) if "tokens" not in MODELS[name].kinds]
TABLE_MODELS = [name for name in sorted(MODELS) if "table" in MODELS[name].kinds]
HEAVY = {"resnet18_small", "resnet18", "resnet10_imagenet"}
UNPADDED = {"niid_cnn", "fedproto_cnn"}  # from 16x16 on


def cases() -> Iterator[tuple[str, int, Size]]:
    """Return the smallest image of each model and one that is not square, series and rows."""
    for name in IMAGE_MODELS:
        if name in HEAVY | UNPADDED:
            yield name, 3, (32, 32)
            yield name, 1, (28, 28)
        else:
            yield name, 2, (12, 20)
            yield name, 1, (12, 12) if name == "lenet" else (8, 8)
    for name in SERIES_MODELS:
        yield name, 3, (40,)
    for name in TABLE_MODELS:
        yield name, 7, ()


@each_case(("name", "channels", "size"), cases())
def test_forward_split_and_one_step(name: Any, channels: Any, size: Any) -> None:
    model = make(name, 5, channels, size)
    x = batch(channels, *size)
    before = x.clone()
    assert {n.split(".")[0] for n, _ in model.named_parameters()} <= {"backbone", "head"}
    assert [n for n, _ in model.named_children()] == ["backbone", "head"]

    model.eval()
    out = model(x)
    assert isinstance(out, Outputs)
    assert out.logits.shape == (4, 5)
    assert out.features.shape == (4, model.feature_dim)
    assert torch.equal(model.features(x), out.features)
    assert torch.equal(model.head(out.features), out.logits)
    assert torch.isfinite(out.logits).all()
    assert out.logits.std(0).max() > 0  # the output depends on the input

    model.train()
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model(x).logits, torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    optimizer.step()
    assert any(not torch.equal(p, old[n]) for n, p in model.named_parameters())
    assert torch.equal(x, before)


@each_case("name", [n for n in NUMBER_MODELS if n not in HEAVY])
def test_feature_dim_adds_a_projection_that_ends_in_relu(name: Any) -> None:
    size: Size = (28, 28) if name in IMAGE_MODELS else ()
    plain = make(name, size=size, channels=4)
    model = make(name, size=size, channels=4, feature_dim=24)
    x = batch(4, *size)
    out = model(x)
    assert plain.feature_dim != 24
    assert out.features.shape == (4, 24)
    assert model.head.weight.shape == (10, 24)
    projection = model.backbone.projection
    assert [type(m) for m in projection] == [nn.Linear, nn.ReLU]
    assert out.features.min() == 0
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"backbone", "head"}


def test_feature_dim_equal_to_the_width_adds_no_layer() -> None:
    plain, same = make("cnn_bn_small"), make("cnn_bn_small", feature_dim=32)
    assert list(plain.state_dict()) == list(same.state_dict())
    assert all(torch.equal(v, same.state_dict()[n]) for n, v in plain.state_dict().items())


def test_vmap_in_training_equals_one_model_after_another(subtests: pytest.Subtests) -> None:
    for name in NUMBER_MODELS:
        if name in {"gru", "lstm", *HEAVY}:
            continue
        with subtests.test(name=name):
            side = 16 if name in UNPADDED else 12
            size: Size = (side, side) if name in IMAGE_MODELS else ()
            models = [create_model(name, 3, 2, size) for _ in range(3)]

            check_vmap(models, batch(2, *size, n=12).double().reshape(3, 4, 2, *size))

            numbers = {n for n, b in models[0].named_buffers() if b.is_floating_point()}
            assert numbers == batch_norm_buffers(models[0])


def test_only_dropout_draws_random_numbers(
    monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    rates: list[float] = []

    def recorded(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        rates.append(p)
        return x

    # in each block, where there are blocks; in multimodal it is for blocks that are no images
    several = {
        "wide_deep": 2,
        "ft_transformer": 4,
        "tabular": 4,
        "transformer": 4,
        "vit": 8,
        "cnn1d": 3,
        "multimodal": 0,
    }
    for name in NUMBER_MODELS:
        if name in HEAVY:
            continue
        with subtests.test(name=name), monkeypatch.context() as patch:
            size: Size = (28, 28) if name in IMAGE_MODELS else ()
            has_dropout = "dropout" in model_options(name)
            model = make(name, size=size, **({"dropout": 0.4} if has_dropout else {}))
            rates.clear()
            patch.setattr(F, "dropout", recorded)
            state = torch.get_rng_state()
            model.train()(batch(1, *size))
            assert torch.equal(torch.get_rng_state(), state)
            own = [0.5, 0.5] if name == "fedproto_cnn" else []
            assert rates == own + [0.4] * (several.get(name, 1) if has_dropout else 0)


@each_case("name", [n for n in NUMBER_MODELS if "dropout" in model_options(n)])
def test_dropout_acts_in_training_only(name: Any) -> None:
    size: Size = (28, 28) if name in IMAGE_MODELS and name != "multimodal" else ()
    model = make(name, size=size, dropout=0.5).train()
    x = batch(1, *size)
    assert any(isinstance(m, nn.Dropout) for m in model.modules())
    assert not torch.equal(model(x).features, model(x).features)
    model.eval()
    assert torch.equal(model(x).features, model(x).features)
    assert not any(isinstance(m, nn.Dropout) for m in make(name, size=size).modules())


def test_options_change_the_model() -> None:
    assert make("mlp", hidden=[64, 32]).feature_dim == 32
    assert make("mlp", hidden=50).feature_dim == 50
    normed = [
        type(m).__name__ for m in make("mlp", hidden=[6, 5], norm="batch", dropout=0.1).backbone
    ]
    assert normed == ["Flatten", *["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2]
    assert not any(map(is_batch_norm, make("mlp").modules()))
    assert make("gru", hidden=20, layers=2).backbone.network.num_layers == 2
    assert len(make("vit", depth=3, patch=7).backbone.encoder.blocks) == 3
    assert make("transformer", width=32, heads=2).feature_dim == 32
    assert make("cnn1d", width=12, pool="last").feature_dim == 12
    assert make("gru", hidden=12, pool="both").feature_dim == 24
    assert make("lstm", hidden=12, pool="mean").feature_dim == 12
    assert make("cnn1d", width=12, blocks=4, kernel=5, norm="batch").feature_dim == 24
    assert make("tabular", size=(), channels=5, width=16, blocks=3).feature_dim == 16
    assert make("resnet", widths=[8, 16], blocks=[2, 1]).feature_dim == 16


def test_batch_norm_is_found_by_type() -> None:
    class Renamed(nn.BatchNorm1d):
        pass

    model = SplitModel(nn.Sequential(nn.Linear(3, 4), Renamed(4)), nn.Linear(4, 2), 4)
    # its name alone is like that of BatchNorm
    model.backbone.register_buffer("running_mean", torch.zeros(4))
    assert is_batch_norm(Renamed(4))
    assert is_batch_norm(nn.SyncBatchNorm(4))
    assert not is_batch_norm(nn.InstanceNorm2d(4))
    assert not is_batch_norm(nn.GroupNorm(2, 4))
    assert batch_norm_buffers(model) == {"backbone.1.running_mean", "backbone.1.running_var"}
    assert batch_norm_buffers(Renamed(4)) == {"running_mean", "running_var"}


def test_initial_loss_is_near_log_num_classes() -> None:
    x, y = batch(1, 28, 28, n=16), torch.arange(16) % 10
    for name in set(IMAGE_MODELS) - HEAVY:
        loss = F.cross_entropy(make(name).train()(x).logits, y).item()
        assert loss < 2 * math.log(10), name
