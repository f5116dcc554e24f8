"""Text models: inputs, padding, causality and vmap."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from model_zoo import ModelError, Outputs, SplitModel, create_model, describe
from model_zoo.registry import MODELS

TEXT = [name for name in sorted(MODELS) if "tokens" in MODELS[name].kinds]
WORDS = 40


def make(name: str, length: int = 7, **options: object) -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, 5, 1, (length,), vocabulary=WORDS, **options).eval()


def texts(n: int = 4, length: int = 7) -> Tensor:
    return torch.randint(2, WORDS, (n, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TEXT)
def test_training_step_changes_every_parameter(name: str) -> None:
    model = make(name).train()
    x = texts()
    out = model(x)
    assert (
        isinstance(out, Outputs)
        and out.logits.shape == (4, 5)
        and out.features.shape == (4, model.feature_dim)
    )
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"backbone", "head"}
    F.cross_entropy(out.logits, torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert make(name, feature_dim=12)(x).features.shape == (4, 12)


@pytest.mark.parametrize("name", TEXT)
def test_outputs_do_not_depend_on_padding(name: str) -> None:
    x = texts()
    x[:, :3] = 0
    model = make(name)
    for place in (3, 6):
        other = x.clone()
        other[:, place] = (other[:, place] - 2 + 1) % (WORDS - 2) + 2
        assert not torch.allclose(model(x).logits, model(other).logits, atol=1e-5), place
    if name == "text_transformer":  # padding is masked
        with torch.no_grad():
            before = model(x).logits
            model.backbone.embedding.weight[0] += 1.0
            model.backbone.positions[:, :3] += 1.0
            assert torch.equal(model(x).logits, before)
    # empty text
    assert torch.isfinite(model(torch.zeros(2, 7, dtype=torch.int64)).logits).all()


def test_text_cnn_is_causal() -> None:
    backbone = make("text_cnn").backbone
    steps = backbone.embedding(texts()).transpose(1, 2)
    later = steps.clone()
    later[..., 4:] += 1.0
    assert torch.equal(backbone.layers(steps)[..., :4], backbone.layers(later)[..., :4])
    assert not torch.allclose(backbone.layers(steps)[..., 4:], backbone.layers(later)[..., 4:])


@pytest.mark.parametrize("name", [n for n in TEXT if n not in ("text_gru", "gru4rec")])
def test_vmap_in_training_equals_one_model_after_another(name: str) -> None:
    models = [create_model(name, 3, 1, (6,), vocabulary=WORDS).double() for _ in range(3)]
    single, x = copy.deepcopy(models), texts(12, 6).reshape(3, 4, 6)
    x[..., :2] = 0
    parameters, buffers = stack_module_state(models)

    def run(p: dict[str, Tensor], b: dict[str, Tensor], rows: Tensor) -> Tensor:
        logits: Tensor = functional_call(models[0], (p, b), (rows,)).logits
        return logits

    together = vmap(run)(parameters, buffers, x)
    together.square().sum().backward()
    for k, model in enumerate(single):
        one = model(x[k]).logits
        one.square().sum().backward()
        torch.testing.assert_close(together[k], one)
        for n, p in model.named_parameters():
            torch.testing.assert_close(parameters[n].grad[k], p.grad)


def test_invalid_options_raise_one_line() -> None:
    for call, words in (
        (lambda: create_model("text_gru", 5, 3, (7,)), "expected tokens, got a series of length 7"),
        (
            lambda: create_model("mlp", 5, 1, (7,), vocabulary=9),
            "expected table rows or series or images, got a text of 7",
        ),
        (
            lambda: create_model("text_cnn", 5, 1, (7,), vocabulary=1),
            "vocabulary: expected an integer >= 2, got 1",
        ),
        (
            lambda: create_model("text_cnn", 5, 1, 7, vocabulary=9),
            r"input_size: expected \(L,\) for texts of L tokens, got 7",
        ),
        (
            lambda: create_model("text_cnn", 5, 2, (7,), vocabulary=9),
            "in_channels: expected 1 for tokens, got 2",
        ),
        (
            lambda: create_model("text_transformer", 5, 1, (7,), vocabulary=9, heads=3),
            "expected a divisor of the width 64, got 3",
        ),
    ):
        with pytest.raises(ModelError, match=words) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_costs_of_text_models() -> None:
    about = describe("text_gru", 5, 1, (7,), vocabulary=WORDS, embedding=8, hidden=16)
    assert about.parameters == WORDS * 8 + 3 * 16 * (8 + 16 + 2) + 16 * 5 + 5
    assert about.forward_flops == 2 * (7 * 3 * 16 * (8 + 16) + 16 * 5)
