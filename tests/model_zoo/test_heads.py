"""Classifiers of any origin are split into a backbone and a head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model_zoo import ModelError, SplitModel, create_model
from model_zoo.given_models import GivenModel, redraw_weights
from model_zoo.heads import split_module
from model_zoo.shapes import Shape
from tests.support.models import Convolution

GRAY = Shape(1, (8, 8))


def test_timm_classifier_is_found() -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model("resnet10t", num_classes=4, in_chans=1)

    split = split_module(module, Shape(1, (32, 32)))

    assert split.head.out_features == 4 and split.feature_dim == 512


def test_feature_width_is_that_of_the_head() -> None:
    head = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))
    assert SplitModel(nn.Flatten(), head).feature_dim == 64
    assert split_module(Convolution(), GRAY, head="out").feature_dim == 10


def test_given_module_is_copied() -> None:
    module = Convolution()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    given = GivenModel(module)

    started = create_model(given.name, 3, 1, 8, pretrained=True)
    redrawn = create_model(given.name, 3, 1, 8)

    x = torch.rand(2, 1, 8, 8)
    assert torch.allclose(started(x).logits, module(x))
    assert not torch.allclose(redrawn(x).logits, module(x))
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

    wide = create_model(given.name, 7, 1, 8, width=6)

    assert wide.head.out_features == 7
    assert wide.state_dict()["backbone.conv.weight"].shape[0] == 6


def test_module_in_double_precision_is_converted() -> None:
    given = GivenModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double())
    model = create_model(given.name, num_classes=3, input_size=8)
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
        create_model(given.name, num_classes=3, input_size=8)
