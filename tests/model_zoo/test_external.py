"""Models of timm, torchvision and users, and models that packages provide by entry points."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo import (
    ModelError,
    SplitModel,
    create_model,
    describe,
    is_batch_norm,
    list_models,
    model_options,
    register_model,
)
from model_zoo.__main__ import main
from model_zoo.external import Enlarge
from model_zoo.plugins import PluginError, PluginWarning
from tests.support.cases import each_case
from tests.support.plugins import install

SMALL = [  # name, channels, size, width of the features, enlarged to
    ("torchvision:mobilenet_v2", 1, 28, 1280, None),
    ("torchvision:shufflenet_v2_x0_5", 1, 28, 1024, None),
    ("torchvision:squeezenet1_1", 1, 28, 512, None),
    ("torchvision:densenet121", 1, 28, 1024, (32, 32)),
    ("torchvision:googlenet", 2, 28, 1024, None),
    ("torchvision:efficientnet_b0", 1, 28, 1280, None),
    ("torchvision:resnet18", 5, (28, 40), 512, None),
    ("torchvision:convnext_tiny", 1, (28, 56), 768, (32, 64)),
    ("timm:resnet10t", 1, 28, 512, None),
    ("timm:mobilenetv3_small_050", 4, 28, 1024, None),
    ("timm:vit_tiny_patch16_224", 1, 32, 192, None),
    ("timm:vit_tiny_patch16_224", 3, 28, 192, (32, 32)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "channels", "size", "width", "enlarged"), SMALL)
def test_external_models_accept_small_images(
    name: str,
    channels: int,
    size: Any,
    width: int,
    enlarged: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = create_model(name, 6, channels, size)
    torch.manual_seed(0)
    again = create_model(name, 6, channels, size).state_dict()
    assert all(torch.equal(tensor, again[n]) for n, tensor in model.state_dict().items())
    x = torch.randn(2, channels, *((size, size) if isinstance(size, int) else size))
    before = x.clone()
    model.eval()
    out = model(x)
    assert out.shape == (2, 6)
    features = model.forward_features(x)
    assert features.shape == (2, width) == (2, model.num_features)
    assert torch.equal(model.forward_head(features), out)
    assert [m.size for m in model.modules() if isinstance(m, Enlarge)] == (
        [enlarged] if enlarged else []
    )
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"backbone", "head"}

    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x)
    state = torch.get_rng_state()
    F.cross_entropy(model.train()(x), torch.tensor([0, 1])).backward()
    assert torch.equal(torch.get_rng_state(), state)  # only dropout draws random numbers
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == []
    assert torch.equal(x, before)


def test_feature_dim_and_options_reach_the_library() -> None:
    model = create_model("torchvision:mobilenet_v2", 4, feature_dim=16, dropout=0.7)
    assert model.forward_features(torch.randn(2, 1, 28, 28)).shape == (2, 16)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.7}
    assert create_model("timm:resnet10t", 4, drop_rate=0.3).backbone.drop_rate == 0.3


def test_model_for_five_channels_is_fresh_and_uses_all_of_them() -> None:
    model = create_model("torchvision:resnet18", 4, in_channels=5)
    weight = model.backbone.conv1.weight
    assert weight.shape == (64, 5, 7, 7)
    # He et al., by fan-out
    assert weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    for module in model.modules():
        assert module.training
        if is_batch_norm(module):
            assert module.running_mean.abs().max() == 0
            assert module.num_batches_tracked == 0

    x = torch.randn(2, 5, 28, 28, requires_grad=True)
    model.eval()(x).sum().backward()

    assert x.grad is not None
    assert (x.grad.abs().amax(dim=(0, 2, 3)) > 0).all()


def test_unusable_output_of_a_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError(f"kernel larger than {tuple(x.shape[2:])}\nand a second line")

    too_small = r"cannot process an image of 28x28 .* \(28, 28\) and a second line$"
    no_vector = r"shape \(2, D\) for a batch of 2 examples, got \(2, 1, 28, 28\)$"
    for forward, message in ((refuse, too_small), (lambda self, x: x, no_vector)):
        monkeypatch.setattr("torchvision.models.ResNet.forward", forward)
        with pytest.raises(ModelError, match=f"^model torchvision:resnet18: .*{message}"):
            create_model("torchvision:resnet18", 10)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Return torchvision's ResNet-18 with random weights in place of pretrained ones."""
    import torchvision

    reference: nn.Module = torchvision.models.resnet18()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: reference.state_dict()
    )
    return reference


def test_torchvision_weights_are_loaded_and_converted(published: nn.Module) -> None:
    models = {
        channels: create_model("resnet18", 10, channels, 32, pretrained=True).eval()
        for channels in (1, 3, 5)
    }
    same = create_model("torchvision:resnet18", 10, 3, 32, pretrained=True).eval()
    first = published.conv1.weight[:, [0, 1, 2, 0, 1]] * 0.6
    published.fc = nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    gray = x[:, :1]

    assert torch.equal(models[3].forward_features(x), published.eval()(x))
    assert torch.equal(same.forward_features(x), published(x))
    assert torch.equal(models[5].backbone.conv1.weight, first)
    # summed weights on gray images equal gray repeated in three colors
    expected = published(gray.expand(2, 3, 32, 32))
    torch.testing.assert_close(models[1].forward_features(gray), expected, rtol=1e-4, atol=1e-5)


def test_torchvision_weights_of_a_vision_transformer_are_interpolated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torchvision

    reference = torchvision.models.vit_b_32(image_size=224, num_classes=1000)
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: reference.state_dict()
    )
    model = create_model("torchvision:vit_b_32", 3, 3, 64, pretrained=True)
    assert model.backbone.encoder.pos_embedding.shape == (1, 1 + 4, 768)
    assert torch.equal(model.backbone.conv_proj.weight, reference.conv_proj.weight)


def test_timm_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    reference = timm.create_model("resnet10t")
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_, **__: reference.state_dict()
    )
    grey = create_model("timm:resnet10t", 3, 1, 32, pretrained=True)
    torch.testing.assert_close(
        grey.backbone.conv1[0].weight, reference.conv1[0].weight.sum(1, keepdim=True)
    )
    assert torch.equal(grey.backbone.layer1[0].conv1.weight, reference.layer1[0].conv1.weight)


@pytest.mark.parametrize(
    ("name", "patched"),
    [
        ("resnet18", "torchvision.models._api.load_state_dict_from_url"),
        ("torchvision:squeezenet1_1", "torchvision.models._api.load_state_dict_from_url"),
        ("timm:resnet10t", "timm.models._builder.load_state_dict_from_hf"),
    ],
)
def test_failed_download_of_weights_raises_one_line(
    name: str, patched: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        print("Downloading: resnet18.pth")
        print("0%", file=sys.stderr)
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise URLError("Name or service not known")

    monkeypatch.setattr(patched, offline)
    hub = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(hub, "handlers", [logging.StreamHandler(logged := io.StringIO())])
    with pytest.raises(ModelError) as caught:
        create_model(name, 10, pretrained=True)
    assert str(caught.value).startswith(
        f"model {name}: pretrained: cannot load the pretrained weights: "
    )
    assert "Name or service not known" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert logged.getvalue() == ""
    hub.warning("heard")
    assert logged.getvalue() == "heard\n"  # muted for the download only


OWN_MODELS_MODULE = """
from torch import nn
from model_zoo import SplitModel

class Whole(SplitModel):
    def __init__(self, num_classes, in_channels, input_size, feature_dim=None, slope=0.1):
        width = feature_dim or 12
        h, w = input_size
        layer = nn.Linear(in_channels * h * w, width)
        body = nn.Sequential(nn.Flatten(), layer, nn.LeakyReLU(slope))
        super().__init__(body, nn.Linear(width, num_classes), width)

class Parts(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, num_classes)

class Anything(Whole):
    def __init__(self, **given):
        super().__init__(given["num_classes"], given["in_channels"], given["input_size"])
        self.given = given

class WrongHead(Parts):
    def __init__(self, num_classes):
        super().__init__(num_classes + 1)

class Headless(nn.Linear):
    def __init__(self, num_classes):
        super().__init__(3, num_classes)

class WrongWidth(SplitModel):
    def __init__(self, num_classes):
        super().__init__(Parts(2).backbone, nn.Linear(4, num_classes), 5)

class OddHead(SplitModel):
    def __init__(self, num_classes):
        super().__init__(Parts(2).backbone, nn.Linear(7, num_classes), 4)

class Broken(nn.Module):
    def __init__(self, num_classes):
        raise KeyError("first line\\nsecond line")

class Maps(SplitModel):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(1, 4, 3), nn.Linear(4, num_classes), 4)

class Pair(Whole):
    def forward(self, x):
        features = self.backbone(x)
        return self.head(features), features

class Data: pass
def function(num_classes, kernel=3): return Parts(num_classes)
number = 5
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "zoo_own_models.py").write_text(OWN_MODELS_MODULE)
    (tmp_path / "zoo_broken_module.py").write_text("raise OSError('disk on fire')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "python:zoo_own_models:"


def test_custom_classes_are_built(own: str) -> None:
    whole = create_model(own + "Whole", 3, 2, (5, 6), feature_dim=9, slope=0.2)
    parts = create_model(own + "Parts", 3)
    anything = create_model(own + "Anything", 3, input_size=4, depth=7)

    assert type(whole).__name__ == "Whole" and type(parts) is SplitModel
    assert whole.forward_features(torch.randn(4, 2, 5, 6)).shape == (4, 9)
    assert whole.backbone[2].negative_slope == 0.2
    assert model_options(own + "Whole") == {"slope": 0.1}
    assert parts.num_features == 4
    assert parts(torch.randn(2, 1, 28, 28)).shape == (2, 3)
    assert anything.given == {
        "num_classes": 3,
        "in_channels": 1,
        "input_size": (4, 4),
        "feature_dim": None,
        "depth": 7,
    }
    assert describe(own + "Parts").summary == "user-defined zoo_own_models:Parts"
    assert create_model(own + "function", 3, kernel=5).num_features == 4
    assert model_options(own + "function") == {"kernel": 3}


WRONG_OWN: list[tuple[str, dict[str, Any], str]] = [
    ("python:zoo_no_such_module:Net", {}, "cannot import zoo_no_such_module: ModuleNotFoundError"),
    ("python:zoo_broken_module:Net", {}, "cannot import zoo_broken_module: OSError: disk on fire"),
    ("python:zoo_own_models", {}, "expected python:package.module:Name"),
    ("python:", {}, "expected python:package.module:Name"),
    ("Whol", {}, r"has no 'Whol'; did you mean 'Whole'"),
    ("Whole", {"slop": 0.1}, r"unknown option 'slop'; did you mean 'slope'\?"),
    ("Parts", {"feature_dim": 9}, r"feature_dim: expected features of width 9, got 4"),
    ("Parts", {"pretrained": True}, r"pretrained: the class or function has no such argument"),
    ("Parts", {"input_size": ()}, r"cannot process a table row of 1 columns: "),
    (
        "WrongHead",
        {},
        r"head: expected logits of shape \(2, 3\) for a batch of 2 examples, got \(2, 4\)",
    ),
    ("OddHead", {}, r"cannot process an image of 28x28 pixels \(1 channels\): mat1 and mat2"),
    (
        "Headless",
        {},
        r"cannot process an image of 28x28 pixels \(1 channels\): ",
    ),
    ("number", {}, r"number in zoo_own_models: expected a class or a function, got int"),
    ("Data", {}, r"Data in zoo_own_models: expected a subclass of torch\.nn\.Module, or a func"),
    ("Pair", {}, r"Pair\.forward: expected the logits head\(backbone\(x\)\)"),
    ("WrongWidth", {}, r"feature_dim is 5, but the backbone returns 4 features"),
    ("Broken", {}, r"cannot create the model: KeyError: "),
    ("Maps", {}, r"shape \(2, D\) for a batch of 2 examples, got \(2, 4, 26, 26\)"),
]


@each_case(("what", "arguments", "message"), WRONG_OWN)
def test_invalid_custom_models_raise_one_line(
    what: Any, arguments: Any, message: Any, own: str
) -> None:
    name = what if what.startswith("python:") else own + what
    with pytest.raises(ModelError, match=message) as caught:
        create_model(name, 3, **arguments)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model {name}: ")


def test_description_of_external_models() -> None:
    assert describe("timm:resnet10t").summary == "resnet10t from timm"
    assert (
        describe("torchvision:densenet121").summary
        == "densenet121 from torchvision, images enlarged to 32x32"
    )


GROUP = "hetero_fl.models"
PLUGINS: Any = register_model.plugins
CODE = """
from torch import nn

class Tiny(nn.Module):
    def __init__(self, num_classes, in_channels, input_size, width=3):
        super().__init__()
        self.fc = nn.Linear(in_channels * input_size[0] * input_size[1], num_classes)

    def forward(self, x):
        return self.fc(x.flatten(1))

NOT_A_MODEL = 3
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Search for plug-ins again, and forget the modules of other tests."""
    for name in ("other_package", "second_package"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    PLUGINS.refresh()
    yield
    PLUGINS.refresh()


def test_model_of_a_plugin_is_created_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, {GROUP: {"tiny": "other_package:Tiny"}}, CODE)
    create_model("mlp", num_classes=2)
    assert "other_package" not in sys.modules

    model = create_model("tiny", num_classes=4, input_size=8)

    assert "other_package" in sys.modules
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 4)
    assert model_options("tiny") == {"width": 3}
    assert describe("tiny").summary == "from other_package 1.0"
    assert "tiny" in list_models() and list_models("ti*") == ["tiny"]
    with pytest.raises(ModelError, match="did you mean 'tiny'"):
        create_model("tinny", num_classes=2)


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


def test_broken_plugin_gives_one_warning_and_the_others_remain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"broken": "other_package:Missing", "tiny": "other_package:Tiny"}
    install(tmp_path, monkeypatch, {GROUP: broken}, CODE)

    with pytest.warns(PluginWarning) as caught:
        names = list_models()

    (line,) = [str(warning.message) for warning in caught]
    assert line.startswith("model 'broken' of other_package 1.0 cannot be loaded: AttributeError: ")
    assert line.endswith("; it is ignored") and "\n" not in line
    assert "tiny" in names and "broken" not in names and "resnet8" in names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list_models() == names


def test_naming_a_broken_plugin_raises_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, {GROUP: {"tiny": "other_package:Tiny"}}, "import not_installed")

    for _ in range(2):
        with pytest.raises(
            ModelError, match=r"^model tiny: model 'tiny' of other_package 1\.0 can"
        ):
            create_model("tiny", num_classes=2)


@pytest.mark.parametrize(
    ("place", "code", "message"),
    [
        (":NOT_A_MODEL", CODE, "not valid: expected a class or a function, got other_p"),
        (":Tiny", "raise SystemExit(3)", "cannot be loaded: SystemExit: 3"),
        ("", CODE, "expected module:object, got other_package"),
    ],
    ids=["no_model", "exit", "no_object"],
)
def test_plugin_that_is_no_model_is_refused(
    place: str, code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, {GROUP: {"tiny": f"other_package{place}"}}, code)

    with pytest.raises(PluginError, match=message):
        PLUGINS.load("tiny")


def test_plugin_does_not_replace_a_built_in_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, {GROUP: {"mlp": "other_package:Tiny"}}, CODE)

    with pytest.warns(
        PluginWarning, match=r"^model 'mlp' of other_package 1\.0: 'mlp' is a built-"
    ):
        list_models()

    assert type(create_model("mlp", num_classes=2)).__module__.startswith("model_zoo.")
    assert "other_package" not in sys.modules


def test_first_of_two_packages_provides_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, {GROUP: {"tiny": "other_package:Tiny"}}, CODE)
    second = {GROUP: {"tiny": "second_package:Tiny"}}
    install(tmp_path, monkeypatch, second, CODE, package="second_package")

    with pytest.warns(PluginWarning, match=r"second_package 1\.0: other_package 1\.0 also prov"):
        list_models()

    assert describe("tiny").summary == "from other_package 1.0"


def test_table_of_models_lists_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"tiny": "other_package:Tiny", "tiny_function": "other_package:broken"}
    code = CODE + "\ndef broken(num_classes):\n    raise RuntimeError('no images')\n"
    install(tmp_path, monkeypatch, {GROUP: names}, code)

    assert main(["tiny*"]) == 0
    out = capsys.readouterr().out
    assert "7,850" in out and "no images" in out
