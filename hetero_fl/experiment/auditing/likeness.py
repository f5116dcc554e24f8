"""How like two images are, and which of several is which. Images are in 0..1."""

from __future__ import annotations

from itertools import permutations

import torch.nn.functional as F
from torch import Tensor


def likeness(found: Tensor, true: Tensor) -> dict[str, float]:
    """PSNR and SSIM, the mean over a step's images."""
    pairs = list(zip(found, true, strict=True))
    return {
        "psnr": sum(psnr(a, b) for a, b in pairs) / len(pairs),
        "ssim": sum(ssim(a, b) for a, b in pairs) / len(pairs),
    }


def psnr(found: Tensor, true: Tensor) -> float:
    """Peak signal-to-noise ratio of images in 0..1, dB; at most 100."""
    return float(-10 * (found - true).square().mean().clamp(min=1e-10).log10())


def ssim(found: Tensor, true: Tensor, window: int = 7) -> float:
    """Structural similarity of images `[C, H, W]` in 0..1, the mean over windows (Wang et al. 2004, eq. 13); 1 for equal ones."""
    window = min(window, *true.shape[-2:])
    a, b = found[None].double(), true[None].double()

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    n = window**2 / (window**2 - 1)
    ma, mb = mean(a), mean(b)
    va, vb, both = (n * (mean(x * y) - p * q) for x, y, p, q in ((a, a, ma, ma), (b, b, mb, mb), (a, b, ma, mb)))
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def matched(found: Tensor, true: Tensor) -> Tensor:
    """The reconstructions in the order of the originals that they are nearest to: a sum over the batch has no order."""
    cost = (found[:, None] - true[None]).square().flatten(2).mean(2)
    turns = permutations(range(len(true)))
    best = min(turns, key=lambda turn: float(sum(cost[i, j] for j, i in enumerate(turn))))
    return found[list(best)]
