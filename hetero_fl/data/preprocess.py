"""How one participant sees every example: the columns it has, as floats, resized, with so many channels, normalised; in this
order, and last what is missing.

Models take channels first: a series `[N, T, F]`, as people store it, is seen as `[N, F, T]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.config.clients import Normalize, PreprocessConfig
from hetero_fl.data.layout import Block, Layout, Spans, spans_of
from hetero_fl.errors import UserError

CHUNK = 4096  # rows at a time when statistics are taken
NOTHING = Layout()


@dataclass(frozen=True)
class Preprocess:
    """A view of raw examples. Equal views are one key in a cache.

    `mean` and `std` are numbers, or a number for each column (the last axis) of tables, series and rows of blocks, each channel
    of images. `raw` is the shape of a raw example where the view knows it, `spans` the runs of columns that it takes (none:
    all), `blocks` the blocks that are in them. One block alone is an example in the block's own shape, an image say, unless
    `missing` is set.
    With `missing: indicate`, NaN becomes 0 after normalisation, and 1 where it was missing follows the columns: one a column,
    or one a block where there are blocks, which is missing where all of its values are.
    """

    resize: int | None = None
    channels: int | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    raw: tuple[int, ...] | None = None
    spans: Spans | None = None
    blocks: tuple[Block, ...] = ()
    missing: Literal["indicate"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(Block(*block) for block in self.blocks))  # plain tuples from a file

    @classmethod
    def plain(
        cls, config: PreprocessConfig, layout: Layout = NOTHING, raw: tuple[int, ...] = (), where: str = "preprocess"
    ) -> Preprocess:
        """The view that a configuration asks for but for what is subtracted and divided by: what decides the shape.

        Raises UserError for a column or block that is not there.
        """
        view = cls(config.resize, config.channels, missing=config.missing)
        if config.columns is None and not layout.blocks and config.missing is None:
            return view
        spans = None if config.columns is None else layout.spans(config.columns, f"{where}.columns")
        blocks = tuple(b for b in layout.blocks if config.columns is None or b.name in config.columns)
        return replace(view, raw=tuple(raw), spans=spans, blocks=blocks)

    @classmethod
    def resolve(
        cls,
        config: PreprocessConfig,
        train_x_raw: Tensor | None = None,
        where: str = "preprocess",
        layout: Layout = NOTHING,
        raw: tuple[int, ...] = (),
    ) -> Preprocess:
        """The view that a configuration asks for, `normalize: own` turned into numbers.

        Args:
            train_x_raw: the participant's raw training rows, read for `own` alone. Images (4-D, and blocks that are images)
                get one mean and standard deviation over all pixels after `resize` and `channels`; tables and series get one
                for each column. A standard deviation of 0 counts as 1. What is missing is left out; a column of nothing
                else has mean 0.
            layout, raw: names along the last axis of the examples, and their shape in memory.
        """
        view = cls.plain(config, layout, raw, where)
        if isinstance(config.normalize, Normalize):
            fixed = (config.normalize.mean, config.normalize.std)
            subtracted, divided = (tuple(v) if isinstance(v, list) else v for v in fixed)
            return replace(view, mean=subtracted, std=divided)
        if config.normalize is None:
            return view
        if train_x_raw is None or len(train_x_raw) == 0:
            raise UserError(f"{where}.normalize: 'own' needs training rows, and there are none; give mean and std")
        view.shape(tuple(train_x_raw.shape[1:]), where)
        mean, std = view._statistics(train_x_raw)
        if len(view._given(tuple(train_x_raw.shape[1:]))) == 3:
            return replace(view, mean=float(mean), std=float(std))
        return replace(view, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    def _statistics(self, x_raw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float64 `[1]` of images, else `[columns]`."""
        image = len(self._given(tuple(x_raw.shape[1:]))) == 3
        columns = 1 if image else self._given(tuple(x_raw.shape[1:]))[-1]
        total, squares, rows = (torch.zeros(columns).double() for _ in range(3))
        for chunk in x_raw.split(CHUNK):
            values = self._values(chunk).double().reshape(-1, columns)
            total, rows = total + self._sum(values), rows + (~values.isnan()).sum(0)
        rows = self._pooled(rows)
        mean = self._pooled(total) / rows.clamp(min=1)
        for chunk in x_raw.split(CHUNK):  # a second pass: a difference of large sums would lose the small ones
            squares += self._sum((self._values(chunk).double().reshape(-1, columns) - mean).square())
        squares = self._pooled(squares)
        return mean, torch.where(squares > 0, (squares / rows.clamp(min=1)).sqrt(), 1.0)

    def _sum(self, values: Tensor) -> Tensor:
        return values.sum(0) if self.missing is None else values.nansum(0)

    def _pooled(self, sums: Tensor) -> Tensor:
        """Sums by column, those of an image block all the sum over its pixels."""
        sums = sums.clone()
        for block, (start, stop) in zip(self.blocks, spans_of(self.blocks), strict=True):
            if block.image and len(sums) > 1:
                sums[start:stop] = sums[start:stop].sum()
        return sums

    def __call__(self, x_raw: Tensor) -> Tensor:
        """Raw examples `[N, ...]` as `[N, *self.shape(...)]` in torch's default float type; uint8 is divided by 255.

        Tokens (int64) stay as they are.
        """
        if x_raw.dtype == torch.int64:
            return x_raw
        shape = self.shape(tuple(x_raw.shape[1:]))
        x = self._values(x_raw)
        if len(x) == 0:
            return x.new_zeros(0, *shape)
        if self.mean is not None and self.std is not None:
            x = (x - self._along(self.mean, x)) / self._along(self.std, x)
        if self.missing is not None:
            gone = x.isnan()
            if self.blocks:
                marks = torch.stack([gone[:, start:stop].all(1) for start, stop in spans_of(self.blocks)], dim=1)
            else:
                marks = gone
            x = torch.cat([x.masked_fill(gone, 0.0), marks.to(x.dtype)], dim=-1)
        return (x.transpose(1, 2) if x.ndim == 3 else x).contiguous()

    def _values(self, x_raw: Tensor) -> Tensor:
        """Raw examples with what the view takes of them, in its shape, not yet normalised."""
        dtype = torch.get_default_dtype()
        x = self.taken(x_raw)
        x = x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)
        if len(x) == 0:
            return x
        x = x.reshape(-1, *self._given(tuple(x_raw.shape[1:])))
        if self.resize is not None and x.shape[-2:] != (self.resize, self.resize):
            x = F.interpolate(x, size=(self.resize, self.resize), mode="bilinear", align_corners=False)
        if self.channels is not None and self.channels != x.shape[1]:
            x = x.mean(1, keepdim=True) if self.channels == 1 else x.expand(-1, self.channels, -1, -1)
        return x

    def taken(self, x_raw: Tensor) -> Tensor:
        """The columns that it takes, as they lie in memory: `[N, …, columns]`."""
        if self.spans is None:
            return x_raw
        parts = [x_raw[..., start:stop] for start, stop in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def names(self, columns: Sequence[str]) -> list[str]:
        """Those of all columns' names, in the data's order, that it takes."""
        return [name for start, stop in self.spans or ((0, len(columns)),) for name in columns[start:stop]]

    def _given(self, raw_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what it takes, before `resize` and `channels`."""
        if len(self.blocks) == 1 and self.missing is None:
            return self.blocks[0].shape
        return raw_shape if self.spans is None else (*raw_shape[:-1], sum(stop - start for start, stop in self.spans))

    @staticmethod
    def _along(value: float | tuple[float, ...], x: Tensor) -> Tensor:
        """The numbers where they belong: along the channels of images, else along the columns."""
        numbers = torch.tensor(value, dtype=x.dtype)
        return numbers[:, None, None] if x.ndim == 4 and numbers.ndim else numbers

    def shape(self, raw_shape: tuple[int, ...], where: str = "preprocess") -> tuple[int, ...]:
        """Shape of an example as seen through this if it lies in memory with `raw_shape`; both without the batch. That of a
        series is (columns, T), of `raw_shape` (T, F).

        Raises:
            UserError: resize or channels for what is no image; channels that cannot be made of what is there; images that
                may lack pixels; another number of means or deviations than of channels or columns.
        """
        given = self._given(raw_shape)
        if self.missing is not None and len(given) == 3:
            raise UserError(f"{where}.missing: is for tables, series and blocks, not for images; leave it out")
        seen = self._seen(given, where)
        along, axis = (seen[0], "channels") if len(given) == 3 else (given[-1], "columns")
        for name, value in (("mean", self.mean), ("std", self.std)):
            if isinstance(value, tuple) and len(value) != along:
                raise UserError(
                    f"{where}.normalize.{name}: found {len(value)} numbers for {along} {axis}; give one, or {along}"
                )
        return seen

    def _seen(self, given: tuple[int, ...], where: str) -> tuple[int, ...]:
        """Shape of an example of which it takes what has that shape."""
        if self.resize is None and self.channels is None:
            marks = 0 if self.missing is None else len(self.blocks) or given[-1]
            seen = (*given[:-1], given[-1] + marks)
            return seen[::-1] if len(seen) == 2 else seen
        if len(given) != 3:
            key = "resize" if self.resize is not None else "channels"
            raise UserError(f"{where}.{key}: is for images, but the examples have shape {given}; leave it out")
        channels, height, width = given
        if self.channels is not None and self.channels not in (1, channels) and channels != 1:
            raise UserError(
                f"{where}.channels: found {self.channels}, but images have {channels}; choose 1 or {channels}"
            )
        return (self.channels or channels, self.resize or height, self.resize or width)
