"""How one participant sees every example: as floats, resized, with so many channels, normalised; in this order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.config.clients import Normalize, PreprocessConfig
from hetero_fl.errors import UserError

CHUNK = 4096  # rows at a time when statistics are taken


@dataclass(frozen=True)
class Preprocess:
    """A view of raw examples. Equal views are one key in a cache.

    `mean` and `std` are numbers, or a number for each column (the last axis) of tables and series.
    """

    resize: int | None = None
    channels: int | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None

    @classmethod
    def resolve(
        cls, config: PreprocessConfig, train_x_raw: Tensor | None = None, where: str = "preprocess"
    ) -> Preprocess:
        """The view that a configuration asks for, `normalize: own` turned into numbers.

        Args:
            train_x_raw: the participant's raw training rows, read for `own` alone. Images (4-D) get one mean and
                standard deviation over all pixels after `resize` and `channels`; tables and series get one for each
                column. A standard deviation of 0 counts as 1.
        """
        view = cls(config.resize, config.channels)
        if isinstance(config.normalize, Normalize):
            return cls(config.resize, config.channels, config.normalize.mean, config.normalize.std)
        if config.normalize is None:
            return view
        if train_x_raw is None or len(train_x_raw) == 0:
            raise UserError(f"{where}.normalize: 'own' needs training rows, and there are none; give mean and std")
        view.shape(tuple(train_x_raw.shape[1:]), where)
        image = train_x_raw.ndim == 4
        columns = 1 if image else train_x_raw.shape[-1]
        total, squares, rows = torch.zeros(columns).double(), torch.zeros(columns).double(), 0
        for chunk in train_x_raw.split(CHUNK):
            values = view(chunk).double().reshape(-1, columns)
            total, rows = total + values.sum(0), rows + len(values)
        mean = total / rows
        for chunk in train_x_raw.split(CHUNK):  # a second pass: a difference of large sums would lose the small ones
            squares += (view(chunk).double().reshape(-1, columns) - mean).square().sum(0)
        std = torch.where(squares > 0, (squares / rows).sqrt(), 1.0)
        if image:
            return cls(config.resize, config.channels, float(mean), float(std))
        return cls(config.resize, config.channels, tuple(mean.tolist()), tuple(std.tolist()))

    def __call__(self, x_raw: Tensor) -> Tensor:
        """Raw examples `[N, ...]` as `[N, *self.shape(...)]` in torch's default float type; uint8 is divided by 255.

        Tokens (int64) stay as they are.
        """
        if x_raw.dtype == torch.int64:
            return x_raw
        dtype = torch.get_default_dtype()
        shape = self.shape(tuple(x_raw.shape[1:]))
        x = x_raw.to(dtype) / 255 if x_raw.dtype == torch.uint8 else x_raw.to(dtype)
        if len(x) == 0:
            return x.new_zeros(0, *shape)
        if self.resize is not None and x.shape[-2:] != shape[-2:]:
            x = F.interpolate(x, size=shape[-2:], mode="bilinear", align_corners=False)
        if self.channels is not None and self.channels != x.shape[1]:
            x = x.mean(1, keepdim=True) if self.channels == 1 else x.expand(-1, self.channels, -1, -1)
        if self.mean is not None and self.std is not None:
            x = (x - torch.tensor(self.mean, dtype=dtype)) / torch.tensor(self.std, dtype=dtype)
        return x.contiguous()

    def shape(self, raw_shape: tuple[int, ...], where: str = "preprocess") -> tuple[int, ...]:
        """Shape of an example as seen through this if it lies in memory with `raw_shape`; both without the batch.

        Raises:
            UserError: resize or channels for what is no image; channels that cannot be made of what is there.
        """
        if self.resize is None and self.channels is None:
            return raw_shape
        if len(raw_shape) != 3:
            key = "resize" if self.resize is not None else "channels"
            raise UserError(f"{where}.{key}: is for images, but the examples have shape {raw_shape}; leave it out")
        channels, height, width = raw_shape
        if self.channels is not None and self.channels not in (1, channels) and channels != 1:
            raise UserError(
                f"{where}.channels: found {self.channels}, but images have {channels}; choose 1 or {channels}"
            )
        return (self.channels or channels, self.resize or height, self.resize or width)
