"""Feature shift by site: what a site's own imaging device does to the images that are made there."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.config.clients import ScannerConfig

CHUNK = 256  # images at a time; part of the result's bits, as noise is drawn chunk by chunk


def apply_scanner(x_raw: Tensor, config: ScannerConfig, generator: torch.Generator) -> Tensor:
    """Images as this device would have made them, of the same shape and dtype.

    In this order: resolution (bilinearly down by the factor, up again), Gaussian blur, contrast around the middle grey,
    brightness, Gaussian noise. uint8 images are cut to 0..255 and rounded; floats are taken to range over 0..1, and are
    not cut.

    Args:
        x_raw: `[N, C, H, W]`, uint8 or floats; it is not changed.
        generator: draws the noise, and nothing else.
    """
    if config == ScannerConfig() or len(x_raw) == 0:
        return x_raw
    return torch.cat([_apply(chunk, config, generator) for chunk in x_raw.split(CHUNK)])


def _apply(x_raw: Tensor, config: ScannerConfig, generator: torch.Generator) -> Tensor:
    x = x_raw.float() / 255 if x_raw.dtype == torch.uint8 else x_raw
    height, width = x.shape[-2:]
    if config.resolution < 1:
        small = (max(1, round(height * config.resolution)), max(1, round(width * config.resolution)))
        x = F.interpolate(x, size=small, mode="bilinear", align_corners=False, antialias=True)
        x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
    if config.blur:
        x = _blur(_blur(x, config.blur, -1), config.blur, -2)
    x = (x - 0.5) * config.contrast + (0.5 + config.brightness)
    if config.noise:
        x = x + config.noise * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8) if x_raw.dtype == torch.uint8 else x


def _blur(x: Tensor, sigma: float, dim: int) -> Tensor:
    """Gaussian filter along one axis, cut at three sigma, edges repeated."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.to(x.dtype) / sigma) ** 2)
    size = x.shape[dim]
    total = torch.zeros_like(x)
    for offset, weight in zip(offsets, weights / weights.sum(), strict=True):
        total += weight * x.index_select(dim, (torch.arange(size) + offset).clamp(0, size - 1))
    return total
