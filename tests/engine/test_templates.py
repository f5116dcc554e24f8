"""Module templates set training or evaluation mode exactly when it changes."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.templates import Template
from tests.support.cases import each_case


@pytest.fixture
def template() -> Template:
    return Template(
        ModelSpec.from_config("cnn_bn_small", 10, (1, 8, 8)), DeviceMemory(torch.device("cpu"))
    )


def modes(template: Template) -> set[bool]:
    return {module.training for module in template.module.modules()}


def test_mode_changes_are_passed_to_layers(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[bool] = []
    train = nn.Module.train
    full = template.module
    monkeypatch.setattr(
        nn.Module,
        "train",
        lambda self, mode=True: (self is full and passed.append(mode)) or train(self, mode),
    )
    for training in (True, True, False, False, True):
        template.set_mode(training)
        assert modes(template) == {training}
    # The first call is always passed on, because a module may override `train`.
    assert passed == [True, False, True]


def test_external_mode_change_is_detected(template: Template) -> None:
    template.set_mode(True)
    template.module.eval()
    template.set_mode(True)
    assert modes(template) == {True}
    template.module.eval()
    template.set_mode(False)
    assert modes(template) == {False}


@each_case("name", ["cnn_bn_small", "mlp"])
def test_returned_tensors_are_not_overwritten(name: str) -> None:
    arch = ModelSpec.from_config(name, 10, (1, 8, 8))
    template = Template(arch, DeviceMemory(torch.device("cpu")))
    first, second = (arch.initial_tensors(seed) for seed in (1, 2))
    template.load(first)
    taken = template.release_tensors(template.parameters)
    versions = {n: t._version for n, t in taken.items()}
    parameters = list(template.module.parameters())

    template.load(second)
    # Cached predictions of the returned model remain valid.
    assert {n: t._version for n, t in taken.items()} == versions

    assert all(t.is_contiguous() and not t.requires_grad for t in taken.values())
    assert all(torch.equal(t, first[n]) for n, t in taken.items())
    assert all(torch.equal(t, second[n]) for n, t in template.module.state_dict().items())
    assert all(a is b for a, b in zip(parameters, template.module.parameters(), strict=True))
    # A model may be trained in place again: loading copies into the module's memory.
    again = template.release_tensors(template.parameters)
    template.load(again)
    assert all(
        torch.equal(t, second[n]) for n, t in template.release_tensors(template.parameters).items()
    )


def test_returned_tensors_share_no_memory(template: Template) -> None:
    norms = [m for m in template.module.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].running_var = norms[0].running_mean
    norms[1].running_mean.data = norms[1].running_var.data

    taken = template.release_tensors(template.parameters)
    template.load({n: torch.full_like(t, 5) for n, t in taken.items()})

    assert not any(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        for a, b in combinations([*taken.values(), *template.tensors.values()], 2)
    )
