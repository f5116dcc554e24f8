"""All networks of the package: a training step, stacking, and comparisons with formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo import (
    ModelError,
    SplitModel,
    batch_norm_buffers,
    create_model,
    describe,
    is_batch_norm,
    model_options,
)
from model_zoo.backbones.sequence import to_steps
from model_zoo.backbones.transformer import SelfAttention
from model_zoo.registry import MODELS
from model_zoo.shapes import Shape
from tests.support.cases import each_case
from tests.support.models import batch, check_vmap, make

HEAVY = {"resnet18_small", "resnet18", "resnet10_imagenet"}
# From images of 16x16 pixels on.
UNPADDED = {"niid_cnn", "fedproto_cnn"}
RECURRENT = {"gru", "lstm", "text_gru", "gru4rec"}
SHAPES = {
    "image": Shape(2, (12, 20)),
    "series": Shape(3, (40,)),
    "table": Shape(7, ()),
    "tokens": Shape(1, (7,), 40),
}
CASES = [(name, kind) for name, model in sorted(MODELS.items()) for kind in model.kinds]


def shape_for(name: str, kind: str) -> Shape:
    return Shape(2, (32, 28)) if name in HEAVY | UNPADDED else SHAPES[kind]


def build(name: str, kind: str = "", classes: int = 5, **options: Any) -> SplitModel:
    shape = shape_for(name, kind or MODELS[name].kinds[-1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = (classes, shape.channels, shape.size)
        return create_model(name, *sizes, vocabulary=shape.vocabulary, **options)


@each_case(("name", "kind"), CASES)
def test_training_step_changes_backbone_and_head(name: str, kind: str) -> None:
    model = build(name, kind)
    x = shape_for(name, kind).random(4, seed=1)
    before = x.clone()
    assert {n.split(".")[0] for n, _ in model.named_parameters()} <= {"backbone", "head"}

    features = model.eval().forward_features(x)
    logits = model(x)
    assert logits.shape == (4, 5) and features.shape == (4, model.num_features)
    assert torch.equal(model.forward_head(features), logits)
    assert model.forward_head(features, pre_logits=True) is features
    assert torch.isfinite(logits).all() and logits.std(0).max() > 0

    old = {n: p.detach().clone() for n, p in model.train().named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model(x), torch.arange(4)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    optimizer.step()
    assert any(not torch.equal(p, old[n]) for n, p in model.named_parameters())
    assert torch.equal(x, before)


def test_classifier_is_replaced_as_in_timm() -> None:
    model = create_model("mlp", 3, input_size=8)
    x = torch.rand(2, 1, 8, 8)
    assert model.get_classifier() is model.head

    model.reset_classifier(6)
    assert model(x).shape == (2, 6)
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_features(x))
    with pytest.raises(ModelError, match="width of the features is not known"):
        SplitModel(nn.Flatten(), nn.Identity()).reset_classifier(3)


@each_case("name", [name for name in MODELS if name not in HEAVY])
def test_feature_dim_adds_a_projection_that_ends_in_relu(name: str) -> None:
    plain, model = build(name), build(name, feature_dim=24)
    x = shape_for(name, MODELS[name].kinds[-1]).random(4)

    assert plain.num_features != 24 == model.head.in_features
    assert [type(layer) for layer in model.backbone.projection] == [nn.Linear, nn.ReLU]
    assert model.forward_features(x).min() >= 0
    same = build(name, feature_dim=plain.num_features)
    assert list(same.state_dict()) == list(plain.state_dict())


def test_stacked_models_equal_one_model_after_another(subtests: pytest.Subtests) -> None:
    for name in MODELS.keys() - RECURRENT - HEAVY:
        with subtests.test(name=name):
            models = [build(name, classes=3) for _ in range(3)]
            x = shape_for(name, MODELS[name].kinds[-1]).random(12, seed=1)
            x = x.double() if x.is_floating_point() else x

            check_vmap(models, x.reshape(3, 4, *x.shape[1:]))

            numbers = {n for n, b in models[0].named_buffers() if b.is_floating_point()}
            assert numbers == batch_norm_buffers(models[0])


def test_only_dropout_layers_draw_random_numbers(
    monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    rates: list[float] = []

    def recorded(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        rates.append(p)
        return x

    monkeypatch.setattr(F, "dropout", recorded)
    for name in MODELS.keys() - HEAVY:
        with subtests.test(name=name):
            has_dropout = "dropout" in model_options(name)
            model = build(name, **({"dropout": 0.4} if has_dropout else {}))
            x = shape_for(name, MODELS[name].kinds[-1]).random(4)
            rates.clear()
            state = torch.get_rng_state()

            model.train()(x)

            # Branches for images have no dropout.
            own = {"fedproto_cnn": {0.5}, "multimodal": set()}.get(name)
            assert set(rates) == (own if own is not None else {0.4} if has_dropout else set())
            assert torch.equal(torch.get_rng_state(), state)


WIDTHS: list[tuple[str, dict[str, Any], int]] = [
    ("mlp", {"hidden": [64, 32]}, 32),
    ("mlp", {"hidden": 50}, 50),
    ("transformer", {"width": 32, "heads": 2}, 32),
    ("cnn1d", {"width": 12, "pool": "last"}, 12),
    ("cnn1d", {"width": 12, "blocks": 4, "kernel": 5, "norm": "batch"}, 24),
    ("gru", {"hidden": 12, "pool": "both"}, 24),
    ("lstm", {"hidden": 12, "pool": "mean"}, 12),
    ("tabular", {"width": 16, "blocks": 3}, 16),
    ("resnet", {"widths": [8, 16], "blocks": [2, 1]}, 16),
    ("wide_deep", {"crosses": "none"}, 7 + 32),
]
# Parameters for gray images of 28x28 pixels and 10 classes, most of them as published.
COUNTS: list[tuple[str, dict[str, Any], int]] = [
    ("linear", {}, 7_850),
    ("mlp", {"hidden": [200, 200]}, 199_210),
    ("lenet", {}, 61_706),
    ("fedavg_cnn", {}, 1_663_370),
    ("niid_cnn", {}, 44_426),
    ("fedproto_cnn", {}, 21_840),
    ("fedproto_cnn", {"width": 22}, 260 + 250 * 22 + 22 + 16 * 22 * 50 + 50 + 510),
    ("fedgen_cnn", {}, 26_434),
    ("resnet20", {"channels": 3, "size": 32}, 272_474),
    ("resnet8", {"channels": 3, "size": 32}, 78_042),
    ("resnet18_small", {"channels": 3, "size": 32}, 11_173_962),
    ("resnet18", {"classes": 1000, "channels": 3, "size": 64}, 11_689_512),
    ("gru", {}, 3 * 64 * (28 + 64 + 2) + 650),
    ("cnn1d", {}, 28 * 32 + 32 + 3 * (3 * 32 * 32 + 32 + 64 + 32 * 32 + 32) + 650),
    ("lstm", {"hidden": 32, "layers": 2}, 4 * 32 * (28 + 32 + 2) + 4 * 32 * (32 + 32 + 2) + 330),
]


def test_options_set_widths_and_numbers_of_parameters() -> None:
    for name, options, width in WIDTHS:
        assert build(name, **options).num_features == width, (name, options)
    for name, options, count in COUNTS:
        assert sum(p.numel() for p in make(name, **options).parameters()) == count, name
    layers = [type(m).__name__ for m in make("mlp", hidden=[6, 5], norm="batch").backbone]
    assert layers == ["Flatten", *["Linear", "BatchNorm1d", "ReLU"] * 2]


def test_batch_norm_is_found_by_type() -> None:
    class Renamed(nn.BatchNorm1d):
        pass

    model = SplitModel(nn.Sequential(nn.Linear(3, 4), Renamed(4)), nn.Linear(4, 2))
    model.backbone.register_buffer("running_mean", torch.zeros(4))

    assert is_batch_norm(nn.SyncBatchNorm(4)) and not is_batch_norm(nn.InstanceNorm2d(4))
    assert batch_norm_buffers(model) == {"backbone.1.running_mean", "backbone.1.running_var"}


def test_initial_loss_is_near_log_num_classes() -> None:
    x, y = batch(1, 28, 28, n=16), torch.arange(16) % 10
    for name in [name for name, kind in CASES if kind == "image" and name not in HEAVY]:
        assert F.cross_entropy(make(name).train()(x), y) < 2 * math.log(10), name


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers in the order of definition, with changed BatchNorm layers."""
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data):
                assert tensor is not None
                tensor.uniform_(0.5, 2)
    for value, place in zip(
        source.state_dict().values(), target.state_dict().values(), strict=True
    ):
        place.copy_(value)


def three_blocks() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def test_networks_match_torchvision_and_plain_layers() -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    wide = {"widths": [64, 128, 256, 512], "blocks": [2, 2, 2, 2], "stem": "imagenet"}
    for reference, model, channels in (
        (ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10), make("resnet", 10, 3, 48, **wide), 3),
        (ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10), make("resnet10_imagenet", 10, 3, 48), 3),
        (three_blocks(), make("cnn_bn_small", 10, 1, 48), 1),
    ):
        copy_in_order(reference, model)
        x = batch(channels, 48, 48, n=2).double()
        torch.testing.assert_close(model.double().eval()(x), reference.double().eval()(x))


def test_group_norm_replaces_batch_norm_in_groups_of_four_channels() -> None:
    x = batch(1, 28, 28)
    for width, groups in ((8, [2, 4, 8]), (32, [8, 16, 32]), (6, [1, 3, 6])):
        model = make("cnn", width=width, norm="group")
        assert [m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)] == groups
        torch.testing.assert_close(model(x)[:1], model(x[:1]))
    for name in ("resnet8", "resnet20", "resnet18_small", "cnn_gn_small"):
        model = make(name, **({} if "gn" in name else {"norm": "group"}))
        assert not any(map(is_batch_norm, model.modules())), name


def test_attention_is_scaled_dot_product_attention() -> None:
    attention = SelfAttention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference = nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        for value, place in zip(attention.parameters(), reference.parameters(), strict=True):
            place.copy_(value)
    torch.testing.assert_close(attention(x), reference(x, x, x, need_weights=False)[0])


def test_recurrent_models_read_image_rows_and_series_points() -> None:
    x = batch(3, 4, 5, n=2)
    steps = to_steps(x)
    assert torch.equal(steps[1, 2], x[1, :, 2, :].flatten())
    assert torch.equal(to_steps(x[:, :, 0])[0, 4], x[0, :, 0, 4])
    model = make("gru", channels=3, size=(4, 5))
    outputs, _ = model.backbone.network(steps)
    last, mean = outputs[:, -1], outputs.mean(1)
    for pool, expected in (("last", last), ("mean", mean), ("both", torch.cat([mean, last], 1))):
        model.backbone.pool = pool
        torch.testing.assert_close(model.forward_features(x), expected)


def test_dilation_doubles_per_block_and_is_symmetric() -> None:
    model = make("cnn1d", channels=2, size=(41,), width=8, blocks=3, kernel=5, norm="none")
    series = batch(2, 41, n=1).requires_grad_()
    steps = model.backbone.blocks(model.backbone.stem(series))

    steps[..., 20].square().sum().backward()

    # 2 · (1 + 2 + 4) = 14 steps to each side with kernel 5.
    read = (series.grad.abs().sum((0, 1)) > 0).nonzero().flatten()
    assert read.tolist() == list(range(20 - 14, 20 + 14 + 1))


def test_vit_tokens_are_the_patches() -> None:
    model = make("vit", channels=2, size=(8, 12), patch=4)
    seen: list[Tensor] = []
    model.backbone.encoder.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = batch(2, 8, 12, n=2)

    model(x)

    assert torch.equal(seen[0], F.unfold(x, kernel_size=4, stride=4).transpose(1, 2))


def test_outputs_depend_on_positions() -> None:
    x = batch(1, 28, 28).double()
    for name in ("transformer", "vit", "cnn1d"):
        model = make(name).double().eval()
        assert (model(x) - model(x.flip(2))).abs().max() > 1e-4, name


def test_resnets_start_from_he_initial_weights() -> None:
    convolutions = [m for m in make("resnet18_small").modules() if isinstance(m, nn.Conv2d)]
    for conv in convolutions[1:]:
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)


def test_fedproto_cnn_drops_channels_and_inputs_of_the_head() -> None:
    model = make("fedproto_cnn").train()
    x = batch(1, 28, 28, n=64)
    channels = (model.backbone[:5](x) == 0).flatten(2)
    is_zero = channels.all(-1)
    assert 0.4 < is_zero.double().mean() < 0.6 and not channels.any(-1)[~is_zero].any()
    for training in (True, False):
        features = model.train(training).forward_features(x)
        plain = F.linear(features, model.head.weight, model.head.bias)
        assert torch.equal(plain, model.forward_head(features)) is not training


def test_wide_and_deep_matches_its_formula() -> None:
    model = make("wide_deep", 2, 4, (), hidden=(8, 3)).eval()
    x = batch(4, n=6)
    t = x.tanh()
    pairs = torch.stack([t[:, i] * t[:, j] for i in range(4) for j in range(i + 1, 4)], 1)
    deep = x
    for layer in (model.backbone.deep[0], model.backbone.deep[2]):
        deep = F.relu(F.linear(deep, layer.weight, layer.bias))
    torch.testing.assert_close(model.forward_features(x), torch.cat([x, pairs, deep], 1))


def test_column_transformer_has_one_token_per_column() -> None:
    model = make("ft_transformer", 3, 5, (), width=8, depth=1, heads=2).eval()
    backbone, x = model.backbone, batch(5)
    block = backbone.blocks[0]
    steps = torch.cat(
        [x[..., None] * backbone.scale + backbone.shift, backbone.read.expand(4, 1, 8)], 1
    )
    # The first block has no norm before its attention.
    steps = steps + block.attention(steps)
    value, gate = block.up(block.norm2(steps)).chunk(2, -1)
    steps = steps + block.down(value * gate.relu())
    torch.testing.assert_close(model.forward_features(x), backbone.norm(steps[:, -1]).relu())
    few, more = (make("ft_transformer", 2, n, ()).state_dict() for n in (4, 9))
    differ = {n for n in few if few[n].shape != more[n].shape}
    assert differ == {"backbone.scale", "backbone.shift"}


RECOMMENDERS = ("matrix_factorization", "neural_filtering", "gru4rec")
HISTORIES = torch.tensor([[1, 0, 0, 5, 7], [0, 3, 4, 5, 7], [0, 0, 0, 0, 0]])


def recommender(name: str) -> tuple[SplitModel, Tensor, Tensor]:
    """Return a model, and its vectors of users and items."""
    model = make(name, 9, 1, (5,), vocabulary=11, width=4).double().eval()
    return model, model.backbone.users.weight, model.backbone.items.weight


def test_features_of_recommenders_match_their_formulas() -> None:
    model, users, items = recommender("matrix_factorization")
    rated = [items[[5, 7]].sum(0) / 2**0.5, items[[3, 4, 5, 7]].sum(0) / 2]
    expected = torch.stack([users[1] + rated[0], rated[1], torch.zeros(4)])
    torch.testing.assert_close(model.forward_features(HISTORIES), expected)

    model, users, items = recommender("neural_filtering")
    means = [items[[5, 7]].mean(0), items[[3, 4, 5, 7]].mean(0), torch.zeros(4)]
    rows = torch.cat([torch.stack([users[1], *torch.zeros(2, 4)]), torch.stack(means)], 1)
    torch.testing.assert_close(model.forward_features(HISTORIES), model.backbone.network(rows))

    model, users, items = recommender("gru4rec")
    steps = items[HISTORIES[:, 1:]] * (HISTORIES[:, 1:, None] > 0)
    outputs, _ = model.backbone.network(steps)
    expected = outputs[:, -1] + users[HISTORIES[:, 0]] * (HISTORIES[:, :1] > 0)
    torch.testing.assert_close(model.forward_features(HISTORIES), expected)


@each_case("name", RECOMMENDERS)
def test_recommenders_share_tables_and_train_one_user(name: str) -> None:
    model, users, items = recommender(name)

    model(HISTORIES).square().sum().backward()

    assert (items.shape, model.head.weight.shape) == ((11, 4), (9, 4))
    assert users.grad is not None
    assert torch.nonzero(users.grad.abs().sum(1)).flatten().tolist() == [1]


def test_texts_are_read_without_their_padding(subtests: pytest.Subtests) -> None:
    x = SHAPES["tokens"].random(4, seed=1)
    x[:, :3] = 0
    for name in [name for name, kind in CASES if kind == "tokens"]:
        with subtests.test(name=name):
            model = build(name).eval()
            for place in (3, 6):
                other = x.clone()
                other[:, place] = other[:, place] % 39 + 1
                assert not torch.allclose(model(x), model(other), atol=1e-5), place
            assert torch.isfinite(model(torch.zeros(2, 7, dtype=torch.int64))).all()
    model = build("text_transformer").eval()
    with torch.no_grad():
        before = model(x)
        model.backbone.embedding.weight[0] += 1.0
        model.backbone.positions[:, :3] += 1.0
        assert torch.equal(model(x), before)


def test_text_cnn_is_causal() -> None:
    backbone = build("text_cnn").backbone
    steps = backbone.embedding(SHAPES["tokens"].random(4)).transpose(1, 2)
    later = steps.clone()
    later[..., 4:] += 1.0
    assert torch.equal(backbone.layers(steps)[..., :4], backbone.layers(later)[..., :4])
    assert not torch.allclose(backbone.layers(steps)[..., 4:], backbone.layers(later)[..., 4:])


IMAGE_AND_GENES = [["image", [1, 8, 8]], ["genes", [5]]]


def make_multimodal(marks: int = 2, **options: Any) -> SplitModel:
    model = make("multimodal", 3, 69 + marks, (), blocks=IMAGE_AND_GENES, **options)
    # A nonzero embedding, as after training.
    with torch.no_grad():
        model.backbone.get_parameter("fusion.absent").normal_()
    return model


def blocks_of_rows(n: int = 6, genes: bool = True, image: bool = True) -> Tensor:
    x = torch.randn(n, 71, generator=torch.Generator().manual_seed(1))
    x[:, 69], x[:, 70] = float(not image), float(not genes)
    return x


def test_tensor_names_contain_the_block() -> None:
    names = [n for n, _ in make_multimodal().named_parameters()]
    assert {n.split(".")[1] for n in names if n.startswith("backbone.")} == {
        "image",
        "genes",
        "fusion",
    }
    single = create_model("multimodal", 3, 1, 8)
    own = [n for n, _ in single.named_parameters() if n.startswith("backbone.image.")]
    assert own == [n for n in names if n.startswith("backbone.image.")]


@each_case("fusion", ("concat", "gated"))
def test_values_of_an_absent_block_are_ignored(fusion: str) -> None:
    model = make_multimodal(fusion=fusion).eval()
    x = blocks_of_rows(genes=False)
    other, filled, zeros = x.clone(), x.clone(), x.clone()
    other[:, 64:69] = 7.0
    filled[:, 70] = 0
    zeros[:, 64:] = 0

    assert torch.equal(model(x), model(other))
    assert not torch.allclose(model(x), model(filled))
    assert not torch.allclose(model(x), model(zeros))
    nothing = model(blocks_of_rows(genes=False, image=False))
    assert torch.allclose(nothing, nothing[:1].expand(6, 3))
    present = blocks_of_rows()
    assert torch.equal(
        make_multimodal(0).eval()(present[:, :69]), make_multimodal().eval()(present)
    )


@each_case("image", ("cnn", "resnet", "vit"))
def test_image_branch_has_the_selected_network(image: str) -> None:
    blocks = [["frame", [3, 12, 20]], ["state", [3]]]
    model = make("multimodal", 3, 725, (), blocks=blocks, image=image, image_width=4).eval()
    x = torch.rand(5, 725)
    x[:, 723:] = 0

    assert model(x).std(0).min() > 0
    # Clients that share the branch do not share running statistics.
    assert not list(model.buffers())


def test_embedding_of_an_absent_block_is_learned() -> None:
    model = make_multimodal(drop=0.0)
    model(blocks_of_rows(genes=False)).sum().backward()
    grad = model.backbone.get_parameter("fusion.absent").grad
    assert grad is not None and not grad[0].any() and grad[1].any()


def test_blocks_are_hidden_in_training_but_never_all() -> None:
    model = make_multimodal(drop=0.5)
    seen: list[Tensor] = []
    fusion = model.backbone.get_submodule("fusion")
    fusion.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    torch.manual_seed(3)

    for training in (True, False):
        model.train(training)(blocks_of_rows(400))

    hidden, shown = seen
    share = hidden.double().mean(0)
    assert shown.all() and hidden.any(1).all()
    assert (share > 0.45).all() and (share < 0.8).all() and not hidden[:, 0].equal(hidden[:, 1])


def test_costs_of_text_models() -> None:
    about = describe("text_gru", 5, 1, (7,), vocabulary=40, embedding=8, hidden=16)
    assert about.parameters == 40 * 8 + 3 * 16 * (8 + 16 + 2) + 16 * 5 + 5
    assert about.forward_flops == 2 * (7 * 3 * 16 * (8 + 16) + 16 * 5)
