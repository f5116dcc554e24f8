"""Transformations of images: random augmentation, simulated scanners and user-defined functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.config.clients import NO_AUGMENT, AugmentConfig, ScannerConfig
from hetero_fl.core.images import to_floats
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.registry import call_reference
from model_zoo.generators import keyed_generators


def apply_transform(reference: str, x: Tensor, where: str, seed: int = 0) -> Tensor:
    """Apply a user-defined function to a batch.

    Args:
        reference: Reference to the function.
        x: The batch.
        where: Prefix of error messages.
        seed: Seed of the random numbers that the function draws from global generators.

    Raises:
        UserError: If the function fails or returns a batch of another shape or type.
    """
    with keyed_generators(seed, x.device):
        transformed = call_reference(reference, where, "x", (x,))
    if not isinstance(transformed, Tensor):
        raise UserError(f"{where}: expected a tensor, got {type(transformed).__name__}")
    if transformed.shape != x.shape or transformed.dtype != x.dtype:
        raise UserError(
            f"{where}: expected {x.dtype} of shape {tuple(x.shape)} as its input, got "
            f"{transformed.dtype} of shape {tuple(transformed.shape)}"
        )
    return transformed


def augment(x: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Randomly crop, flip and rotate each image of a batch, then apply a user-defined transform.

    Only the operations that `config` enables are applied. Pixels outside an image are filled with
    the nearest edge pixel.

    Args:
        x: Preprocessed images, shape `[B, C, H, W]`, on any device. The images are not modified in
            place.
        config: Augmentation settings.
        generator: Random generator on the CPU, so that all devices use the same random numbers.

    Returns:
        Augmented images, shape `[B, C, H, W]`.

    Example:
        >>> import torch
        >>> from hetero_fl.config.clients import AugmentConfig
        >>> from hetero_fl.data import augment
        >>> x = torch.arange(6.0).reshape(2, 1, 1, 3)
        >>> augmented = augment(x, AugmentConfig(flip=True), torch.Generator().manual_seed(0))
        >>> augmented.shape
        torch.Size([2, 1, 1, 3])
    """
    if config == NO_AUGMENT or len(x) == 0:
        return x
    batch = len(x)
    if config.crop:
        size = (2, batch)
        offsets = torch.randint(-config.crop, config.crop + 1, size, generator=generator)
        x = _crop(x, offsets.to(x.device))
    if config.flip:
        mirrored = (torch.rand(batch, generator=generator) < 0.5).to(x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if config.rotate:
        degrees = (2 * torch.rand(batch, generator=generator) - 1) * config.rotate
        x = _rotate(x, (degrees * (math.pi / 180)).to(x.device, x.dtype))
    if config.transform is not None:
        seed = int(torch.randint(2**62, (), generator=generator))
        x = apply_transform(config.transform, x, "augment.transform", seed)
    return x


def _crop(x: Tensor, offsets: Tensor) -> Tensor:
    """Shift each image by offsets in rows and columns, int64 `[2, B]`, and repeat edge pixels."""
    batch, _, height, width = x.shape
    rows = (torch.arange(height, device=x.device) + offsets[0, :, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + offsets[1, :, None]).clamp(0, width - 1)
    x = x.gather(2, rows[:, None, :, None].expand(batch, x.shape[1], height, width))
    return x.gather(3, columns[:, None, None, :].expand(batch, x.shape[1], height, width))


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate each image about its center by an angle in radians (`[B]`), bilinearly."""
    # Both grid axes span -1..1, so non-square images would be sheared without the ratio.
    ratio = x.shape[-2] / x.shape[-1]
    cos = angle.cos()
    sin = angle.sin()
    zero = torch.zeros_like(angle)
    rows = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


SCANNER_CHUNK = 256
"""Number of images processed at a time. A change of this number changes the sampled noise."""


def apply_scanner(
    x_raw: Tensor,
    config: ScannerConfig,
    generator: torch.Generator,
    pixel_range: float | None = None,
) -> Tensor:
    """Simulate the imaging device of a site (feature shift).

    The operations are, in this order: bilinear down- and upsampling (`resolution`), Gaussian blur,
    contrast around middle gray, brightness, and Gaussian noise. uint8 images are rounded and
    clipped to 0..255. Integers of another range become floats from 0 to 1. Floats are assumed to
    be in 0..1 and are not clipped.

    Args:
        x_raw: Images, shape `[N, C, H, W]`, integers or floats. The images are not modified in
            place.
        config: Settings of the device.
        generator: Random generator for the noise.
        pixel_range: Value of integer pixels that becomes 1. If None, 255.

    Returns:
        Images of the same shape.

    Example:
        >>> import torch
        >>> from hetero_fl.config.clients import ScannerConfig
        >>> from hetero_fl.data import apply_scanner
        >>> images = torch.full((1, 1, 2, 2), 100, dtype=torch.uint8)
        >>> apply_scanner(images, ScannerConfig(brightness=0.2), torch.Generator()).unique()
        tensor([151], dtype=torch.uint8)
    """
    if config == ScannerConfig() or len(x_raw) == 0:
        return x_raw
    chunks = x_raw.split(SCANNER_CHUNK)
    return torch.cat([_apply(chunk, config, generator, pixel_range) for chunk in chunks])


def _apply(
    x_raw: Tensor, config: ScannerConfig, generator: torch.Generator, pixel_range: float | None
) -> Tensor:
    x = to_floats(x_raw, pixel_range)
    height, width = x.shape[-2:]
    if config.resolution < 1:
        small = (
            max(1, round(height * config.resolution)),
            max(1, round(width * config.resolution)),
        )
        x = F.interpolate(x, size=small, mode="bilinear", align_corners=False, antialias=True)
        x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
    if config.blur:
        x = _blur(_blur(x, config.blur, -1), config.blur, -2)
    x = (x - 0.5) * config.contrast + (0.5 + config.brightness)
    if config.noise:
        x = x + config.noise * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    if x_raw.is_floating_point():
        return x
    x = x.clamp(0, 1)
    return x if pixel_range is not None else (x * 255).round().to(torch.uint8)


def _blur(x: Tensor, sigma: float, dim: int) -> Tensor:
    """Apply a Gaussian filter along one axis, truncated at 3 sigma, with repeated edge pixels."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.to(x.dtype) / sigma) ** 2)
    size = x.shape[dim]
    total = torch.zeros_like(x)
    for offset, weight in zip(offsets, weights / weights.sum(), strict=True):
        total += weight * x.index_select(dim, (torch.arange(size) + offset).clamp(0, size - 1))
    return total
