"""Text models: inputs, padding, causality and vmap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model_zoo import Outputs, SplitModel, create_model, describe
from model_zoo.registry import MODELS
from tests.support.cases import each_case
from tests.support.models import check_vmap

TEXT = [name for name in sorted(MODELS) if "tokens" in MODELS[name].kinds]
WORDS = 40


def make(name: str, length: int = 7, **options: object) -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, 5, 1, (length,), vocabulary=WORDS, **options).eval()


def texts(n: int = 4, length: int = 7) -> Tensor:
    return torch.randint(2, WORDS, (n, length), generator=torch.Generator().manual_seed(1))


@each_case("name", TEXT)
def test_training_step_changes_every_parameter(name: Any) -> None:
    model = make(name).train()
    x = texts()
    out = model(x)
    assert isinstance(out, Outputs)
    assert out.logits.shape == (4, 5)
    assert out.features.shape == (4, model.feature_dim)
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"backbone", "head"}
    F.cross_entropy(out.logits, torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert make(name, feature_dim=12)(x).features.shape == (4, 12)


def test_outputs_do_not_depend_on_padding(subtests: pytest.Subtests) -> None:
    x = texts()
    x[:, :3] = 0
    for name in TEXT:
        with subtests.test(name=name):
            model = make(name)
            for place in (3, 6):
                other = x.clone()
                other[:, place] = (other[:, place] - 2 + 1) % (WORDS - 2) + 2
                assert not torch.allclose(model(x).logits, model(other).logits, atol=1e-5), place
            # empty text
            assert torch.isfinite(model(torch.zeros(2, 7, dtype=torch.int64)).logits).all()


def test_padding_of_the_text_transformer_is_masked() -> None:
    x = texts()
    x[:, :3] = 0
    model = make("text_transformer")
    with torch.no_grad():
        before = model(x).logits
        model.backbone.embedding.weight[0] += 1.0
        model.backbone.positions[:, :3] += 1.0
        assert torch.equal(model(x).logits, before)


def test_text_cnn_is_causal() -> None:
    backbone = make("text_cnn").backbone
    steps = backbone.embedding(texts()).transpose(1, 2)
    later = steps.clone()
    later[..., 4:] += 1.0
    assert torch.equal(backbone.layers(steps)[..., :4], backbone.layers(later)[..., :4])
    assert not torch.allclose(backbone.layers(steps)[..., 4:], backbone.layers(later)[..., 4:])


@each_case("name", set(TEXT) - {"text_gru", "gru4rec"})
def test_vmap_in_training_equals_one_model_after_another(name: Any) -> None:
    x = texts(12, 6).reshape(3, 4, 6)
    x[..., :2] = 0
    check_vmap([create_model(name, 3, 1, (6,), vocabulary=WORDS) for _ in range(3)], x)


def test_costs_of_text_models() -> None:
    about = describe("text_gru", 5, 1, (7,), vocabulary=WORDS, embedding=8, hidden=16)
    assert about.parameters == WORDS * 8 + 3 * 16 * (8 + 16 + 2) + 16 * 5 + 5
    assert about.forward_flops == 2 * (7 * 3 * 16 * (8 + 16) + 16 * 5)
