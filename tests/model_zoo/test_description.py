"""Costs of models and the table on the command line."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model_zoo import create_model, describe, list_models
from model_zoo.__main__ import main
from model_zoo.description import format_count


def test_parameters_add_up() -> None:
    about = describe("cnn_bn_small", feature_dim=20)
    model = create_model("cnn_bn_small", 10, feature_dim=20)
    assert about.parameters == sum(p.numel() for p in model.parameters())
    assert about.parameters == about.backbone_parameters + about.head_parameters
    assert about.head_parameters == 20 * 10 + 10
    assert (about.name, about.feature_dim, about.has_batch_norm) == ("cnn_bn_small", 20, True)
    assert not describe("cnn_gn_small").has_batch_norm
    with pytest.raises(dataclasses.FrozenInstanceError):
        about.parameters = 0


FLOPS = [  # two for each multiply-add, biases and activations not counted
    ("linear", {}, 2 * 784 * 10),
    ("mlp", {}, 2 * (784 * 128 + 128 * 10)),
    ("lenet", {}, 2 * (25 * 6 * 28 * 28 + 150 * 16 * 10 * 10 + 400 * 120 + 120 * 84 + 84 * 10)),
    ("gru", {}, 2 * (28 * (28 + 64) * 64 * 3 + 640)),
    ("lstm", {}, 2 * (28 * (28 + 64) * 64 * 4 + 640)),
    (
        "transformer",
        {"depth": 1, "width": 8, "heads": 2},
        2 * (28 * 28 * 8 + 28 * 8 * 64 + 2 * 28 * 28 * 8 + 80),
    ),
]


def test_flops_match_counts_by_hand() -> None:
    for name, options, flops in FLOPS:
        assert describe(name, **options).forward_flops == flops, name


def test_describe_allocates_no_memory_for_images() -> None:
    assert describe("cnn_gn_small", input_size=10**6).forward_flops > 10**12


def test_describe_keeps_the_random_state() -> None:
    state = torch.get_rng_state()
    describe("timm:resnet10t")
    describe("lenet")
    assert torch.equal(torch.get_rng_state(), state)


def test_description_prints_as_text() -> None:
    text = str(describe("resnet20", in_channels=3, input_size=32))
    assert text.splitlines()[0].startswith("resnet20: 16-32-64 channels")
    assert "272,474 (backbone 271,824, head 650)" in text
    # 40.55 M multiply-adds of the plain network, 0.26 M of the shortcuts
    assert "81.6 MFLOP per example" in text


def test_numbers_are_readable() -> None:
    numbers = (12, 1_500, 2_000_000, 3.6e9, 1e13)
    assert [format_count(number) for number in numbers] == ["12 ", "1.5 k", "2 M", "3.6 G", "10 T"]


def test_describe_command_prints_json_or_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cnn_bn_*", "--classes", "3"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in list_models("cnn_bn_*"))
    assert "6,099" in out  # the small one, with 3 classes
    assert main(["timm:resnet10*"]) == 0
    assert "timm:resnet10t" in capsys.readouterr().out.split()
    assert main(["tabular"]) == 0


def test_invalid_arguments_of_describe_raise_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = {
        ("nothing",): "no model matches 'nothing'",
        ("lenet", "--size", "5"): "at least 12x12",
    }
    for arguments, message in mistakes.items():
        assert main(list(arguments)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err
        assert err.count("\n") == 1
