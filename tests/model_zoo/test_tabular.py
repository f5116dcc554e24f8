"""Models that process columns separately, compared with their formulas."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.support.models import batch, make


def test_wide_and_deep_matches_its_formula() -> None:
    model = make("wide_deep", 2, 4, (), hidden=(8, 3)).eval()
    x = batch(4, n=6)
    t = x.tanh()
    pairs = torch.stack([t[:, i] * t[:, j] for i in range(4) for j in range(i + 1, 4)], 1)
    deep = F.relu(
        F.linear(x, *(model.state_dict()[f"backbone.deep.0.{n}"] for n in ("weight", "bias")))
    )
    deep = F.relu(
        F.linear(deep, *(model.state_dict()[f"backbone.deep.2.{n}"] for n in ("weight", "bias")))
    )
    features = torch.cat([x, pairs, deep], 1)
    assert model.feature_dim == 4 + 6 + 3
    torch.testing.assert_close(model(x).features, features)
    wide = features[:, :10] @ model.head.weight[:, :10].T  # eq. 3: one sum of both parts
    torch.testing.assert_close(
        model(x).logits, wide + deep @ model.head.weight[:, 10:].T + model.head.bias
    )
    assert make("wide_deep", 2, 4, (), crosses="none").feature_dim == 4 + 32


def test_tokenizer_gives_one_token_per_column() -> None:
    model = make("ft_transformer", 3, 5, (), width=8, depth=1, heads=2).eval()
    backbone, x = model.backbone, batch(5)
    tokens = torch.stack(
        [x[:, j : j + 1] * backbone.scale[j] + backbone.shift[j] for j in range(5)], 1
    )
    steps = torch.cat([tokens, backbone.read.expand(4, 1, 8)], 1)
    block = backbone.blocks[0]
    steps = steps + block.attention(steps)  # the first block has no norm before its attention
    value, gate = block.up(block.norm2(steps)).chunk(2, -1)
    steps = steps + block.down(value * gate.relu())
    torch.testing.assert_close(model(x).features, backbone.norm(steps[:, -1]).relu())


def test_column_order_does_not_matter() -> None:
    model, x, order = (
        make("ft_transformer", 2, 5, ()).eval(),
        batch(5),
        torch.tensor([3, 1, 4, 0, 2]),
    )
    before = model(x).logits
    with torch.no_grad():
        for name in ("scale", "shift"):
            getattr(model.backbone, name).data = getattr(model.backbone, name)[order]
    torch.testing.assert_close(model(x[:, order]).logits, before)


def test_clients_with_different_columns_share_all_but_the_tokenizer() -> None:
    few, more = (make("ft_transformer", 2, n, ()).state_dict() for n in (4, 9))
    differ = {n for n in few if few[n].shape != more[n].shape}
    assert differ == {"backbone.scale", "backbone.shift"}
