"""Preprocessing of examples, and checks of missing values.

`Preprocess` converts raw examples to the inputs of a participant's model. An instance is called a
view, as several participants can use different columns and formats of the same examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import ConfigDict, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.config.clients import (
    NO_AUGMENT,
    ClientSettings,
    Normalize,
    PreprocessConfig,
    ScannerConfig,
)
from hetero_fl.config.population import Population, SettingsProfile
from hetero_fl.core.image_transforms import apply_transform
from hetero_fl.core.images import to_floats
from hetero_fl.core.saved_model import SavedModel, describe_invalid
from hetero_fl.data.dataset import (
    Block,
    ColumnLayout,
    Dataset,
    Spans,
    spans_of,
)
from hetero_fl.data.overlap import PUBLIC_SETS
from hetero_fl.data.splits import RowSelection
from hetero_fl.utils.errors import UserError

if TYPE_CHECKING:
    from hetero_fl.data.client_rows import ClientRows

CONFIG_SECTIONS = ("clients.defaults.preprocess", "server.preprocess")
"""Sections of the configuration that error messages may name."""
CHUNK = 4096
"""Maximum number of rows processed at a time for statistics."""
CHUNK_VALUES = 2**22
"""Maximum number of values processed at a time for statistics."""
MISSING_CHUNK = 8192
"""Number of rows checked for missing values at a time."""
NOTHING = ColumnLayout()
"""Layout of examples whose columns have no names."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Preprocess:
    """A view that converts raw examples to the inputs of a model.

    The steps are: select columns, convert to float, resize, change the number of channels,
    normalize, and append indicators of missing values. Series `[N, T, F]` become `[N, F, T]`, as
    models expect channels first. Views are hashable, so they can be used as cache keys.

    Attributes:
        resize: Height and width of images in pixels. If None, the size does not change.
        channels: Number of channels of images. If None, the number does not change.
        mean: Mean to subtract, a single number or one per channel of images or per column of
            tables, series and blocks. If None, examples are not normalized.
        std: Standard deviation to divide by, in the format of `mean`.
        raw: Shape of a raw example. If None, the shape is not known.
        spans: Tensor ranges to select. If None, all columns are selected.
        blocks: Blocks in the selected columns. A single block is reshaped to its own shape unless
            `missing` is set.
        missing: If "indicate", NaN becomes 0 after normalization, and an indicator per column, or
            per block of data with blocks, is appended. A block is missing if all its values are
            missing. If None, NaN does not change.
        transform: Reference to a function that transforms each batch after all other steps. If
            None, no function is called.
        pixel_range: Number by which integer pixels are divided. If None, 255.

    Example:
        >>> import torch
        >>> from hetero_fl.data import Preprocess
        >>> view = Preprocess(mean=0.5, std=0.25)
        >>> images = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
        >>> view(images).unique()
        tensor([2.])
        >>> Preprocess(resize=4, channels=3).shape((1, 8, 8))
        (3, 4, 4)
    """

    resize: PositiveInt | None = None
    channels: PositiveInt | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    raw: Shape | None = None
    spans: Spans | None = None
    blocks: tuple[Block, ...] = ()
    missing: Literal["indicate"] | None = None
    transform: str | None = None
    pixel_range: float | None = None

    __pydantic_config__ = ConfigDict(extra="forbid", defer_build=True)

    def __post_init__(self) -> None:
        # Files store blocks as plain tuples.
        object.__setattr__(self, "blocks", tuple(Block(*block) for block in self.blocks))

    @classmethod
    def of_model(cls, model: SavedModel) -> Preprocess:
        """Return the view of a saved model, whose file may have any values.

        Raises:
            UserError: If a key is unknown, or a value has the wrong type.
        """
        try:
            return _ADAPTER.validate_python(model.preprocess)
        except ValidationError as error:
            raise UserError(
                f"model {model.arch.display_name}: preprocess: {describe_invalid(error)}"
            ) from None

    @classmethod
    def without_normalization(
        cls,
        config: PreprocessConfig,
        layout: ColumnLayout = NOTHING,
        raw: Shape = (),
        where: str = "preprocess",
    ) -> Preprocess:
        """Create the view that a configuration defines, without normalization.

        Args:
            config: Preprocessing configuration.
            layout: Names of the columns or blocks along the last axis of the examples.
            raw: Shape of a raw example.
            where: Configuration section, for error messages.

        Raises:
            UserError: If a column or block is unknown.
        """
        view = cls(
            config.resize,
            config.channels,
            missing=config.missing,
            transform=config.transform,
            pixel_range=layout.pixel_range,
        )
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
        raw: Shape = (),
    ) -> Preprocess:
        """Create the view that a configuration defines.

        The statistics for `normalize: own` are computed from the training rows. Images, and blocks
        that are images, have one mean and standard deviation over all pixels after `resize` and
        `channels`. Tables and series have one per column. Missing values are ignored. A column
        without values has mean 0, and standard deviations of 0 are replaced by 1.

        Args:
            config: Preprocessing configuration.
            train_x_raw: Raw training rows of the participant. Required for `normalize: own` only.
            where: Configuration section, for error messages.
            layout: Names of the columns or blocks along the last axis of the examples.
            raw: Shape of a raw example.

        Raises:
            UserError: If a column or block is unknown, there are no rows for `normalize: own`, or
                another setting does not apply to these rows.
        """
        view = cls.without_normalization(config, layout, raw, where)
        if isinstance(config.normalize, Normalize):
            fixed = (config.normalize.mean, config.normalize.std)
            mean, std = (tuple(v) if isinstance(v, list) else v for v in fixed)
            return replace(view, mean=mean, std=std)
        if config.normalize is None:
            return view
        if train_x_raw is None or len(train_x_raw) == 0:
            raise UserError(
                f"{where}.normalize=own needs training rows, got none; set mean and std instead"
            )
        raw_rows = tuple(train_x_raw.shape[1:])
        view.shape(raw_rows, where)
        means, stds = view._statistics(train_x_raw)
        if len(view._blank_values(raw_rows).shape) == 4:
            return replace(view, mean=float(means), std=float(stds))
        return replace(view, mean=tuple(means.tolist()), std=tuple(stds.tolist()))

    def _statistics(self, x_raw: Tensor) -> tuple[Tensor, Tensor]:
        """Compute mean and standard deviation, float64 `[1]` for images, otherwise `[columns]`."""
        raw = tuple(x_raw.shape[1:])
        blank = self._blank_values(raw)
        columns = 1 if blank.ndim == 4 else blank.shape[-1]
        total, squares, rows = (torch.zeros(columns).double() for _ in range(3))
        largest = max(1, math.prod(raw), math.prod(self.shape(raw)))
        size = min(CHUNK, max(1, CHUNK_VALUES // largest))
        for chunk in x_raw.split(size):
            values = self._values(chunk).double().reshape(-1, columns)
            total = total + self._sum(values)
            rows = rows + (~values.isnan()).sum(0)
        rows = self._pool_block_sums(rows)
        mean = self._pool_block_sums(total) / rows.clamp(min=1)
        # A second pass is numerically more stable than a difference of large sums.
        for chunk in x_raw.split(size):
            squares += self._sum(
                (self._values(chunk).double().reshape(-1, columns) - mean).square()
            )
        squares = self._pool_block_sums(squares)
        return mean, torch.where(squares > 0, (squares / rows.clamp(min=1)).sqrt(), 1.0)

    def _sum(self, values: Tensor) -> Tensor:
        return values.sum(0) if self.missing is None else values.nansum(0)

    def _pool_block_sums(self, sums: Tensor) -> Tensor:
        """Replace the sum of each column of an image block with the sum over the whole block."""
        sums = sums.clone()
        for block, (start, stop) in zip(self.blocks, spans_of(self.blocks), strict=True):
            if block.image and len(sums) > 1:
                sums[start:stop] = sums[start:stop].sum()
        return sums

    def __call__(self, x_raw: Tensor) -> Tensor:
        """Preprocess raw examples.

        Integer pixels are divided by `pixel_range`. Tokens (int64) are returned unchanged.

        Args:
            x_raw: Raw examples, shape `[N, ...]`.

        Returns:
            Examples in the default float type of torch, shape `[N, *self.shape(...)]`.
        """
        if x_raw.dtype == torch.int64:
            return x_raw
        x = self._values(x_raw)
        if self.missing is not None and x.ndim == 4:
            raise UserError(
                "missing: does not apply to images, only to tables, series and blocks; remove it"
            )
        if self.mean is not None and self.std is not None:
            x = (x - self._broadcast("mean", x)) / self._broadcast("std", x)
        if self.missing is not None:
            is_missing = x.isnan()
            indicators = is_missing
            if self.blocks:
                of_blocks = [is_missing[:, slice(*span)].all(1) for span in spans_of(self.blocks)]
                indicators = torch.stack(of_blocks, dim=1)
            x = torch.cat([x.masked_fill(is_missing, 0.0), indicators.to(x.dtype)], dim=-1)
        x = (x.transpose(1, 2) if x.ndim == 3 else x).contiguous()
        if self.transform is None or len(x) == 0:
            return x
        return apply_transform(self.transform, x, "preprocess.transform")

    def _values(self, x_raw: Tensor) -> Tensor:
        """Return the selected values in their output shape, before normalization."""
        dtype = torch.get_default_dtype()
        x = self.select_columns(x_raw)
        x = to_floats(x, self.pixel_range, dtype).to(dtype)
        if len(self.blocks) == 1 and self.missing is None:
            x = x.reshape(len(x), *self.blocks[0].shape)
        if x.ndim != 4 and (self.resize is not None or self.channels is not None):
            key = "resize" if self.resize is not None else "channels"
            raise UserError(
                f"{key}: applies to images only, got examples of shape {tuple(x.shape[1:])}; "
                "remove it"
            )
        if self.resize is not None and x.shape[-2:] != (self.resize, self.resize):
            x = F.interpolate(
                x, size=(self.resize, self.resize), mode="bilinear", align_corners=False
            )
        if self.channels is None or self.channels == x.shape[1]:
            return x
        if self.channels == 1:
            return x.mean(1, keepdim=True)
        if x.shape[1] != 1:
            raise UserError(
                f"channels: must be 1 or {x.shape[1]} for images with {x.shape[1]} channels, got "
                f"{self.channels}"
            )
        return x.expand(-1, self.channels, -1, -1)

    def _blank_values(self, raw_shape: Shape) -> Tensor:
        return self._values(torch.zeros(1).expand(1, *raw_shape))

    def select_columns(self, x_raw: Tensor) -> Tensor:
        """Return the selected columns of raw examples, shape `[N, ..., columns]`."""
        if self.spans is None:
            return x_raw
        parts = [x_raw[..., start:stop] for start, stop in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def names(self, columns: Sequence[str]) -> list[str]:
        """Return the names of the selected columns, given the names of all columns in order."""
        return [
            name
            for start, stop in self.spans or ((0, len(columns)),)
            for name in columns[start:stop]
        ]

    def _broadcast(self, key: Literal["mean", "std"], x: Tensor) -> Tensor:
        """Return the mean or standard deviation in a shape that broadcasts to that of `x`."""
        numbers = torch.tensor(getattr(self, key), dtype=x.dtype)
        if numbers.ndim == 0:
            return numbers
        count, axis = (x.shape[1], "channel") if x.ndim == 4 else (x.shape[-1], "column")
        if len(numbers) != count:
            wanted = "one number" + (f" or {count}, one per {axis}" if count > 1 else "")
            raise UserError(f"normalize.{key}: expected {wanted}, got {len(numbers)}")
        return numbers[:, None, None] if x.ndim == 4 else numbers

    def shape(self, raw_shape: Shape, where: str = "preprocess") -> Shape:
        """Return the shape of a preprocessed example, without the batch dimension.

        Args:
            raw_shape: Shape of a raw example. The shape (T, F) of a series becomes (columns, T).
            where: Configuration section, for error messages.

        Raises:
            UserError: If a setting does not apply to the examples: `resize` or `channels` without
                images, `missing` with images, an impossible conversion of channels, or a number of
                means or standard deviations that does not match the channels or columns.
        """
        blank = torch.zeros(1).expand(1, *raw_shape)
        try:
            return tuple(replace(self, transform=None)(blank).shape[1:])
        except UserError as error:
            raise UserError(f"{where}.{error}") from None


_ADAPTER = TypeAdapter(Preprocess)


def check_settings(profiles: Iterable[SettingsProfile], dataset: Dataset) -> None:
    """Check that the settings of the clients apply to the examples.

    Raises:
        UserError: If settings for images are used for other examples, or settings for numbers are
            used for tokens.
    """
    for profile in profiles:
        preprocessed_shape(profile.first, profile.settings, raw_shape(dataset), dataset.layout)
        for key in ("normalize", "missing") if dataset.vocabulary is not None else ():
            if getattr(profile.settings.preprocess, key) is not None:
                raise UserError(
                    f"clients: '{profile.first}': preprocess.{key}: does not apply to tokens; "
                    "remove it"
                )


def check_same_shape(
    shape: Shape,
    where: str,
    *,
    clients: Mapping[str, ClientSettings],
    common: Dataset,
    server: PreprocessConfig | None = None,
) -> None:
    """Check that examples have the shape of the main data set after preprocessing.

    Args:
        shape: Raw shape of the examples.
        where: Configuration key of the examples, for error messages.
        clients: Settings of the clients that use the examples, keyed by client id.
        common: Main data set.
        server: Preprocessing of the server. If None, the server is not checked.

    Raises:
        UserError: If the shapes differ for a client or the server.
    """
    configs = {f"client '{client}'": settings.preprocess for client, settings in clients.items()}
    if server is not None:
        configs["the server"] = server
    for participant, config in configs.items():
        section = "server.preprocess" if config is server else f"{participant}: preprocess"
        view = Preprocess.without_normalization(config, common.layout, raw_shape(common), section)
        found = view.shape(shape, section)
        expected = view.shape(raw_shape(common), section)
        if found != expected:
            key = "server.preprocess" if config is server else "its preprocess"
            advice = f"; set {key}.resize or channels" if len(found) == 3 else ""
            raise UserError(
                f"{where}: expected examples of shape {expected} as in the main data set after "
                f"preprocessing for {participant}, got {found}{advice}"
            )


def required_columns(settings: Iterable[ClientSettings], layout: ColumnLayout) -> set[str]:
    """Return the columns or blocks that any of the clients uses and that must not be missing."""
    required: set[str] = set()
    for each in settings:
        if each.preprocess.missing is None:
            selected = each.preprocess.columns
            required.update(layout.names if selected is None else selected)
    return required


def preprocessed_shape(
    name: str, settings: ClientSettings, raw: Shape, layout: ColumnLayout
) -> Shape:
    """Return the shape of an example after the preprocessing of a client.

    Args:
        name: Client id, for error messages.
        settings: Settings of the client.
        raw: Shape of a raw example.
        layout: Names of the columns or blocks along the last axis of the examples.

    Raises:
        UserError: If the settings do not apply to the examples.
    """
    where = f"clients: '{name}': preprocess"
    view = Preprocess.resolve(_fixed_view(settings.preprocess), None, where, layout, raw)
    output = view.shape(raw, where)
    for key, value, default, shape in (
        ("scanner", settings.scanner, ScannerConfig(), raw),
        ("augment", settings.augment, NO_AUGMENT, output),
    ):
        if value != default and len(shape) != 3:
            raise UserError(
                f"clients: '{name}': {key}: applies to images only, got examples of shape {shape}; "
                "remove it"
            )
    if len(output) == 3 and settings.augment.crop >= min(output[1:]):
        raise UserError(
            f"clients: '{name}': augment.crop: must be < {min(output[1:])}, the image size in "
            f"pixels, got {settings.augment.crop}"
        )
    return output


def raw_shape(dataset: Dataset) -> Shape:
    """Return the shape of a raw example."""
    return tuple(dataset.train.x.shape[1:])


def _fixed_view(config: PreprocessConfig) -> PreprocessConfig:
    """Return a configuration without settings that depend on the rows of a client."""
    return config.model_copy(update={"normalize": None}) if config.normalize == "own" else config


def check_missing_values(
    profiles: Iterable[SettingsProfile],
    clients: Population,
    private: ClientRows,
    public: Mapping[str, RowSelection],
    *,
    layout: ColumnLayout,
) -> list[str]:
    """Check that clients with missing values have set `preprocess.missing: indicate`.

    Args:
        profiles: Distinct settings of the clients that use the public sets.
        clients: Client settings, keyed by client id.
        private: Rows of the clients.
        public: Public sets, keyed by name.
        layout: Names of the columns or blocks along the last axis of the examples.

    Returns:
        A remark for each of `profiles` for which all values of the proxy set are missing.

    Raises:
        UserError: If a client without `missing: indicate` uses a missing value.
    """
    located = private.rows_by_location()
    shares = [*public.values(), *(share for _, share in located)]
    inputs = {id(share.examples.x): share.examples.x for share in shares}
    if not any(map(_has_gap, inputs.values())):
        return []
    raw = tuple(public["common_test"].examples.x.shape[1:])
    notes = []
    for profile in profiles:
        where = f"clients: '{profile.first}': preprocess"
        view = Preprocess.without_normalization(profile.settings.preprocess, layout, raw, where)
        sets = dict(public)
        if private.lazy_partition is not None:
            sets["train"] = private.lazy_partition.pool
        if "proxy" in sets and is_all_missing(sets["proxy"], view):
            del sets["proxy"]
            more = f" (and {profile.count - 1:,} more)" if profile.count > 1 else ""
            notes.append(
                f"client '{profile.first}'{more} has none of the values of the proxy set and "
                "is excluded from training on it"
            )
        check_view(sets, view, layout, where)
    for (client, split), share in located:
        if client:
            where = f"clients: '{client}': preprocess"
            config = clients[client].preprocess
            view = Preprocess.without_normalization(config, layout, raw, where)
            check_view({split: share}, view, layout, where)
    return notes


def _has_gap(x: Tensor) -> bool:
    """Return whether examples have missing values. Rows in files are read once."""
    return x.is_floating_point() and any(
        bool(rows.isnan().any()) for rows in x.split(MISSING_CHUNK)
    )


def check_view(
    sets: Mapping[str, RowSelection],
    view: Preprocess,
    layout: ColumnLayout,
    where: str,
) -> None:
    """Check that a view without `missing: indicate` selects no missing values of sets.

    Args:
        sets: Sets of rows, keyed by name.
        view: The view.
        layout: Names of the columns or blocks along the last axis of the examples.
        where: Configuration section of the view, for error messages.

    Raises:
        UserError: If a selected value is missing.
    """
    for set_name, share in sets.items():
        gap = first_gap(share, view) if view.missing is None else None
        if gap is None:
            continue
        names = [n for n, (start, stop) in layout.boundaries.items() for _ in range(start, stop)]
        column = f"column '{view.names(names)[gap[1]]}'" if names else "one column"
        section = where if where in CONFIG_SECTIONS else CONFIG_SECTIONS[0]
        title = f"the {PUBLIC_SETS[set_name]}" if set_name in PUBLIC_SETS else set_name
        place = share.examples.locate(gap[0], title)
        other = f", or exclude the column by {section}.columns" if names else ""
        # Rows that a program passes are those of the client by their name.
        is_own = place.startswith(where.removesuffix("preprocess"))
        prefix = "" if is_own else f"{where}.missing: "
        raise UserError(
            f"{prefix}{place} has no value in {column}; set {section}.missing=indicate{other}"
        )


def first_gap(share: RowSelection, view: Preprocess) -> tuple[int, int] | None:
    """Return the row and the selected column of the first missing value, or None."""
    if not share.examples.x.is_floating_point():
        return None
    x = share.examples.x
    for rows in share.rows.split(MISSING_CHUNK):
        missing = view.select_columns(x[rows]).isnan()
        if bool(missing.any()):
            row, *_, column = missing.nonzero()[0].tolist()
            return int(rows[row]), column
    return None


def is_all_missing(share: RowSelection, view: Preprocess) -> bool:
    """Return whether the rows have only missing values in the columns that a view selects."""
    usable = usable_rows(share.examples.x[share.rows], replace(view, missing="indicate"))
    return not bool(usable.any())


def usable_rows(x_raw: Tensor, view: Preprocess) -> Tensor:
    """Return a mask `[N]` of the rows that a view can use.

    With `missing: indicate`, a row is usable if at least one selected value is present. Otherwise,
    a row is usable if all selected values are present.
    """
    if not x_raw.is_floating_point():
        return torch.ones(len(x_raw), dtype=torch.bool)
    usable = []
    for part in x_raw.split(MISSING_CHUNK):
        missing = view.select_columns(part).isnan().flatten(1)
        usable.append(~(missing.any(1) if view.missing is None else missing.all(1)))
    return torch.cat(usable)
