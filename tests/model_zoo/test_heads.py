"""Classifiers of any origin are split into a backbone and a head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model_zoo import ModelError, SplitModel, create_model
from model_zoo.given_models import GivenModel, redraw_weights
from model_zoo.heads import split_module
from model_zoo.shapes import Shape

GRAY = Shape(1, (8, 8))


class Net(nn.Module):
    """A convolutional network in the style of the PyTorch tutorials."""

    def __init__(self, num_classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.fc1 = nn.Linear(36 * width, 10)
        self.out = nn.Linear(10, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc1(self.conv(x).relu().flatten(1)).relu())  # type: ignore[no-any-return]


class WithFc(Net):
    """A network whose `fc` is its head, although it has another linear layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 3)
        self.auxiliary = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc1(self.conv(x).relu().flatten(1)).relu())  # type: ignore[no-any-return]


class Softmax(Net):
    """A network that returns log probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(1)


class Pooled(nn.Module):
    """A network with `backbone` and `head`, and an operation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("module", "path"), [(Net(), "out"), (WithFc(), "fc"), (Pooled(), "head")], ids=repr
)
def test_parts_compute_the_logits_of_the_model(module: nn.Module, path: str) -> None:
    x = torch.rand(5, 1, 8, 8)
    expected = module(x)

    split = split_module(module, GRAY)

    logits, features = split(x)
    assert torch.allclose(logits, expected)
    assert features.shape == (5, split.feature_dim)
    assert split.head_path == path
    assert all(name.startswith(("backbone.", "head.")) for name in split.state_dict())


def test_head_can_be_named() -> None:
    assert split_module(WithFc(), GRAY, head="fc").feature_dim == 10
    with pytest.raises(ModelError, match=r"no submodule 'ou'; did you mean 'out'"):
        split_module(Net(), GRAY, "ou")


def test_named_head_must_be_the_last_layer() -> None:
    square = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with pytest.raises(ModelError, match="outputs are not those of its submodule '1'"):
        split_module(square, GRAY, head="1")


def test_operation_after_the_head_is_refused() -> None:
    with pytest.raises(ModelError, match="outputs are not those of its submodule 'out'"):
        split_module(Softmax(), GRAY)


def test_model_whose_layers_do_not_compute_its_outputs_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no layer .* pass SplitModel"):
        split_module(nn.AvgPool2d(8), GRAY)
    with pytest.raises(ModelError, match="outputs are not those of its submodule '0'"):
        split_module(nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()), GRAY)


def test_timm_classifier_is_found() -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model("resnet10t", num_classes=4, in_chans=1)

    split = split_module(module, Shape(1, (32, 32)))

    assert split.head.out_features == 4 and split.feature_dim == 512


def test_feature_width_is_that_of_the_head() -> None:
    assert (
        SplitModel(nn.Flatten(), nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))).feature_dim == 64
    )
    with pytest.raises(ModelError, match="not known"):
        _ = SplitModel(nn.Flatten(), nn.Identity()).feature_dim


def test_given_module_is_copied() -> None:
    module = Net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    given = GivenModel(module)

    started = create_model(given.name, 3, 1, 8, pretrained=True)
    redrawn = create_model(given.name, 3, 1, 8)

    x = torch.rand(2, 1, 8, 8)
    assert torch.allclose(started(x).logits, module(x))
    assert not torch.allclose(redrawn(x).logits, module(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_equal_architectures_have_equal_names() -> None:
    first, second, wider = (GivenModel(net) for net in (Net(), Net(), Net(width=5)))
    frozen = Net()
    frozen.conv.weight.requires_grad_(False)

    assert first.name == second.name
    assert len({first.name, wider.name, GivenModel(frozen).name}) == 3
    assert GivenModel(Net).name != first.name


def test_class_receives_the_arguments_that_it_accepts() -> None:
    given = GivenModel(Net)
    assert create_model(given.name, 7, 1, 8).head.out_features == 7
    wide = create_model(given.name, 7, 1, 8, width=6)
    assert wide.state_dict()["backbone.conv.weight"].shape[0] == 6


def test_forgotten_model_is_refused() -> None:
    name = GivenModel(Net()).name
    with pytest.raises(ModelError, match="was an object of a Python program"):
        create_model(name, 3, 1, 8)


def test_redrawn_weights_name_the_parameters_that_stay() -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    assert redraw_weights(Scaled()) == ["scale"]


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="got str"):
        GivenModel("resnet18")  # type: ignore[arg-type]


def test_module_without_weights_is_refused() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ModelError, match="no weights"):
        GivenModel(module)


def test_module_in_double_precision_is_converted() -> None:
    given = GivenModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double())
    model = create_model(given.name, num_classes=3, input_size=8)
    assert model.head.weight.dtype == torch.float32


def test_model_that_returns_a_dictionary_is_refused() -> None:
    class Named(nn.Sequential):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": super().forward(x)}

    given = GivenModel(Named(nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(ModelError, match="expected a model that returns logits, got dict"):
        create_model(given.name, num_classes=3, input_size=8)
