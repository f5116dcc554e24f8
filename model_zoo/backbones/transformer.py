"""A small pre-norm transformer encoder, and the vision transformer."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from model_zoo.errors import ModelError
from model_zoo.shapes import Shape
from model_zoo.split_model import Body

# A small pre-norm transformer encoder, which the sequence and the image transformers share.
#
# All its randomness is ``nn.Dropout``'s. The attention is written out, not
# ``F.scaled_dot_product_attention``: the fused CPU kernel behind that has no batching rule, so
# under ``vmap`` it would run one model after another, and at the lengths meant here (tens of steps)
# fusing gains nothing.


class SelfAttention(nn.Module):
    """Multi-head self-attention on [B, steps, width] (Vaswani et al., 2017, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ModelError(
                f"option heads: found {heads}, but the width {width} must be a multiple of it"
            )
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, absent: Tensor | None = None) -> Tensor:
        """``absent`` [B, steps]: where there is nothing to look at."""
        q, k, v = rearrange(
            self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        # not minus infinity: where nothing is there at all, that would be NaN
        if absent is not None:
            scores = scores.masked_fill(absent[:, None, None, :], -1e4)
        weights = scores.softmax(-1)
        out: Tensor = self.out(rearrange(weights @ v, "b h n d -> b n (h d)"))
        return out


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout on each branch."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor, absent: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), absent))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class Encoder(nn.Module):
    """Tokens [B, steps, token_width] to features [B, width].

    A linear embedding plus learned positions, ``depth`` blocks, a LayerNorm, the mean over the steps.
    """

    def __init__(
        self, steps: int, token_width: int, width: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(token_width, width)
        self.positions = nn.Parameter(torch.randn(1, steps, width) * 0.02)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, dropout) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.embed(tokens) + self.positions)
        features: Tensor = self.norm(x).mean(1)
        return features


# A small vision transformer.


class VisionTransformer(nn.Module):
    """Cuts [B, C, H, W] into square patches and encodes them as tokens."""

    def __init__(self, patch: int, encoder: Encoder) -> None:
        super().__init__()
        self.patch = patch
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        features: Tensor = self.encoder(tokens)
        return features


def vit(
    shape: Shape,
    *,
    patch: int = 4,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    dropout: float = 0.0,
) -> Body:
    """Patches of ``patch`` x ``patch`` pixels through a transformer encoder; the mean over the patches as features.

    After Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021). Raises :class:`ModelError` where the image
    is not a whole number of patches.
    """
    height, along = shape.size
    if height % patch or along % patch:
        divisors = [p for p in range(1, min(shape.size) + 1) if height % p == 0 and along % p == 0]
        best = min(divisors, key=lambda p: abs(p - patch))
        raise ModelError(
            f"option patch: found {patch}, which does not divide {height}x{along}; the nearest is {best}"
        )
    tokens = (height // patch) * (along // patch)
    return VisionTransformer(
        patch, Encoder(tokens, shape.channels * patch**2, width, depth, heads, dropout)
    ), width
