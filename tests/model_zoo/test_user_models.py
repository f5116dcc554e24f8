"""Models of users: their head, their names, and trials in both modes before a run."""

from __future__ import annotations

import copy
import functools
import random
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hetero_fl as hfl
from hetero_fl.core.given_models import GivenModel, redraw_weights
from hetero_fl.utils.errors import UserError
from model_zoo import ModelError, SplitModel, create_model, describe, model_options
from model_zoo.generators import generator_hash
from model_zoo.heads import split_module
from model_zoo.shapes import Shape
from tests.support.cases import each_case
from tests.support.models import Convolution
from tests.support.python_federations import QUIET

ROW = Shape(6, ())
GRAY = Shape(1, (8, 8))
OWN_GENERATOR = random.Random(0)


def unchanged(net: Any, x: Tensor) -> Tensor:
    return x


class Net(nn.Module):
    """A perceptron for two classes, with functions before and after it that may use its parts."""

    def __init__(
        self,
        before: Callable[[Any, Tensor], Tensor] = unchanged,
        after: Callable[[Any, Tensor], Any] = unchanged,
        width: int = 8,
        **parts: Any,
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, width)
        self.cls = nn.Linear(width, 2)
        self.before, self.after = before, after
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.after(self, self.cls(self.hidden(self.before(self, x)).relu()))


class ScaledParts(nn.Module):
    """A network with `backbone` and `head`, and a scale between them, which is one at first."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.backbone = nn.Linear(6, 2)
        self.head = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        if self.last:
            return self.head(features) * self.scale  # type: ignore[no-any-return]
        return self.head(features * self.scale)  # type: ignore[no-any-return]


def add_noise(net: Any, x: Tensor) -> Tensor:
    return x + torch.rand(1) + float(np.random.rand()) + random.random()


def seed_all() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def batch_statistics() -> Net:
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    return Net(lambda net, x: net.norm(x), norm=norm)


def centered() -> Net:
    return Net(lambda net, x: x - x.mean(0))


HEADS: list[tuple[nn.Module, str]] = [
    (Net(), "cls"),
    (Net(lambda net, x: net.projection(x), projection=nn.Linear(6, 6)), "cls"),
    (Net(after=lambda net, z: (net.other(torch.zeros(2, 6)), z)[1], other=nn.Linear(6, 4)), "cls"),
    (
        Net(
            after=lambda net, z: net.heads[0](z),
            heads=nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 5)]),
        ),
        "heads.0",
    ),
    (batch_statistics(), "cls"),
    (Net(add_noise), "cls"),
    (nn.Linear(6, 2), ""),
]


@each_case(("module", "path"), HEADS)
def test_head_is_the_layer_that_computes_the_outputs(module: nn.Module, path: str) -> None:
    x = torch.rand(5, 6)
    names = set(module.state_dict())
    seed_all()
    expected = module(x)

    split = split_module(module, ROW)

    seed_all()
    assert torch.allclose(split(x), expected)
    assert split.head_path == path
    assert split.source_module() is module and set(module.state_dict()) == names


def one() -> nn.Parameter:
    return nn.Parameter(torch.ones(()))


@each_case(
    "module",
    [
        Net(after=lambda net, z: z * net.scale, width=2, scale=one()),
        Net(after=lambda net, z: z.mul_(net.scale), width=2, scale=one()),
        Net(after=lambda net, z: z.clamp(-50, 50)),
        ScaledParts(last=True),
    ],
)
def test_operation_after_the_head_that_shows_later_is_refused(module: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    with pytest.raises(
        ModelError,
        match=r"not those of its submodule '(cls|head)'; .* another submodule, as in head=",
    ):
        split_module(module, ROW)

    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_weights_between_backbone_and_head_are_kept() -> None:
    module = ScaledParts(last=False)
    split = split_module(module, ROW)
    with torch.no_grad():
        module.scale.fill_(3.0)
    x = torch.rand(5, 6)

    logits = split(x)

    assert torch.allclose(split.source_module()(x), logits)


def test_draws_from_an_own_generator_are_named() -> None:
    with pytest.raises(ModelError, match=r"different outputs for equal inputs; draw .* global"):
        split_module(Net(lambda net, x: x + OWN_GENERATOR.random()), ROW)


def test_two_names_of_the_head_are_one_tensor() -> None:
    module = Net()
    module.alias = module.cls

    split = split_module(module, ROW)

    assert sum(tensor.shape == (2, 8) for tensor in split.state_dict().values()) == 1
    assert not any(name.startswith("backbone.alias") for name in split.state_dict())


def test_width_of_the_features_is_that_of_the_head() -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model("resnet10t", num_classes=4, in_chans=1)
    assert split_module(module, Shape(1, (32, 32))).num_features == 512
    head = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))
    assert SplitModel(nn.Flatten(), head).num_features == 64
    assert split_module(Convolution(), GRAY, head="out").num_features == 10


def test_probes_do_not_change_the_weights_or_the_generators() -> None:
    module = nn.Sequential(nn.BatchNorm1d(6), Net(add_noise))
    given = GivenModel(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    states = (torch.get_rng_state(), generator_hash())

    describe(given, 2, 6, ())
    split = given.build(ROW)

    after = split.source_module().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert generator_hash() == states[1]
    given = GivenModel(batch_statistics())
    assert describe(given, 2, 6, ()).forward_flops == 2 * (6 * 8 + 8 * 2)


def rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    y = np.arange(40) % 2
    return np.random.default_rng(seed).random((40, 6), dtype="float32"), y


def train(model: Any) -> hfl.Run:
    clients = [hfl.Client(name, model, rows(i)) for i, name in enumerate("ab")]
    return hfl.Federation(clients).train(hfl.FedAvg(), rounds=1, overrides=QUIET, quiet=True)


def fail_in_training(net: Any, x: Tensor) -> Tensor:
    if net.training:
        raise IndexError("two\nlines")
    return x


@each_case(
    ("before", "after", "message"),
    (
        (
            unchanged,
            lambda net, z: (z, z) if net.training else z,
            "a Tensor in evaluation mode, but a tuple in training mode; return the same logits",
        ),
        (
            unchanged,
            lambda net, z: z.log_softmax(1) if net.training else z,
            "in training mode, the model's outputs are not those of its .*'cls'",
        ),
        (
            fail_in_training,
            unchanged,
            "in training mode: cannot process a table row of 6 columns: two lines",
        ),
        (
            lambda net, x: sys.exit(3),
            unchanged,
            "cannot process a table row of 6 columns: SystemExit: 3",
        ),
    ),
)
def test_model_that_cannot_be_trained_is_refused_in_one_line(
    before: Any, after: Any, message: str
) -> None:
    for model in (Net(before, after), lambda: Net(before, after)):
        with pytest.raises(UserError, match=rf"^clients: 'a': model: .*{message}") as info:
            train(model)

        assert "\n" not in str(info.value)


def test_models_that_plain_torch_trains_are_trained() -> None:
    for model in (batch_statistics, nn.Linear(6, 2)):
        assert train(model).summary["rounds_completed"] == 1


@each_case("model", [centered, batch_statistics])
def test_batches_of_models_that_mix_rows_are_not_padded(model: Callable[[], nn.Module]) -> None:
    data = [rows(0), rows(1), tuple(part[:33] for part in rows(2))]
    clients = [hfl.Client(f"c{i}", model, own, batch_size=16) for i, own in enumerate(data)]

    runs = [
        hfl.Federation(clients).train(
            hfl.Local(), rounds=2, overrides=[*QUIET, executor], quiet=True
        )
        for executor in ("runtime.executor=serial", "runtime.executor=batched")
    ]

    losses = [run.summary["personal"]["last"]["loss"] for run in runs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    for name, tensor in runs[0].models["c2"].tensors.items():
        assert torch.allclose(tensor, runs[1].models["c2"].tensors[name], atol=1e-6), name


def test_given_module_is_copied() -> None:
    module = Convolution()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    given = GivenModel(module)

    started = create_model(given, 3, 1, 8, pretrained=True)
    redrawn = create_model(given, 3, 1, 8)

    x = torch.rand(2, 1, 8, 8)
    assert torch.allclose(started(x), module(x))
    assert not torch.allclose(redrawn(x), module(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    wide = create_model(GivenModel(Convolution), 7, 1, 8, width=6)
    assert wide.head.out_features == 7
    assert wide.state_dict()["backbone.conv.weight"].shape[0] == 6
    double = GivenModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double())
    assert create_model(double, 3, input_size=8).head.weight.dtype == torch.float32


def test_redrawn_weights_leave_frozen_and_unknown_parameters() -> None:
    net = Net(scale=one())
    net.hidden.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())

    assert redraw_weights(net) == ["scale"]

    assert torch.equal(net.hidden.weight, before["hidden.weight"])
    assert not torch.equal(net.cls.weight, before["cls.weight"])


def scalable(act: Callable[..., Tensor] = F.relu, scale: float = 1.0, options: Any = None) -> Net:
    net = Net(act=act, options=options)
    net.register_buffer("scale", torch.tensor(scale), persistent=False)
    return net


def double(x: Tensor) -> Tensor:
    return 2 * x


def make_double() -> Callable[[Tensor], Tensor]:
    return lambda x: 2 * x


def frozen() -> Net:
    net = scalable()
    net.cls.requires_grad_(False)
    return net


@each_case(
    ("first", "second"),
    (
        (scalable(), frozen()),
        (Net(width=8), Net(width=9)),
        (scalable(F.relu), scalable(F.gelu)),
        (scalable(double), scalable(lambda x: 2 * x)),
        (scalable(make_double()), scalable(make_double())),
        (scalable(functools.partial(F.leaky_relu, negative_slope=0.1)), scalable(F.leaky_relu)),
        (scalable(scale=1.0), scalable(scale=3.0)),
        (scalable(options=[0, 1]), scalable(options=[2, 3])),
        (scalable(options={"a": 1}), scalable(options={"a": 2})),
        (scalable(options=torch.zeros(2)), scalable(options=torch.ones(2))),
        (scalable(options=None), scalable(options={1})),
    ),
)
def test_modules_that_differ_have_different_names(first: Net, second: Net) -> None:
    pair = GivenModel(first), GivenModel(second)

    assert pair[0].name != pair[1].name
    assert GivenModel(Net).name not in (pair[0].name, pair[1].name)


LAMBDA = make_double()


@each_case(
    "make",
    (
        scalable,
        lambda: scalable(double, options={"widths": [1, 2], "kind": torch.float32}),
        lambda: scalable(functools.partial(F.leaky_relu, negative_slope=0.1)),
        lambda: copy.deepcopy(scalable(options={3, 1, 2})),
        lambda: scalable(options=nn.LSTM(1, 4)),
        lambda: copy.deepcopy(scalable(options=nn.GRU(1, 4, num_layers=2, bidirectional=True))),
        lambda: scalable(options=weakref.ref(double)),
        lambda: copy.deepcopy(scalable(LAMBDA)),
    ),
)
def test_equal_modules_have_one_name(make: Callable[[], nn.Module]) -> None:
    pair = GivenModel(make()), GivenModel(make())

    assert pair[0].name == pair[1].name


OWN_MODELS_MODULE = """
from shutil import copytree
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

class Named(Parts):
    def forward(self, x):
        return {"logits": self.head(self.backbone(x))}

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


def test_classes_and_functions_of_a_file_are_called(own: str) -> None:
    whole = create_model(own + "Whole", 3, 2, (5, 6), feature_dim=9, slope=0.2)
    anything = create_model(own + "Anything", 3, input_size=4, depth=7)

    assert type(whole).__name__ == "Whole" and whole.backbone[2].negative_slope == 0.2
    assert whole.forward_features(torch.randn(4, 2, 5, 6)).shape == (4, 9)
    assert model_options(own + "Whole") == {"slope": 0.1}
    sizes = {"num_classes": 3, "in_channels": 1, "input_size": (4, 4), "feature_dim": None}
    assert anything.given == {**sizes, "depth": 7}
    for name, options in (("Parts", {}), ("function", {"kernel": 5})):
        model = create_model(own + name, 3, **options)
        assert type(model) is SplitModel and model.num_features == 4
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, 3)
        assert describe(own + name).summary == f"user-defined zoo_own_models:{name}"


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
    ("Headless", {}, r"cannot process an image of 28x28 pixels \(1 channels\): "),
    ("number", {}, r"number in zoo_own_models is not a subclass of torch\.nn\.Module, or a func"),
    ("Data", {}, r"Data in zoo_own_models is not a subclass of torch\.nn\.Module, or a function"),
    ("copytree", {}, r"copytree in zoo_own_models is not a .*, or a function that the module def"),
    ("Pair", {}, r"Pair\.forward: expected the logits head\(backbone\(x\)\)"),
    ("Named", {}, "expected a model that returns logits, got dict"),
    ("WrongWidth", {}, r"feature_dim is 5, but the backbone returns 4 features"),
    ("Broken", {}, r"cannot create the model: KeyError: "),
    ("Maps", {}, r"shape \(2, D\) for a batch of 2 examples, got \(2, 4, 26, 26\)"),
]


@each_case(("what", "arguments", "message"), WRONG_OWN)
def test_invalid_models_of_a_file_raise_one_line(
    what: str, arguments: Any, message: str, own: str
) -> None:
    name = what if what.startswith("python:") else own + what
    with pytest.raises(ModelError, match=message) as caught:
        create_model(name, 3, **arguments)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model {name}: ")
