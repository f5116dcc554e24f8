"""All models of the package: training and splitting, and comparisons with formulas and papers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo import (
    SplitModel,
    batch_norm_buffers,
    create_model,
    is_batch_norm,
    model_options,
)
from model_zoo.backbones.sequence import to_steps
from model_zoo.backbones.transformer import SelfAttention
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
    assert out.shape == (4, 5)
    features = model.forward_features(x)
    assert features.shape == (4, model.num_features)
    assert torch.equal(model.forward_head(features), out)
    assert torch.isfinite(out).all()
    assert out.std(0).max() > 0  # the output depends on the input

    model.train()
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
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
    features = model.forward_features(x)
    assert plain.num_features != 24
    assert features.shape == (4, 24)
    assert model.head.weight.shape == (10, 24)
    projection = model.backbone.projection
    assert [type(m) for m in projection] == [nn.Linear, nn.ReLU]
    assert features.min() == 0
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
    assert not torch.equal(model.forward_features(x), model.forward_features(x))
    model.eval()
    assert torch.equal(model.forward_features(x), model.forward_features(x))
    assert not any(isinstance(m, nn.Dropout) for m in make(name, size=size).modules())


def test_options_change_the_model() -> None:
    assert make("mlp", hidden=[64, 32]).num_features == 32
    assert make("mlp", hidden=50).num_features == 50
    normed = [
        type(m).__name__ for m in make("mlp", hidden=[6, 5], norm="batch", dropout=0.1).backbone
    ]
    assert normed == ["Flatten", *["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2]
    assert not any(map(is_batch_norm, make("mlp").modules()))
    assert make("gru", hidden=20, layers=2).backbone.network.num_layers == 2
    assert len(make("vit", depth=3, patch=7).backbone.encoder.blocks) == 3
    assert make("transformer", width=32, heads=2).num_features == 32
    assert make("cnn1d", width=12, pool="last").num_features == 12
    assert make("gru", hidden=12, pool="both").num_features == 24
    assert make("lstm", hidden=12, pool="mean").num_features == 12
    assert make("cnn1d", width=12, blocks=4, kernel=5, norm="batch").num_features == 24
    assert make("tabular", size=(), channels=5, width=16, blocks=3).num_features == 16
    assert make("resnet", widths=[8, 16], blocks=[2, 1]).num_features == 16


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
        loss = F.cross_entropy(make(name).train()(x), y).item()
        assert loss < 2 * math.log(10), name


COUNTS = [
    ("linear", {}, 7_850),
    ("mlp", {}, 101_770),
    ("mlp", {"hidden": [200, 200]}, 199_210),  # McMahan et al. (2017): their 2NN
    ("lenet", {}, 61_706),
    ("fedavg_cnn", {}, 1_663_370),  # McMahan et al. (2017)
    ("niid_cnn", {}, 44_426),  # Li et al. (2022)
    ("fedproto_cnn", {}, 21_840),  # Tan et al. (2022)
    ("fedproto_cnn", {"width": 22}, 260 + 250 * 22 + 22 + 16 * 22 * 50 + 50 + 510),
    ("fedgen_cnn", {}, 26_434),  # Zhu et al. (2021)
    ("resnet20", {"channels": 3, "size": 32}, 272_474),  # He et al. (2016) give 0.27 M
    ("resnet8", {"channels": 3, "size": 32}, 78_042),
    ("resnet18_small", {"channels": 3, "size": 32}, 11_173_962),
    ("resnet18", {"classes": 1000, "channels": 3, "size": 64}, 11_689_512),
    ("gru", {}, 3 * 64 * (28 + 64 + 2) + 650),
    ("cnn1d", {}, 28 * 32 + 32 + 3 * (3 * 32 * 32 + 32 + 64 + 32 * 32 + 32) + 650),
    ("lstm", {"hidden": 32, "layers": 2}, 4 * 32 * (28 + 32 + 2) + 4 * 32 * (32 + 32 + 2) + 330),
]


def test_parameter_counts_match_published_values() -> None:
    for name, arguments, count in COUNTS:
        assert sum(p.numel() for p in make(name, **arguments).parameters()) == count, name


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers in the order of definition; shapes must agree."""
    values, places = list(source.state_dict().values()), list(target.state_dict().values())
    assert [v.shape for v in values] == [p.shape for p in places]
    for value, place in zip(values, places, strict=True):
        place.copy_(value)


def move_statistics(model: nn.Module) -> None:
    """Set BatchNorm statistics and weights to values other than 0 and 1."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in (
                (m.running_mean, -1, 1),
                (m.running_var, 0.5, 2),
                (m.weight.data, 0.5, 2),
            ):
                assert t is not None
                t.uniform_(low, high)


@each_case(("blocks", "name"), (([2, 2, 2, 2], "resnet"), ([1, 1, 1, 1], "resnet10_imagenet")))
def test_imagenet_stem_matches_torchvision_resnet(blocks: Any, name: str) -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    reference = ResNet(BasicBlock, blocks, num_classes=7)
    move_statistics(reference)
    given = (
        {"widths": [64, 128, 256, 512], "blocks": blocks, "stem": "imagenet"}
        if name == "resnet"
        else {}
    )
    model = make(name, 7, 3, 48, **given)
    copy_in_order(reference, model)
    x = batch(3, 48, 48, n=2).double()
    torch.testing.assert_close(model.double().eval()(x), reference.double().eval()(x))


@each_case(("name", "width"), (("cnn_bn_small", 8), ("cnn_bn_medium", 16), ("cnn_bn_large", 32)))
def test_cnn_matches_three_block_reference(name: str, width: int) -> None:
    def block(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]

    reference = nn.Sequential(
        *block(1, width),
        nn.MaxPool2d(2),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )
    model = make(name)
    copy_in_order(reference, model)
    x = batch(1, 28, 28)
    assert model.num_features == 4 * width
    assert torch.equal(model(x), reference(x))
    assert sum(map(is_batch_norm, model.modules())) == 3
    wide = make("cnn", width=width)
    assert [v.shape for v in wide.state_dict().values()] == [
        v.shape for v in model.state_dict().values()
    ]


def test_group_norm_has_groups_of_at_least_four_channels() -> None:
    for width, groups in ((8, [2, 4, 8]), (32, [8, 16, 32]), (6, [1, 3, 6])):
        model = make("cnn", width=width, norm="group")
        assert [m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)] == groups


def test_models_with_group_norm_have_no_batch_statistics() -> None:
    x = batch(1, 28, 28)
    for name in ("cnn_gn_small", "cnn_gn_medium", "cnn_gn_large"):
        model = make(name)
        assert not batch_norm_buffers(model), name
        torch.testing.assert_close(model(x)[:1], model(x[:1]))
    for name in ("resnet", "resnet8", "resnet20", "resnet18_small"):
        model = make(name, norm="group")
        assert not any(map(is_batch_norm, model.modules())), name
        assert any(isinstance(m, nn.GroupNorm) for m in model.modules())
        assert any(map(is_batch_norm, make(name).modules()))


def test_attention_is_scaled_dot_product_attention() -> None:
    attention = SelfAttention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference = nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.to_qkv.weight)
        reference.in_proj_bias.copy_(attention.to_qkv.bias)
        reference.out_proj.weight.copy_(attention.out.weight)
        reference.out_proj.bias.copy_(attention.out.bias)
    torch.testing.assert_close(attention(x), reference(x, x, x, need_weights=False)[0])


def test_recurrent_models_read_image_rows_and_series_points() -> None:
    x = batch(3, 4, 5, n=2)
    steps = to_steps(x)
    assert steps.shape == (2, 4, 15)
    assert torch.equal(steps[1, 2], x[1, :, 2, :].flatten())
    series = batch(3, 6, n=2)
    assert torch.equal(to_steps(series)[0, 4], series[0, :, 4])
    model = make("gru", channels=3, size=(4, 5))
    outputs, hidden = model.backbone.network(steps)
    assert torch.equal(model.forward_features(x), hidden[0])
    assert torch.equal(model.forward_features(x), outputs[:, -1])
    model.backbone.pool = "mean"
    torch.testing.assert_close(model.forward_features(x), outputs.mean(1))
    model.backbone.pool = "both"
    torch.testing.assert_close(
        model.forward_features(x), torch.cat([outputs.mean(1), outputs[:, -1]], 1)
    )


def test_dilation_doubles_per_block_and_is_symmetric() -> None:
    """Check the receptive field: 2 · (1 + 2 + 4) = 14 steps to each side with kernel 5."""
    model = make("cnn1d", channels=2, size=(41,), width=8, blocks=3, kernel=5, norm="none").double()
    series = batch(2, 41, n=1).double().requires_grad_()
    steps = model.backbone.blocks(model.backbone.stem(series))
    assert steps.shape == (1, 8, 41)
    steps[..., 20].square().sum().backward()
    read = series.grad.abs().sum((0, 1)) > 0
    assert read.nonzero().flatten().tolist() == list(range(20 - 14, 20 + 14 + 1))
    model.backbone.pool = "last"
    assert torch.equal(model.backbone(series), steps.relu()[..., -1])
    model.backbone.pool = "both"
    assert torch.equal(
        model.backbone(series), torch.cat([steps.relu().mean(-1), steps.relu()[..., -1]], 1)
    )


def test_vit_tokens_are_the_patches() -> None:
    model = make("vit", channels=2, size=(8, 12), patch=4)
    seen: list[Tensor] = []
    model.backbone.encoder.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = batch(2, 8, 12, n=2)
    model(x)
    patches = F.unfold(x, kernel_size=4, stride=4).transpose(1, 2)  # [B, patches, channels·4·4]
    assert torch.equal(seen[0], patches)


def test_outputs_depend_on_positions() -> None:
    x = batch(1, 28, 28).double()
    turned = x.flip(2)  # the same rows in another order
    for name in ("transformer", "vit", "cnn1d"):
        model = make(name).double().eval()
        assert (model(x) - model(turned)).abs().max() > 1e-4, name


def test_resnets_start_from_he_initial_weights() -> None:
    convolutions = [m for m in make("resnet18_small").modules() if isinstance(m, nn.Conv2d)]
    for conv in convolutions[1:]:
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)


def test_fedproto_cnn_features_have_no_dropout() -> None:
    model = make("fedproto_cnn").train()
    x = batch(1, 28, 28, n=64)
    channels = model.backbone[:5](x)
    is_zero = (channels == 0).flatten(2).all(-1)
    assert (
        0.4 < is_zero.double().mean() < 0.6
        and not (channels == 0).flatten(2).any(-1)[~is_zero].any()
    )
    features = model.forward_features(x)
    logits = model.forward_head(features)
    assert not torch.allclose(F.linear(features, model.head.weight, model.head.bias), logits)
    model.eval()
    features = model.forward_features(x)
    logits = model.forward_head(features)
    assert torch.equal(F.linear(features, model.head.weight, model.head.bias), logits)


def test_fedgen_cnn_features_have_either_sign() -> None:
    features = make("fedgen_cnn").forward_features(batch(1, 28, 28, n=16))
    assert features.shape == (16, 32) and (features < 0).any() and (features > 0).any()
