"""Every model of the package: shapes, training, splitting, vmap, and where its randomness comes from."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from model_zoo import Outputs, SplitModel, batch_norm_buffers, create_model, is_batch_norm, list_models, model_options
from model_zoo.attention import SelfAttention
from model_zoo.catalogue import MODELS
from model_zoo.sequence import to_steps

IMAGE_MODELS = [name for name in list_models() if "image" in MODELS[name].kinds]
SERIES_MODELS = [name for name in list_models() if "series" in MODELS[name].kinds]
TABLE_MODELS = [name for name in list_models() if "table" in MODELS[name].kinds]
HEAVY = {"resnet18_small", "resnet18", "resnet10_imagenet"}
Size = tuple[int, ...]


def make(name: str, classes: int = 10, channels: int = 1, size: int | Size = 28, **options: object) -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, classes, channels, size, **options)  # type: ignore[arg-type]


def batch(channels: int, *size: int, n: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(seed))


CASES = (
    [(name, channels, (side, side)) for name in IMAGE_MODELS for channels, side in ((1, 28), (3, 32))]
    + [(name, 2, (12, 20)) for name in IMAGE_MODELS if name not in HEAVY]
    + [(name, 1, (8, 8)) for name in IMAGE_MODELS if name not in {*HEAVY, "lenet"}]
    + [(name, 3, (40,)) for name in SERIES_MODELS]
    + [(name, 7, ()) for name in TABLE_MODELS]
)


@pytest.mark.parametrize(("name", "channels", "size"), CASES)
def test_forward_split_and_one_step(name: str, channels: int, size: Size) -> None:
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


@pytest.mark.parametrize("name", [n for n in list_models() if n not in HEAVY])
def test_feature_dim_adds_a_projection_that_ends_in_relu(name: str) -> None:
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


def test_feature_dim_of_the_models_own_width_adds_nothing() -> None:
    plain, same = make("cnn_bn_small"), make("cnn_bn_small", feature_dim=32)
    assert list(plain.state_dict()) == list(same.state_dict())
    assert all(torch.equal(v, same.state_dict()[n]) for n, v in plain.state_dict().items())


def test_outputs_is_a_pytree() -> None:
    out = make("mlp")(batch(1, 28, 28))
    doubled = pytree.tree_map(lambda t: 2 * t, out)
    assert isinstance(doubled, Outputs)
    assert torch.equal(doubled.features, 2 * out.features)


@pytest.mark.parametrize("name", [n for n in list_models() if n not in {"gru", "lstm", *HEAVY}])
def test_vmap_in_training_equals_one_model_after_another(name: str) -> None:
    """Predictions, gradients and BatchNorm statistics of three stacked models, in float64."""
    size: Size = (12, 12) if name in IMAGE_MODELS else ()
    models = [create_model(name, 3, 2, size).double() for _ in range(3)]
    alone = copy.deepcopy(models)
    x = batch(2, *size, n=12).double().reshape(3, 4, 2, *size)
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]

    def run(p: dict[str, Tensor], b: dict[str, Tensor], rows: Tensor) -> Outputs:
        out: Outputs = functional_call(models[0], (p, b), (rows,))
        return out

    together = vmap(run)(parameters, buffers, x)
    together.logits.square().sum().backward()
    for k, model in enumerate(alone):
        one = model(x[k])
        one.logits.square().sum().backward()
        torch.testing.assert_close(together.logits[k], one.logits)
        torch.testing.assert_close(together.features[k], one.features)
        for n, p in model.named_parameters():
            torch.testing.assert_close(parameters[n].grad[k], p.grad)  # type: ignore[index]
        for n, b in model.named_buffers():
            torch.testing.assert_close(buffers[n][k], b)
    assert {n for n in buffers if buffers[n].is_floating_point()} == batch_norm_buffers(models[0])


@pytest.mark.parametrize("name", [n for n in list_models() if n not in HEAVY])
def test_training_draws_random_numbers_through_dropout_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size: Size = (28, 28) if name in IMAGE_MODELS else ()
    has_dropout = "dropout" in model_options(name)
    model = make(name, size=size, **({"dropout": 0.4} if has_dropout else {}))
    rates: list[float] = []

    def recorded(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        rates.append(p)
        return x

    monkeypatch.setattr(F, "dropout", recorded)
    state = torch.get_rng_state()
    model.train()(batch(1, *size))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(rates) == ({0.4} if has_dropout else set())


@pytest.mark.parametrize("name", [n for n in list_models() if "dropout" in model_options(n)])
def test_dropout_acts_in_training_only_and_its_absence_costs_no_call(name: str) -> None:
    size: Size = (28, 28) if name in IMAGE_MODELS else ()
    model = make(name, size=size, dropout=0.5).train()
    x = batch(1, *size)
    assert any(isinstance(m, nn.Dropout) for m in model.modules())
    assert not torch.equal(model(x).features, model(x).features)
    model.eval()
    assert torch.equal(model(x).features, model(x).features)
    assert not any(isinstance(m, nn.Dropout) for m in make(name, size=size).modules())


def test_weights_follow_the_global_seed() -> None:
    def weights(seed: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.cat([p.detach().flatten() for p in create_model("lenet", 10).parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


COUNTS = [
    ("linear", {}, 7_850),
    ("mlp", {}, 101_770),
    ("mlp", {"hidden": [200, 200]}, 199_210),  # McMahan et al. (2017): their 2NN
    ("lenet", {}, 61_706),
    ("fedavg_cnn", {}, 1_663_370),  # McMahan et al. (2017)
    ("resnet20", {"channels": 3, "size": 32}, 272_474),  # He et al. (2016) give 0.27 M
    ("resnet8", {"channels": 3, "size": 32}, 78_042),
    ("resnet18_small", {"channels": 3, "size": 32}, 11_173_962),
    ("resnet18", {"classes": 1000, "channels": 3, "size": 64}, 11_689_512),
    ("gru", {}, 3 * 64 * (28 + 64 + 2) + 650),
    ("lstm", {"hidden": 32, "layers": 2}, 4 * 32 * (28 + 32 + 2) + 4 * 32 * (32 + 32 + 2) + 330),
]


@pytest.mark.parametrize(("name", "arguments", "count"), COUNTS)
def test_parameter_counts_that_are_known(name: str, arguments: dict[str, object], count: int) -> None:
    assert sum(p.numel() for p in make(name, **arguments).parameters()) == count  # type: ignore[arg-type]


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Parameters and buffers in the order of definition; shapes must agree one by one."""
    values, places = list(source.state_dict().values()), list(target.state_dict().values())
    assert [v.shape for v in values] == [p.shape for p in places]
    for value, place in zip(values, places, strict=True):
        place.copy_(value)


def move_statistics(model: nn.Module) -> None:
    """BatchNorm statistics and weights away from 0 and 1, so that a mistake shows."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in ((m.running_mean, -1, 1), (m.running_var, 0.5, 2), (m.weight.data, 0.5, 2)):
                assert t is not None
                t.uniform_(low, high)


@pytest.mark.parametrize(("blocks", "name"), [([2, 2, 2, 2], "resnet"), ([1, 1, 1, 1], "resnet10_imagenet")])
def test_imagenet_stem_computes_what_torchvisions_resnet_does(blocks: list[int], name: str) -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    reference = ResNet(BasicBlock, blocks, num_classes=7)
    move_statistics(reference)
    given = {"widths": [64, 128, 256, 512], "blocks": blocks, "stem": "imagenet"} if name == "resnet" else {}
    model = make(name, 7, 3, 48, **given)
    copy_in_order(reference, model)
    x = batch(3, 48, 48, n=2).double()
    torch.testing.assert_close(model.double().eval()(x).logits, reference.double().eval()(x))


@pytest.mark.parametrize(("name", "width"), [("cnn_bn_small", 8), ("cnn_bn_medium", 16), ("cnn_bn_large", 32)])
def test_the_cnn_is_the_three_block_one(name: str, width: int) -> None:
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
    assert model.feature_dim == 4 * width
    assert torch.equal(model(x).logits, reference(x))
    assert sum(map(is_batch_norm, model.modules())) == 3
    wide = make("cnn", width=width)
    assert [v.shape for v in wide.state_dict().values()] == [v.shape for v in model.state_dict().values()]


@pytest.mark.parametrize(("width", "groups"), [(8, [2, 4, 8]), (16, [4, 8, 16]), (32, [8, 16, 32]), (6, [1, 3, 6])])
def test_group_norm_has_groups_of_at_least_four_channels(width: int, groups: list[int]) -> None:
    model = make("cnn", width=width, norm="group")
    assert [m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)] == groups


@pytest.mark.parametrize("name", ["cnn_gn_small", "cnn_gn_medium", "cnn_gn_large"])
def test_group_norm_presets_have_no_batch_statistics(name: str) -> None:
    model = make(name)
    assert not batch_norm_buffers(model)
    x = batch(1, 28, 28)
    torch.testing.assert_close(model(x).logits[:1], model(x[:1]).logits)


@pytest.mark.parametrize("name", ["resnet", "resnet8", "resnet20", "resnet18_small"])
def test_resnets_can_have_group_norm(name: str) -> None:
    model = make(name, norm="group")
    assert not any(map(is_batch_norm, model.modules()))
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


def test_images_are_read_row_by_row_and_series_point_by_point() -> None:
    x = batch(3, 4, 5, n=2)
    steps = to_steps(x)
    assert steps.shape == (2, 4, 15)
    assert torch.equal(steps[1, 2], x[1, :, 2, :].flatten())
    series = batch(3, 6, n=2)
    assert torch.equal(to_steps(series)[0, 4], series[0, :, 4])
    model = make("gru", channels=3, size=(4, 5))
    outputs, hidden = model.backbone.network(steps)
    assert torch.equal(model.features(x), hidden[0])
    assert torch.equal(model.features(x), outputs[:, -1])


def test_vit_tokens_are_the_patches() -> None:
    model = make("vit", channels=2, size=(8, 12), patch=4)
    seen: list[Tensor] = []
    model.backbone.encoder.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = batch(2, 8, 12, n=2)
    model(x)
    patches = F.unfold(x, kernel_size=4, stride=4).transpose(1, 2)  # [B, patches, channels·4·4]
    assert torch.equal(seen[0], patches)


@pytest.mark.parametrize("name", ["transformer", "vit"])
def test_transformers_tell_positions_apart(name: str) -> None:
    model = make(name).double().eval()
    x = batch(1, 28, 28).double()
    turned = x.flip(2)  # the same rows in another order
    assert (model(x).logits - model(turned).logits).abs().max() > 1e-4


def test_options_change_the_model() -> None:
    assert make("mlp", hidden=[64, 32]).feature_dim == 32
    assert make("mlp", hidden=50).feature_dim == 50
    assert make("gru", hidden=20, layers=2).backbone.network.num_layers == 2
    assert len(make("vit", depth=3, patch=7).backbone.encoder.blocks) == 3
    assert make("transformer", width=32, heads=2).feature_dim == 32
    assert make("tabular", size=(), channels=5, width=16, blocks=3).feature_dim == 16
    assert make("resnet", widths=[8, 16], blocks=[2, 1]).feature_dim == 16


def test_batch_norm_is_found_by_type() -> None:
    class Renamed(nn.BatchNorm1d):
        pass

    model = SplitModel(nn.Sequential(nn.Linear(3, 4), Renamed(4)), nn.Linear(4, 2), 4)
    model.backbone.register_buffer("running_mean", torch.zeros(4))  # by its name alone it would be taken for one
    assert is_batch_norm(Renamed(4))
    assert is_batch_norm(nn.SyncBatchNorm(4))
    assert not is_batch_norm(nn.InstanceNorm2d(4))
    assert not is_batch_norm(nn.GroupNorm(2, 4))
    assert batch_norm_buffers(model) == {"backbone.1.running_mean", "backbone.1.running_var"}
    assert batch_norm_buffers(Renamed(4)) == {"running_mean", "running_var"}


def test_resnets_start_from_he_initial_weights() -> None:
    convolutions = [m for m in make("resnet18_small").modules() if isinstance(m, nn.Conv2d)]
    for conv in convolutions[1:]:
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)


def test_initial_outputs_are_of_moderate_size() -> None:
    """An untrained model's loss is near log C: no model starts with exploding logits."""
    for name in IMAGE_MODELS:
        if name in HEAVY:
            continue
        x, y = batch(1, 28, 28, n=16), torch.arange(16) % 10
        loss = F.cross_entropy(make(name).train()(x).logits, y).item()
        assert loss < 2 * math.log(10), name
