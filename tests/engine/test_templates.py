"""Live modules are told of their mode when it changes, whoever set it before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.engine.templates import Template


@pytest.fixture
def template() -> Template:
    return Template(ModelSpec.from_config("cnn_bn_small", 10, (1, 8, 8)), torch.device("cpu"))


def modes(template: Template) -> set[bool]:
    return {module.training for module in template.module.modules()}


def test_layers_are_told_of_the_mode_when_it_changes(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    train = nn.Module.train
    whole = template.module
    monkeypatch.setattr(
        nn.Module,
        "train",
        lambda self, mode=True: (self is whole and told.append(mode)) or train(self, mode),
    )
    for training in (True, True, False, False, True):
        template.set_mode(training)
        assert modes(template) == {training}
    # the first time even where the module says so already: `train` may do more
    assert told == [True, False, True]


def test_a_mode_that_somebody_else_set_is_noticed(template: Template) -> None:
    template.set_mode(True)
    template.module.eval()
    template.set_mode(True)
    assert modes(template) == {True}
    template.module.eval()
    template.set_mode(False)
    assert modes(template) == {False}
