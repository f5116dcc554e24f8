"""How one participant sees examples: preprocessing, augmentation, scanner shift, missing values.

Checks that each client's and the server's view fits the data.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.config.clients import (
    AugmentConfig,
    ClientSettings,
    Normalize,
    PreprocessConfig,
    ScannerConfig,
)
from hetero_fl.config.population import Population, SettingsProfile
from hetero_fl.data.dataset import (
    Block,
    ColumnLayout,
    Dataset,
    Examples,
    RowSelection,
    Spans,
    spans_of,
)
from hetero_fl.utils.errors import UserError

if TYPE_CHECKING:
    from hetero_fl.data.client_rows import ClientRows

# How one participant sees every example: its columns as floats, resized, with a number of channels,
# normalized; in this order, and last the indicators of missing values.
#
# Models take channels first: a series `[N, T, F]`, as people store it, is seen as `[N, F, T]`.

CHUNK = 4096  # rows at a time when statistics are taken
NOTHING = ColumnLayout()


@dataclass(frozen=True)
class Preprocess:
    """A view of raw examples. Equal views are one key in a cache.

    Attributes:
        resize: Side of images in pixels.
        channels: Number of channels of images.
        mean: Subtracted: a number, or one for each column (the last axis) of tables, series and
            rows of blocks, for each channel of images.
        std: Divided by, as `mean`.
        raw: Shape of a raw example, where the view knows it.
        spans: The runs of columns that the view takes; None: all.
        blocks: The blocks in them. A single block is an example of the block's own shape (an image,
            say), unless `missing` is set.
        missing: "indicate": NaN becomes 0 after normalization, and indicators of what was missing
            follow the columns, one per column, or one per block where there are blocks. A block is
            missing where all of its values are.
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
        # plain tuples from a file
        object.__setattr__(self, "blocks", tuple(Block(*block) for block in self.blocks))

    @classmethod
    def without_normalization(
        cls,
        config: PreprocessConfig,
        layout: ColumnLayout = NOTHING,
        raw: tuple[int, ...] = (),
        where: str = "preprocess",
    ) -> Preprocess:
        """Return the view that a configuration asks for, without normalization.

        Args:
            config: The configuration.
            layout: Names along the last axis of the examples.
            raw: Shape of a raw example.
            where: The configuration's place, for messages.

        Raises:
            UserError: If a column or block is unknown.
        """
        view = cls(config.resize, config.channels, missing=config.missing)
        if config.columns is None and not layout.blocks and config.missing is None:
            return view
        spans = None if config.columns is None else layout.spans(config.columns, f"{where}.columns")
        blocks = tuple(
            b for b in layout.blocks if config.columns is None or b.name in config.columns
        )
        return replace(view, raw=tuple(raw), spans=spans, blocks=blocks)

    @classmethod
    def resolve(
        cls,
        config: PreprocessConfig,
        train_x_raw: Tensor | None = None,
        where: str = "preprocess",
        layout: ColumnLayout = NOTHING,
        raw: tuple[int, ...] = (),
    ) -> Preprocess:
        """Return the view that a configuration asks for, with numbers in place of `normalize: own`.

        Images (4-D, and blocks that are images) get one mean and standard deviation over all pixels
        after `resize` and `channels`; tables and series get one for each column. A standard
        deviation of 0 counts as 1. Missing values are left out; a column without values has mean 0.

        Args:
            config: The configuration.
            train_x_raw: The participant's raw training rows, read for `own` only.
            where: The configuration's place, for messages.
            layout: Names along the last axis of the examples.
            raw: Shape of a raw example.

        Raises:
            UserError: If a column or block is unknown, or `own` has no rows.
        """
        view = cls.without_normalization(config, layout, raw, where)
        if isinstance(config.normalize, Normalize):
            fixed = (config.normalize.mean, config.normalize.std)
            subtracted, divided = (tuple(v) if isinstance(v, list) else v for v in fixed)
            return replace(view, mean=subtracted, std=divided)
        if config.normalize is None:
            return view
        if train_x_raw is None or len(train_x_raw) == 0:
            raise UserError(
                f"{where}.normalize: 'own' needs training rows, and there are none; give mean and std"
            )
        view.shape(tuple(train_x_raw.shape[1:]), where)
        mean, std = view._statistics(train_x_raw)
        if len(view._selected_shape(tuple(train_x_raw.shape[1:]))) == 3:
            return replace(view, mean=float(mean), std=float(std))
        return replace(view, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    def _statistics(self, x_raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, float64 `[1]` of images, else `[columns]`."""
        image = len(self._selected_shape(tuple(x_raw.shape[1:]))) == 3
        columns = 1 if image else self._selected_shape(tuple(x_raw.shape[1:]))[-1]
        total, squares, rows = (torch.zeros(columns).double() for _ in range(3))
        for chunk in x_raw.split(CHUNK):
            values = self._values(chunk).double().reshape(-1, columns)
            total = total + self._sum(values)
            rows = rows + (~values.isnan()).sum(0)
        rows = self._pool_block_sums(rows)
        mean = self._pool_block_sums(total) / rows.clamp(min=1)
        # a second pass: a difference of large sums would lose the small ones
        for chunk in x_raw.split(CHUNK):
            squares += self._sum(
                (self._values(chunk).double().reshape(-1, columns) - mean).square()
            )
        squares = self._pool_block_sums(squares)
        return mean, torch.where(squares > 0, (squares / rows.clamp(min=1)).sqrt(), 1.0)

    def _sum(self, values: Tensor) -> Tensor:
        return values.sum(0) if self.missing is None else values.nansum(0)

    def _pool_block_sums(self, sums: Tensor) -> Tensor:
        """Return sums by column, with the sum over all pixels for each column of an image block."""
        sums = sums.clone()
        for block, (start, stop) in zip(self.blocks, spans_of(self.blocks), strict=True):
            if block.image and len(sums) > 1:
                sums[start:stop] = sums[start:stop].sum()
        return sums

    def __call__(self, x_raw: Tensor) -> Tensor:
        """Return raw examples `[N, ...]` as `[N, *self.shape(...)]` in torch's default float type.

        uint8 is divided by 255. Tokens (int64) stay as they are.
        """
        if x_raw.dtype == torch.int64:
            return x_raw
        shape = self.shape(tuple(x_raw.shape[1:]))
        x = self._values(x_raw)
        if len(x) == 0:
            return x.new_zeros(0, *shape)
        if self.mean is not None and self.std is not None:
            x = (x - self._broadcast(self.mean, x)) / self._broadcast(self.std, x)
        if self.missing is not None:
            gone = x.isnan()
            if self.blocks:
                marks = torch.stack(
                    [gone[:, start:stop].all(1) for start, stop in spans_of(self.blocks)], dim=1
                )
            else:
                marks = gone
            x = torch.cat([x.masked_fill(gone, 0.0), marks.to(x.dtype)], dim=-1)
        return (x.transpose(1, 2) if x.ndim == 3 else x).contiguous()

    def _values(self, x_raw: Tensor) -> Tensor:
        """Return what the view takes of raw examples, in its shape, not yet normalized."""
        dtype = torch.get_default_dtype()
        x = self.select_columns(x_raw)
        x = x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)
        if len(x) == 0:
            return x
        x = x.reshape(-1, *self._selected_shape(tuple(x_raw.shape[1:])))
        if self.resize is not None and x.shape[-2:] != (self.resize, self.resize):
            x = F.interpolate(
                x, size=(self.resize, self.resize), mode="bilinear", align_corners=False
            )
        if self.channels is not None and self.channels != x.shape[1]:
            x = (
                x.mean(1, keepdim=True)
                if self.channels == 1
                else x.expand(-1, self.channels, -1, -1)
            )
        return x

    def select_columns(self, x_raw: Tensor) -> Tensor:
        """Return the columns that the view takes as they lie in memory, `[N, ..., columns]`."""
        if self.spans is None:
            return x_raw
        parts = [x_raw[..., start:stop] for start, stop in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def names(self, columns: Sequence[str]) -> list[str]:
        """Return the names of the columns that the view takes, in the data's order."""
        return [
            name
            for start, stop in self.spans or ((0, len(columns)),)
            for name in columns[start:stop]
        ]

    def _selected_shape(self, raw_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what the view takes, before `resize` and `channels`."""
        if len(self.blocks) == 1 and self.missing is None:
            return self.blocks[0].shape
        return (
            raw_shape
            if self.spans is None
            else (*raw_shape[:-1], sum(stop - start for start, stop in self.spans))
        )

    @staticmethod
    def _broadcast(value: float | tuple[float, ...], x: Tensor) -> Tensor:
        """Return numbers along the channels of images, else along the columns."""
        numbers = torch.tensor(value, dtype=x.dtype)
        return numbers[:, None, None] if x.ndim == 4 and numbers.ndim else numbers

    def shape(self, raw_shape: tuple[int, ...], where: str = "preprocess") -> tuple[int, ...]:
        """Return the shape of an example as seen through this view, without the batch.

        Args:
            raw_shape: Its shape in memory. A series (T, F) is seen as (columns, T).
            where: The view's place in the configuration, for messages.

        Raises:
            UserError: `resize` or `channels` for what is no image; channels that cannot be made;
                `missing` for images; another number of means or deviations than of channels or
                columns.
        """
        given = self._selected_shape(raw_shape)
        if self.missing is not None and len(given) == 3:
            raise UserError(
                f"{where}.missing: is for tables, series and blocks, not for images; leave it out"
            )
        seen = self._output_shape(given, where)
        along, axis = (seen[0], "channels") if len(given) == 3 else (given[-1], "columns")
        for name, value in (("mean", self.mean), ("std", self.std)):
            if isinstance(value, tuple) and len(value) != along:
                raise UserError(
                    f"{where}.normalize.{name}: found {len(value)} numbers for {along} {axis}; give one, or {along}"
                )
        return seen

    def _output_shape(self, selected_shape: tuple[int, ...], where: str) -> tuple[int, ...]:
        """Return the shape of an example of which the view takes what has that shape."""
        if self.resize is None and self.channels is None:
            marks = 0 if self.missing is None else len(self.blocks) or selected_shape[-1]
            seen = (*selected_shape[:-1], selected_shape[-1] + marks)
            return seen[::-1] if len(seen) == 2 else seen
        if len(selected_shape) != 3:
            key = "resize" if self.resize is not None else "channels"
            raise UserError(
                f"{where}.{key}: is for images, but the examples have shape {selected_shape}; leave it out"
            )
        channels, height, width = selected_shape
        if self.channels is not None and self.channels not in (1, channels) and channels != 1:
            raise UserError(
                f"{where}.channels: found {self.channels}, but images have {channels}; choose 1 or {channels}"
            )
        return (self.channels or channels, self.resize or height, self.resize or width)


# Random changes of training images, a whole batch at a time. Pixels from beyond the edge repeat the
# edge.


def augment(x: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Return images cropped, flipped and rotated at random, each by its own draws.

    Args:
        x: Preprocessed images `[B, C, H, W]`, on any device; they are not changed.
        config: What to do.
        generator: CPU generator keyed by the step; the draws are the same on every device.
    """
    if config == AugmentConfig() or len(x) == 0:
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
    return x


def _crop(x: Tensor, offsets: Tensor) -> Tensor:
    """Move each image by its offsets (int64 `[2, B]`, rows and columns), as pad and crop would."""
    batch, _, height, width = x.shape
    rows = (torch.arange(height, device=x.device) + offsets[0, :, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + offsets[1, :, None]).clamp(0, width - 1)
    x = x.gather(2, rows[:, None, :, None].expand(batch, x.shape[1], height, width))
    return x.gather(3, columns[:, None, None, :].expand(batch, x.shape[1], height, width))


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate each image by its angle (radians `[B]`) about its center, bilinearly."""
    # The axes of the grid run over -1..1 whatever the sides: unequal ones would shear.
    ratio = x.shape[-2] / x.shape[-1]
    cos = angle.cos()
    sin = angle.sin()
    zero = torch.zeros_like(angle)
    rows = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


# Feature shift by site: what a site's own imaging device does to the images that are made there.

SCANNER_CHUNK = 256  # images at a time; part of the result's bits, as noise is drawn chunk by chunk


def apply_scanner(x_raw: Tensor, config: ScannerConfig, generator: torch.Generator) -> Tensor:
    """Return images as a device would have made them, of the same shape and dtype.

    In this order: resolution (bilinearly down by the factor and up again), Gaussian blur, contrast
    around the middle gray, brightness, Gaussian noise. uint8 images are clipped to 0..255 and
    rounded; floats are taken to range over 0..1 and are not clipped.

    Args:
        x_raw: Images `[N, C, H, W]`, uint8 or floats; they are not changed.
        config: The device.
        generator: Draws the noise, and nothing else.
    """
    if config == ScannerConfig() or len(x_raw) == 0:
        return x_raw
    return torch.cat([_apply(chunk, config, generator) for chunk in x_raw.split(SCANNER_CHUNK)])


def _apply(x_raw: Tensor, config: ScannerConfig, generator: torch.Generator) -> Tensor:
    x = x_raw.float() / 255 if x_raw.dtype == torch.uint8 else x_raw
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
    return (x.clamp(0, 1) * 255).round().to(torch.uint8) if x_raw.dtype == torch.uint8 else x


def _blur(x: Tensor, sigma: float, dim: int) -> Tensor:
    """Apply a Gaussian filter along one axis, truncated at three sigma, with repeated edges."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.to(x.dtype) / sigma) ** 2)
    size = x.shape[dim]
    total = torch.zeros_like(x)
    for offset, weight in zip(offsets, weights / weights.sum(), strict=True):
        total += weight * x.index_select(dim, (torch.arange(size) + offset).clamp(0, size - 1))
    return total


# Whether what a client or the server sees of examples fits them, known before anybody has rows.

Shape = tuple[int, ...]


def check_settings(kinds: Iterable[SettingsProfile], dataset: Dataset) -> None:
    """Refuse settings of clients that do not fit the examples: for images only, or for numbers."""
    for kind in kinds:
        preprocessed_shape(kind.first, kind.settings, raw_shape(dataset), dataset.layout)
        if dataset.vocabulary is not None:
            _check_tokens(kind.first, kind.settings.preprocess)


def check_same_shape(
    found: Shape, where: str, name: str, clients: Mapping[str, ClientSettings], common: Dataset,
    server: PreprocessConfig | None = None,
) -> None:  # fmt: skip
    """Refuse examples of another set that have another shape than the common set's through a view.

    Args:
        found: Their raw shape.
        where: The other set's place in the configuration, for messages.
        name: The other set's name, for messages.
        clients: Settings of the clients that see both sets.
        common: The common set.
        server: How the server sees examples, if it has a model of its own.

    Raises:
        UserError: With the client, or the server, and both shapes.
    """
    shapes = found, raw_shape(common)
    seen = [
        (
            f"client '{c}'",
            "its preprocess",
            *(preprocessed_shape(c, settings, shape, common.layout) for shape in shapes),
        )
        for c, settings in clients.items()
    ]
    if server is not None:
        place = "server.preprocess"
        view = Preprocess.without_normalization(server, common.layout, shapes[1], place)
        seen.append(("the server", place, *(view.shape(shape, place) for shape in shapes)))
    for who, section, theirs, ours in seen:
        if theirs != ours:
            raise UserError(
                f"{where}: examples of {name} have shape {theirs}, those of the common set {common.name} {ours}, "
                f"as {who} sees them; set {section}.resize or channels"
            )


def required_columns(settings: Iterable[ClientSettings], layout: ColumnLayout) -> set[str]:
    """Return the columns or blocks that one of these clients sees and that may not be missing."""
    return {column for one in settings for column in _required_columns(one.preprocess, layout)}


def preprocessed_shape(
    name: str, settings: ClientSettings, raw: Shape, layout: ColumnLayout
) -> Shape:
    """Return the shape of an example as a client sees it.

    Args:
        name: The client.
        settings: Its settings.
        raw: Shape of a raw example.
        layout: Names along the last axis of the examples.

    Raises:
        UserError: If the settings do not fit the examples.
    """
    where = f"clients: '{name}': preprocess"
    seen = Preprocess.resolve(_fixed_view(settings.preprocess), None, where, layout, raw).shape(
        raw, where
    )
    image = len(seen) == 3
    for setting, value, plain, given in (
        ("scanner", settings.scanner, ScannerConfig(), raw),
        ("augment", settings.augment, AugmentConfig(), seen),
    ):
        if value != plain and len(given) != 3:
            raise UserError(
                f"clients: '{name}': {setting}: is for images, but the examples have shape {given}; leave it out"
            )
    if image and settings.augment.crop >= min(seen[1:]):
        raise UserError(
            f"clients: '{name}': augment.crop: found {settings.augment.crop}; images have {min(seen[1:])} pixels"
        )
    return seen


def raw_shape(dataset: Dataset) -> Shape:
    """Return the shape of an example as it lies in memory."""
    return tuple(dataset.train.x.shape[1:])


def _required_columns(config: PreprocessConfig, layout: ColumnLayout) -> Collection[str]:
    if config.missing is not None:
        return ()
    return layout.names if config.columns is None else config.columns


def _check_tokens(name: str, view: PreprocessConfig) -> None:
    for name_of in ("normalize", "missing"):
        if getattr(view, name_of) is not None:
            where = f"clients: '{name}': preprocess.{name_of}"
            raise UserError(f"{where}: is for numbers, but the examples are tokens; leave it out")


def _fixed_view(config: PreprocessConfig) -> PreprocessConfig:
    """Return the view as far as it is known before clients have rows."""
    return config.model_copy(update={"normalize": None}) if config.normalize == "own" else config


# Missing values: who would see them without having said what becomes of them.

MISSING_CHUNK = 8192  # rows checked together


def check_missing_values(
    kinds: Iterable[SettingsProfile],
    clients: Population,
    private: ClientRows,
    public: Mapping[str, RowSelection],
    layout: ColumnLayout,
    first_missing: str = "",
) -> list[str]:
    """Refuse a missing value in what a client sees and has no `missing: indicate` for.

    Args:
        kinds: The profiles of the clients that see the public sets.
        clients: Settings by client.
        private: The clients' own rows.
        public: The public sets, by name.
        layout: The names along the last axis of the examples.
        first_missing: The source's own description of where the first missing value is.

    Returns:
        A line for each profile that sees nothing of the proxy set.

    Raises:
        UserError: With the client, the set and the row.
    """
    located = private.rows_by_location()
    every = [*public.values(), *(share for _, share in located)]
    incomplete = _sets_with_missing_values(share.examples for share in every)
    if not incomplete:
        return []
    incomplete_public = {n: s for n, s in public.items() if id(s.examples) in incomplete}
    raw = tuple(public["common_test"].examples.x.shape[1:])
    notes = []
    for kind in kinds:
        where = f"clients: '{kind.first}': preprocess"
        view = Preprocess.without_normalization(kind.settings.preprocess, layout, raw, where)
        places = dict(incomplete_public)
        if "proxy" in places and is_all_missing(places["proxy"], view):
            more = f" (and {kind.count - 1:,} more)" if kind.count > 1 else ""
            notes.append(
                f"client '{kind.first}'{more} sees nothing of the proxy set: it has no part in "
                "what is done with it"
            )
            del places["proxy"]
        if private.lazy_partition is not None:
            places["train"] = private.lazy_partition.pool
        if view.missing is None:
            check_view(places, view, layout, where, first_missing)
    for (client, split), share in located:
        if client and id(share.examples) in incomplete:
            config = clients[client].preprocess
            where = f"clients: '{client}': preprocess"
            raw = tuple(share.examples.x.shape[1:])
            view = Preprocess.without_normalization(config, layout, raw, where)
            if view.missing is None:
                check_view({split: share}, view, layout, where, first_missing)
    return notes


def _sets_with_missing_values(every: Iterable[Examples]) -> set[int]:
    """Return the `id` of each set that has a missing value; a set that many share is read once."""
    sets = {id(examples): examples.x for examples in every}
    return {
        key
        for key, x in sets.items()
        if x.is_floating_point()
        and any(bool(rows.isnan().any()) for rows in x.split(MISSING_CHUNK))
    }


def check_view(
    places: Mapping[str, RowSelection],
    view: Preprocess,
    layout: ColumnLayout,
    where: str,
    first_missing: str = "",
) -> None:
    """Refuse a missing value that a view would see in one of these sets.

    Args:
        places: The sets, by name.
        view: A view that does not say what becomes of missing values.
        layout: The names along the last axis of the examples.
        where: The view's place in the configuration.
        first_missing: The source's own description of where the first missing value is.

    Raises:
        UserError: With the set, the row and the column.
    """
    names = [n for n, (start, stop) in layout.boundaries.items() for _ in range(start, stop)]
    for place, share in places.items():
        if not share.examples.x.is_floating_point():
            continue
        for rows in share.rows.split(MISSING_CHUNK):
            missing = view.select_columns(share.examples.x[rows]).isnan()
            if not bool(missing.any()):
                continue
            row, *_, column = missing.nonzero()[0].tolist()
            what = f"'{view.names(names)[column]}'" if names else "one column"
            first = f" ({first_missing})" if first_missing else ""
            raise UserError(
                f"{where}.missing: row {int(rows[row])} of {place} has no value of {what}{first}; "
                "set it to indicate, or leave what is missing out of preprocess.columns"
            )


def is_all_missing(share: RowSelection, view: Preprocess) -> bool:
    """Return whether everything that the view takes of these rows is missing."""
    x = share.examples.x
    # The first chunk decides as a rule.
    return x.is_floating_point() and all(
        bool(view.select_columns(x[rows]).isnan().all()) for rows in share.rows.split(MISSING_CHUNK)
    )


def usable_rows(x_raw: Tensor, view: Preprocess) -> Tensor:
    """Return which rows can be learned from through a view, bool `[N]`.

    Something of a row has to be there, and all of it unless the view says what becomes of missing
    values.
    """
    if not x_raw.is_floating_point():
        return torch.ones(len(x_raw), dtype=torch.bool)
    missing = view.select_columns(x_raw).isnan().flatten(1)
    return ~(missing.any(1) if view.missing is None else missing.all(1))
