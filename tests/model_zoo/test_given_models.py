"""Given modules: their head, their names, and trials in both modes before a run."""

from __future__ import annotations

import copy
import functools
import random
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

import hetero_fl as hfl
from hetero_fl.core.given_models import GivenModel, redraw_weights
from hetero_fl.utils.errors import UserError
from model_zoo import ModelError, SplitModel, create_model, describe
from model_zoo.generators import generator_hash
from model_zoo.heads import split_module
from model_zoo.shapes import Shape
from tests.support.cases import each_case
from tests.support.models import Convolution
from tests.support.python_federations import QUIET

ROW = Shape(6, ())


class Net(nn.Module):
    """A perceptron for two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 8)
        self.cls = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.cls(self.hidden(x).relu())


class Projected(Net):
    """A network whose last declared linear layer is its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(6, 6)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.projection(x))


class Unused(Net):
    """A network with a layer for pretraining, and two names for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = self.cls
        self.projection = nn.Linear(8, 4)


class Auxiliary(Unused):
    """A network that calls another linear layer after its head."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        z = self.hidden(x).relu()
        logits = self.cls(z)
        self.projection(z)
        return logits


class Several(Net):
    """A network with several heads, of which the first one is used."""

    def __init__(self) -> None:
        super().__init__()
        del self.cls
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 5)])

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.heads[0](self.hidden(x).relu())


class BatchStatistics(Net):
    """A network that needs at least two examples in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Centered(Net):
    """A network that subtracts the mean of the batch, in both modes."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Noisy(Net):
    """A network that draws from three generators, in both modes."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(1) + np.random.rand() + random.random()
        return super().forward(x + noise.float())


class Scaled(Net):
    """A network with a scale after its head, which is one at first."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 2)
        self.cls = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(()))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class ScaledInPlace(Scaled):
    @override
    def forward(self, x: Tensor) -> Tensor:
        logits = Net.forward(self, x)
        logits *= self.scale
        return logits


class Bounded(Net):
    """A network whose outputs have bounds that the initial outputs do not reach."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-50, 50)


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


class OwnGenerator(Net):
    """A network that draws from a generator that no federation seeds."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + OWN_GENERATOR.random())


OWN_GENERATOR = random.Random(0)


class TupleInTraining(Net):
    @override
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return (logits, logits) if self.training else logits  # type: ignore[return-value]


class ScaledInTraining(Net):
    @override
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits.log_softmax(1) if self.training else logits


class FailsInTraining(Net):
    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise IndexError("two\nlines")
        return super().forward(x)


class Exits(Net):
    @override
    def forward(self, x: Tensor) -> Tensor:
        sys.exit(3)


def rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    y = np.arange(40) % 2
    return np.random.default_rng(seed).random((40, 6), dtype="float32"), y


def train(module: nn.Module | type[nn.Module]) -> hfl.Run:
    clients = [hfl.Client(name, module, rows(i)) for i, name in enumerate("ab")]
    return hfl.Federation(clients).train(hfl.FedAvg(), rounds=1, overrides=QUIET, quiet=True)


def test_head_is_the_layer_that_computes_the_outputs(subtests: pytest.Subtests) -> None:
    for module, path in (
        (Projected(), "cls"),
        (Unused(), "cls"),
        (Auxiliary(), "cls"),
        (Several(), "heads.0"),
        (BatchStatistics(), "cls"),
        (Noisy(), "cls"),
        (nn.Linear(6, 2), ""),
    ):
        with subtests.test(path=path):
            x = torch.rand(5, 6)
            names = set(module.state_dict())
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            expected = module(x)

            split = split_module(module, ROW)

            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            assert torch.allclose(split(x), expected)
            assert split.head_path == path
            assert split.source_module() is module
            assert set(module.state_dict()) == names


def test_operation_after_the_head_that_shows_later_is_refused(subtests: pytest.Subtests) -> None:
    for module in (Scaled(), ScaledInPlace(), Bounded(), ScaledParts(last=True)):
        with subtests.test(module=module):
            before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

            message = r"not those of its submodule '(cls|head)'; .* another submodule, as in head="
            with pytest.raises(ModelError, match=message):
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
        split_module(OwnGenerator(), ROW)


def test_two_names_of_the_head_are_one_tensor() -> None:
    split = split_module(Unused(), ROW)

    assert sum(tensor.shape == (2, 8) for tensor in split.state_dict().values()) == 1
    assert not any(name.startswith("backbone.alias") for name in split.state_dict())


def test_models_that_plain_torch_trains_are_trained() -> None:
    for model in (Projected, BatchStatistics, nn.Linear(6, 2)):
        assert train(model).summary["rounds_completed"] == 1


@pytest.mark.parametrize("model", [Centered, BatchStatistics])
def test_batches_of_models_that_mix_rows_are_not_padded(model: type[nn.Module]) -> None:
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


@each_case(
    ("model", "message"),
    (
        (TupleInTraining, "a Tensor in evaluation mode, but a tuple in training mode; return"),
        (ScaledInTraining, "in training mode, the model's outputs are not those of its .*'cls'"),
        (FailsInTraining, "in training mode: cannot process a table row of 6 columns: two lines"),
        (Exits, "cannot process a table row of 6 columns: SystemExit: 3"),
    ),
)
def test_model_that_cannot_be_trained_is_refused_in_one_line(model: Any, message: str) -> None:
    with pytest.raises(
        UserError, match=rf"^clients: 'a': model: .*{model.__name__}.*{message}"
    ) as info:
        train(model)

    assert "\n" not in str(info.value)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("googlenet", 32), ("inception_v3", 80)])
def test_auxiliary_outputs_of_torchvision_are_refused_with_advice(name: str, size: int) -> None:
    models = pytest.importorskip("torchvision.models")
    module = models.get_model(name, num_classes=2, init_weights=False)
    y = np.arange(40) % 2
    x = np.random.default_rng(0).integers(0, 255, (40, 3, size, size), dtype=np.uint8)
    federation = hfl.Federation([hfl.Client(name, module, (x, y)) for name in "ab"])

    with pytest.raises(UserError, match=r"training mode.*; create it with aux_logits=False$"):
        federation.train(hfl.FedAvg(), rounds=1, overrides=QUIET, quiet=True)


def test_probes_do_not_change_the_weights_or_the_generators() -> None:
    module = nn.Sequential(nn.BatchNorm1d(6), Noisy())
    given = GivenModel(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    states = (torch.get_rng_state(), generator_hash())

    describe(given, 2, 6, ())
    split = given.build(ROW)

    after = split.source_module().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert generator_hash() == states[1]


def test_operations_are_counted_for_one_example() -> None:
    assert describe("linear", 3, 6, ()).forward_flops == 2 * 6 * 3
    given = GivenModel(BatchStatistics())
    assert describe(given, 2, 6, ()).forward_flops == 2 * (6 * 8 + 8 * 2)


GRAY = Shape(1, (8, 8))


def test_timm_classifier_is_found() -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model("resnet10t", num_classes=4, in_chans=1)

    split = split_module(module, Shape(1, (32, 32)))

    assert split.head.out_features == 4 and split.num_features == 512


def test_feature_width_is_that_of_the_head() -> None:
    head = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))
    assert SplitModel(nn.Flatten(), head).num_features == 64
    assert split_module(Convolution(), GRAY, head="out").num_features == 10


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


def test_equal_architectures_have_equal_names() -> None:
    first, second, wider = (GivenModel(Convolution(width=width)) for width in (4, 4, 5))
    frozen = Convolution()
    frozen.conv.weight.requires_grad_(False)

    assert first.name == second.name
    assert len({first.name, wider.name, GivenModel(frozen).name}) == 3
    assert GivenModel(Convolution).name != first.name


def test_class_receives_the_arguments_that_it_accepts() -> None:
    given = GivenModel(Convolution)

    wide = create_model(given, 7, 1, 8, width=6)

    assert wide.head.out_features == 7
    assert wide.state_dict()["backbone.conv.weight"].shape[0] == 6


def test_module_in_double_precision_is_converted() -> None:
    given = GivenModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double())
    model = create_model(given, num_classes=3, input_size=8)
    assert model.head.weight.dtype == torch.float32


def test_redrawn_weights_name_the_parameters_that_stay() -> None:
    class Scaled(Convolution):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    assert redraw_weights(Scaled()) == ["scale"]


def test_model_that_returns_a_dictionary_is_refused() -> None:
    class Named(nn.Sequential):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": super().forward(x)}

    given = GivenModel(Named(nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(ModelError, match="expected a model that returns logits, got dict"):
        create_model(given, num_classes=3, input_size=8)


class Scalable(nn.Module):
    def __init__(
        self, act: Callable[[Tensor], Tensor] = F.relu, scale: float = 1.0, options: Any = None
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 6)
        self.out = nn.Linear(6, 2)
        self.act = act
        self.options = options
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.hidden(x)) * self.scale)  # type: ignore[no-any-return]


def double(x: Tensor) -> Tensor:
    return 2 * x


def name(module: nn.Module) -> tuple[str, GivenModel]:
    given = GivenModel(module)
    return given.name, given


def make_double() -> Callable[[Tensor], Tensor]:
    return lambda x: 2 * x


def test_modules_that_differ_have_different_names(subtests: pytest.Subtests) -> None:
    for first, second in (
        (Scalable(F.relu), Scalable(F.gelu)),
        (Scalable(double), Scalable(lambda x: 2 * x)),
        (Scalable(make_double()), Scalable(make_double())),
        (Scalable(functools.partial(F.leaky_relu, negative_slope=0.1)), Scalable(F.leaky_relu)),
        (Scalable(scale=1.0), Scalable(scale=3.0)),
        (Scalable(options=[0, 1]), Scalable(options=[2, 3])),
        (Scalable(options={"a": 1}), Scalable(options={"a": 2})),
        (Scalable(options=torch.zeros(2)), Scalable(options=torch.ones(2))),
        (Scalable(options=None), Scalable(options={1})),
    ):
        with subtests.test(first=first):
            one, kept = name(first)
            other, also_kept = name(second)

            assert one != other
            assert kept.is_instance and also_kept.is_instance


def test_equal_modules_have_one_name(subtests: pytest.Subtests) -> None:
    for make in (
        Scalable,
        lambda: Scalable(double, options={"widths": [1, 2], "kind": torch.float32}),
        lambda: Scalable(functools.partial(F.leaky_relu, negative_slope=0.1)),
        lambda: copy.deepcopy(Scalable(options={3, 1, 2})),
        lambda: Scalable(options=nn.LSTM(1, 4)),
        lambda: copy.deepcopy(Scalable(options=nn.GRU(1, 4, num_layers=2, bidirectional=True))),
        lambda: Scalable(options=weakref.ref(double)),
    ):
        with subtests.test(make=make):
            one, kept = name(make())
            other, also_kept = name(make())

            assert one == other
            assert kept is not also_kept


def test_a_shared_lambda_is_one_architecture() -> None:
    act = make_double()

    one, kept = name(Scalable(act))
    other, also_kept = name(copy.deepcopy(Scalable(act)))

    assert one == other
    assert kept is not also_kept


def test_redrawing_keeps_frozen_layers() -> None:
    net = Scalable()
    net.hidden.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())

    redraw_weights(net)

    assert torch.equal(net.hidden.weight, before["hidden.weight"])
    assert not torch.equal(net.out.weight, before["out.weight"])
