"""Random changes of training images, a whole batch at a time. Pixels from beyond the edge repeat the edge."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.config.clients import AugmentConfig


def augment(x: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Cropped, flipped and rotated images; each image by draws of its own.

    Args:
        x: preprocessed images `[B, C, H, W]`, on any device; they are not changed.
        generator: a CPU generator keyed by the step; the same draws are made on every device.
    """
    if config == AugmentConfig() or len(x) == 0:
        return x
    batch = len(x)
    if config.crop:
        x = _crop(x, torch.randint(-config.crop, config.crop + 1, (2, batch), generator=generator).to(x.device))
    if config.flip:
        mirrored = (torch.rand(batch, generator=generator) < 0.5).to(x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if config.rotate:
        degrees = (2 * torch.rand(batch, generator=generator) - 1) * config.rotate
        x = _rotate(x, (degrees * (math.pi / 180)).to(x.device, x.dtype))
    return x


def _crop(x: Tensor, offsets: Tensor) -> Tensor:
    """Each image moved by its offsets (int64 `[2, B]`, rows and columns), as if padded by so much and cropped back."""
    batch, _, height, width = x.shape
    rows = (torch.arange(height, device=x.device) + offsets[0, :, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + offsets[1, :, None]).clamp(0, width - 1)
    x = x.gather(2, rows[:, None, :, None].expand(batch, x.shape[1], height, width))
    return x.gather(3, columns[:, None, None, :].expand(batch, x.shape[1], height, width))


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Each image turned by its angle (radians `[B]`) about its middle, bilinearly."""
    ratio = x.shape[-2] / x.shape[-1]  # the grid's axes run over -1..1 whatever the sides, so unequal ones shear
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
