"""A small pre-norm transformer encoder for sequences, and a vision transformer.

A step is one position of a sequence.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from typing_extensions import override

from model_zoo.errors import ModelError
from model_zoo.options import Count, Rate
from model_zoo.shapes import Shape
from model_zoo.split_model import Body


# `F.scaled_dot_product_attention` is not used: its fused CPU kernel has no batching rule, so `vmap`
# would run one model after another. For tens of steps, fusing gains nothing.
class SelfAttention(nn.Module):
    """Multi-head self-attention over the steps of a sequence (Vaswani et al., 2017, section 3.2).

    Inputs and outputs have shape `[B, steps, width]`.

    Args:
        width: Embedding dimension of each step of the sequence.
        heads: Number of heads.

    Raises:
        ModelError: If `width` is not a multiple of `heads`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ModelError(f"option heads: expected a divisor of the width {width}, got {heads}")
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    @override
    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return the attention output.

        Args:
            x: Steps, shape `[B, steps, width]`.
            padding_mask: Boolean mask, shape `[B, steps]`, True at steps that are ignored. If None,
                no steps are ignored.
        """
        q, k, v = rearrange(
            self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        # With minus infinity, a text that consists of padding only would result in NaN.
        if padding_mask is not None:
            scores = scores.masked_fill(padding_mask[:, None, None, :], -1e4)
        weights = scores.softmax(-1)
        return self.out(rearrange(weights @ v, "b h n d -> b n (h d)"))


class TransformerBlock(nn.Module):
    """A pre-norm transformer block: self-attention and a perceptron with residual connections.

    Args:
        width: Width of a step.
        heads: Number of heads.
        dropout: Dropout rate of the self-attention and the perceptron.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    @override
    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), padding_mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """A transformer encoder that maps tokens `[B, steps, token_width]` to features `[B, width]`.

    The encoder consists of a linear embedding with learned positions, transformer blocks, LayerNorm
    and the mean over the steps.

    Args:
        steps: Number of steps.
        token_width: Width of a token.
        width: Width of the features.
        depth: Number of blocks.
        heads: Number of attention heads.
        dropout: Dropout rate.
    """

    def __init__(
        self, steps: int, token_width: int, width: int, *, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(token_width, width)
        self.positions = nn.Parameter(torch.randn(1, steps, width) * 0.02)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, dropout) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.embed(tokens) + self.positions)
        return self.norm(x).mean(1)


def vit(
    shape: Shape,
    *,
    patch: Count = 4,
    width: Count = 64,
    depth: Count = 4,
    heads: Count = 4,
    dropout: Rate = 0.0,
) -> Body:
    """Build a small vision transformer (Dosovitskiy et al., ICLR 2021).

    A token is a square patch of the image. The features are the mean over the patches.

    Args:
        shape: Shape of an image.
        patch: Height and width of a patch in pixels.
        width: Width of the features.
        depth: Number of transformer blocks.
        heads: Number of attention heads.
        dropout: Dropout rate.

    Returns:
        The backbone and the width of the features.

    Raises:
        ModelError: If the image cannot be divided into patches.
    """
    image_height, image_width = shape.size
    if image_height % patch or image_width % patch:
        divisors = [
            p
            for p in range(1, min(shape.size) + 1)
            if image_height % p == 0 and image_width % p == 0
        ]
        nearest = min(divisors, key=lambda p: abs(p - patch))
        raise ModelError(
            f"option patch: expected a divisor of {image_height}x{image_width}, got {patch}; "
            f"the nearest is {nearest}"
        )
    tokens = (image_height // patch) * (image_width // patch)
    encoder = Encoder(
        tokens, shape.channels * patch**2, width, depth=depth, heads=heads, dropout=dropout
    )
    patches = Rearrange("b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)
    return nn.Sequential(OrderedDict(patches=patches, encoder=encoder)), width
