"""A small vision transformer."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from .attention import Encoder
from .errors import ModelError
from .shapes import Shape
from .split import Body


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


def vit(shape: Shape, *, patch: int = 4, width: int = 64, depth: int = 4, heads: int = 4, dropout: float = 0.0) -> Body:
    """Patches of ``patch`` x ``patch`` pixels through a transformer encoder; the mean over the patches as features.

    After Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021). Raises :class:`ModelError` where the image
    is not a whole number of patches.
    """
    height, along = shape.size
    if height % patch or along % patch:
        divisors = [p for p in range(1, min(shape.size) + 1) if height % p == 0 and along % p == 0]
        best = min(divisors, key=lambda p: abs(p - patch))
        raise ModelError(f"option patch: found {patch}, which does not divide {height}x{along}; the nearest is {best}")
    tokens = (height // patch) * (along // patch)
    return VisionTransformer(patch, Encoder(tokens, shape.channels * patch**2, width, depth, heads, dropout)), width
