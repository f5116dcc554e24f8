"""Models that other packages provide through entry points."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model_zoo import ModelError, create_model, describe, list_models, model_options, registry
from model_zoo.__main__ import main
from model_zoo.plugins import PluginError, PluginWarning
from tests.support.plugins import install

GROUP = "hetero_fl.models"
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
    registry.PLUGINS.refresh()
    yield
    registry.PLUGINS.refresh()


def test_model_of_a_plugin_is_created_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, {GROUP: {"tiny": "other_package:Tiny"}}, CODE)
    create_model("mlp", num_classes=2)
    assert "other_package" not in sys.modules

    model = create_model("tiny", num_classes=4, input_size=8)

    assert "other_package" in sys.modules
    assert model(torch.rand(2, 1, 8, 8)).logits.shape == (2, 4)
    assert model_options("tiny") == {"width": 3}
    assert describe("tiny").summary == "from other_package 1.0"
    assert "tiny" in list_models() and list_models("ti*") == ["tiny"]
    with pytest.raises(ModelError, match="did you mean 'tiny'"):
        create_model("tinny", num_classes=2)


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
        registry.PLUGINS.load("tiny")


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
