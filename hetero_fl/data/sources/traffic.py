"""Hourly time series of a file as windows for forecasting.

Values are divided by a level, the site's mean in the training period or in the preceding week, so
that sites of different sizes are comparable. No training row depends on later periods, and rows
with targets in two periods are excluded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hetero_fl.config.data import WEEK, SeriesConfig, SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.checks import first_true
from hetero_fl.data.dataset import Dataset, Examples, concatenate_examples
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.files import EMBEDDED
from hetero_fl.data.sources.npz_files import DATES, NAMES, ArraySpec, read_arrays
from hetero_fl.utils.arrays import index_names, owner_list
from hetero_fl.utils.errors import UserError, check_names

HOUR = 3600
"""Seconds per hour."""
BASELINE_LOGIT = math.log(9.0)
"""Logit of the class that a baseline predicts, which corresponds to a probability of 0.9."""
CALENDAR = ("hour_sin", "hour_cos", "week_sin", "week_cos")


@dataclass(frozen=True)
class HourlySeries:
    """An hourly series of one site.

    Attributes:
        name: Name of the site.
        start: First hour, in hours since 1970.
        value: Value of each hour, float64 `[T]`, NaN if missing.
        lanes: Value of each lane, float64 `[T, L]`, NaN if not measured.
        weather: Weather, float64 `[T, W]`, NaN if not measured.
    """

    name: str
    start: int
    value: np.ndarray
    lanes: np.ndarray
    weather: np.ndarray


class Periods(NamedTuple):
    """The ends of the training and validation periods. The test period follows.

    Attributes:
        train: Last hour of the training period, in hours since 1970.
        validation: Last hour of the validation period, in hours since 1970.
    """

    train: int
    validation: int


def divide_time(sites: Sequence[HourlySeries], config: SeriesConfig) -> Periods:
    """Divide the time from the first to the last hour of all sites into three periods.

    `config.validation` and `config.test` are the shares of the last two periods.
    """
    first = min(site.start for site in sites)
    last = max(site.start + len(site.value) - 1 for site in sites)
    validation = last - round(config.test * (last - first))
    return Periods(validation - round(config.validation * (last - first)), validation)


def make_windows(
    sites: Sequence[HourlySeries],
    config: SeriesConfig,
    *,
    name: str,
    unit: str,
    lanes: Sequence[str],
    weather: Sequence[str],
    about: str = "",
) -> Dataset:
    """Create a forecasting data set from the series of several sites.

    The inputs are windows of shape `[N, window, columns]`, and each site is a group. The columns
    are:

    - the value
    - the value one week before the target, for each horizon
    - the time of day and week (sine and cosine)
    - the weather, standardized with the statistics of the training period
    - the lanes

    Targets are the values at the horizons (hours ahead), or whether these values exceed a quantile
    of the training period. The baselines predict the current value (persistence) or the value one
    week before the target.

    Args:
        sites: Series of the sites.
        config: Window, horizons, target and periods.
        name: Name of the data set.
        unit: Unit of the values.
        lanes: Names of the lanes.
        weather: Names of the weather columns.
        about: Short description.

    Raises:
        UserError: If a site has no training row, or the mean value of a site is not positive.
    """
    periods = divide_time(sites, config)
    parts: dict[str, list[Examples]] = {"train": [], "validation": [], "test": []}
    names = tuple(s.name for s in sites)
    task = _task(config, unit)
    for index, site in enumerate(sites):
        rows = _rows(site, config, periods, task)
        for part, mask in _parts(rows, config, periods).items():
            own = rows.select_rows(torch.nonzero(mask).squeeze(1))
            own.group = torch.full((len(own),), index)
            own.group_names = names
            if part == "train" and not len(own):
                raise UserError(
                    f"series: site '{site.name}' has no training rows, as it starts on "
                    f"{_date(site.start)} and the training period ends on {_date(periods.train)}; "
                    "rows need a week and a window before them; reduce series.validation or "
                    "series.test, or exclude the site by series.sites"
                )
            parts[part].append(own)
    splits = {part: concatenate_examples(examples) for part, examples in parts.items()}
    week_before = [f"week_before_{h}" for h in config.horizons]
    levels = ", ".join(f"{site.name} {mean_level(site, periods):.3g}" for site in sites)
    note = (
        f"{name}: training until {_date(periods.train)}, validation until "
        f"{_date(periods.validation)}, then test; mean levels of the sites: {levels} {unit}"
    )
    return Dataset(
        name,
        task,
        splits["train"],
        splits["validation"],
        splits["test"],
        about=about,
        columns=(unit or "value", *week_before, *CALENDAR, *weather, *lanes),
        span=(config.horizons[-1] - config.horizons[0]) * HOUR,
        notes=(note.rstrip(),),
    )


def mean_level(site: HourlySeries, periods: Periods) -> float:
    """Return the mean value of a site in the training period.

    If the site has no hours in this period, the mean is NaN.

    Raises:
        UserError: If the site has hours in the training period, but no positive mean.
    """
    past = site.value[: max(0, periods.train + 1 - site.start)]
    mean = float(np.nanmean(past)) if np.isfinite(past).any() else math.nan
    if len(past) and not mean > 0:
        raise UserError(
            f"series: site '{site.name}': the mean until {_date(periods.train)} must be > 0, got "
            f"{mean:g}"
        )
    return mean


def _rows(site: HourlySeries, config: SeriesConfig, periods: Periods, task: Task) -> Examples:
    """Return all complete rows of a site. `time` is the time of the last target of each row."""
    window = config.window
    horizons = np.array(config.horizons)
    begin = WEEK - horizons[0] + window - 1
    if config.level == "week":
        # A full week must precede: negative indices would select hours at the end of the series.
        begin = max(begin, WEEK - 1)
    # The last observed hour of each row.
    now = np.arange(begin, len(site.value) - horizons[-1])
    seen = now[:, None] + np.arange(1 - window, 1)
    past = slice(0, max(0, periods.train + 1 - site.start))
    value = site.value
    scale = np.full((len(now), 1), mean_level(site, periods))
    if config.level == "week":
        week = value[now[:, None] + np.arange(1 - WEEK, 1)]
        scale = np.where(np.isfinite(week).all(1), week.mean(1), np.nan)[:, None]
        # Rows with NaN are dropped below.
        scale[scale <= 0] = np.nan
    hour = (site.start + seen).astype(np.float64)
    day = 2 * np.pi * hour / 24
    # 1970 began on a Thursday.
    weekly = 2 * np.pi * (hour + 72) / WEEK
    columns = [value[seen] / scale, *(value[seen + h - WEEK] / scale for h in horizons)]
    known = columns.copy()
    columns += [np.sin(day), np.cos(day), np.sin(weekly), np.cos(weekly)]
    columns += [_standardize(column, past)[seen] for column in site.weather.T]
    columns += [column[seen] / scale for column in site.lanes.T]
    ahead = now[:, None] + horizons
    target = value[ahead] / scale
    before = value[ahead - WEEK] / scale
    persistence = np.repeat(value[now][:, None] / scale, len(horizons), 1)
    complete = np.isfinite(np.concatenate([*known, target, persistence, before], 1)).all(1)
    forecasts = {"persistence": persistence, "a week before": before}
    rows = Examples(
        torch.from_numpy(np.stack(columns, -1)[complete]).float(),
        torch.from_numpy(target[complete]).float(),
        time=torch.from_numpy((site.start + ahead[complete, -1]) * HOUR),
        baselines={
            name: torch.from_numpy(values[complete]).float() for name, values in forecasts.items()
        },
    )
    if task.kind == "regression":
        rows.unit = torch.from_numpy(scale[complete, 0]).float()
        return rows
    threshold = math.inf
    if np.isfinite(value[past]).any():
        threshold = float(np.nanquantile(value[past], config.busy))
    # Division and multiplication by the scale may change the last digits of a value.
    threshold += 1e-9 * abs(threshold)
    is_busy = torch.from_numpy((target * scale)[complete] > threshold)
    rows.y = is_busy[:, 0].long() if task.kind == "multiclass" else is_busy.float()
    rows.baselines = {
        name: _baseline_outputs(torch.from_numpy((values * scale)[complete] > threshold), task)
        for name, values in forecasts.items()
    }
    return rows


def _parts(rows: Examples, config: SeriesConfig, periods: Periods) -> dict[str, torch.Tensor]:
    """Return a mask for each period that selects the rows whose targets are all in the period."""
    assert rows.time is not None
    last = rows.time // HOUR
    first = last - (config.horizons[-1] - config.horizons[0])
    return {
        "train": last <= periods.train,
        "validation": (first > periods.train) & (last <= periods.validation),
        "test": first > periods.validation,
    }


def _standardize(column: np.ndarray, past: slice) -> np.ndarray:
    """Standardize a column by its mean and standard deviation in the slice `past`.

    The result is NaN if the column has no values in this slice.
    """
    known = column[past][np.isfinite(column[past])]
    if not len(known):
        return np.full_like(column, np.nan)
    return (column - known.mean()) / (known.std() or 1.0)


def _task(config: SeriesConfig, unit: str) -> Task:
    titles = tuple(f"{h} h ahead" for h in config.horizons)
    if config.target == "value":
        return Task("regression", len(titles), titles, unit)
    return (
        Task("multiclass", 2, ("free", "busy"))
        if len(titles) == 1
        else Task("multilabel", len(titles), titles)
    )


def _baseline_outputs(above: torch.Tensor, task: Task) -> torch.Tensor:
    """Convert binary predictions to logits in the format of model outputs."""
    logits = BASELINE_LOGIT * (2 * above.float() - 1)
    return torch.cat([torch.zeros_like(logits), logits], 1) if task.kind == "multiclass" else logits


def _date(hour: int) -> str:
    return str(np.datetime64(int(hour), "h")).replace("T", " ") + " h"


TRAFFIC = EMBEDDED / "traffic.npz"
"""Simulated junctions."""
PUBLIC = "public"
"""Junction of the simulated file that is not a client."""


@register_source("traffic", keys=("path", "label", "group", "series", "read"), default_path=TRAFFIC)
def traffic(config: SourceConfig, _root: Path) -> Dataset:
    """Read the hourly series of a file as windows.

    A `.csv`, `.tsv` or `.parquet` file has one row per hour and junction. `series.time` names the
    column of dates, `label` the column of counts (`Vehicles` by default), and `group` the column of
    junctions (`Junction` by default, if it exists). A `.npz` file has an array for each of these
    columns. The simulated file has four junctions (groups), and a fifth one for a proxy set, which
    is only used if `series.sites` names it.
    """
    path = Path(str(config.path)).expanduser()
    series = config.series or SeriesConfig()
    label = config.label or "Vehicles"
    group = config.group or "Junction"
    if path.suffix.lower() == ".npz":
        sites = read_series(path, series, label, group, needs_group=config.group is not None)
    else:
        # Imported here because loading pandas is slow.
        from hetero_fl.data.sources.tables.columns import read_frame
        from hetero_fl.data.sources.tables.recordings import read_hours

        frame = read_frame(path, (group,), read=config.read)
        is_named = config.group is not None or group in frame.columns
        sites = read_hours(frame, path, series, label, group if is_named else None)
    if path == TRAFFIC and series.sites is None:
        sites = [site for site in sites if site.name != PUBLIC]
    try:
        return make_windows(
            sites,
            series,
            name="traffic",
            unit=label.lower(),
            about=f"{path.name}, hour by hour",
            lanes=series.lanes,
            weather=series.weather,
        )
    except UserError as error:
        raise UserError(f"path: {path}: {error}") from None


def read_series(
    path: Path, config: SeriesConfig, label: str, group: str, *, needs_group: bool = False
) -> list[HourlySeries]:
    """Read the hourly series of the sites of a `.npz` file, in the natural order of their names.

    Args:
        path: File to read. It has an array for each column, with an entry for each hour and site.
        config: Series settings. `config.time` is an array of dates (`datetime64`).
        label: Array of the values.
        group: Array of the sites. If it does not exist, all hours belong to one site.
        needs_group: Whether the array of the sites must exist.

    Raises:
        UserError: If an array is missing or malformed, or an hour of a site is missing.
    """
    where = f"path: {path}"
    default = SeriesConfig()
    # The default columns of lanes and weather are optional.
    required = {
        label: True,
        **dict.fromkeys(config.lanes, config.lanes != default.lanes),
        **dict.fromkeys(config.weather, config.weather != default.weather),
    }
    specs = {
        config.time: ArraySpec(("N",), DATES),
        group: ArraySpec(("N",), NAMES, config.time, required=needs_group),
    }
    for name, is_required in required.items():
        specs[name] = ArraySpec(("N",), rows=config.time, required=is_required, gaps=1)
    arrays = read_arrays(path, specs)
    hours = arrays[config.time].astype("datetime64[h]").astype(np.int64)
    owners = owner_list(
        arrays.get(group, np.full(len(hours), path.stem)), len(hours), f"{where}: {group}"
    )
    columns = {name: arrays[name] for name in required if name in arrays}
    return split_sites(hours, owners, columns, config, label=label, path=path)


def split_sites(
    hours: np.ndarray,
    owners: Iterable[object],
    columns: Mapping[str, np.ndarray],
    config: SeriesConfig,
    *,
    label: str,
    path: Path,
    first_row: int = 0,
    skips_gaps: bool = False,
) -> list[HourlySeries]:
    """Return the hourly series of the sites of a file, in the natural order of their names.

    Args:
        hours: Hour of each row, in hours since 1970, int64 `[N]`.
        owners: Site of each row.
        columns: Values `[N]`, keyed by column. Other columns are not measured.
        config: Series settings.
        label: Column of the values.
        path: The file, for error messages.
        first_row: Number of the first row, for error messages.
        skips_gaps: Whether hours may be missing.

    Raises:
        UserError: If the rows of a site are unsorted or duplicated, or an hour is missing.
    """
    site_of, known = index_names(owners)
    check_names(config.sites or (), known, "series.sites: site", f" not found in {path}")
    series = []
    for site in (name for name in known if config.sites is None or name in config.sites):
        rows = np.flatnonzero(site_of.numpy() == known.index(site))
        steps = np.diff(hours[rows])
        is_wrong = steps < 1
        cure = "sort the rows and remove duplicates"
        if not is_wrong.any() and not skips_gaps:
            is_wrong = steps > 1
            cure = "add the missing hours, or for a table set series.gaps=skip"
        if (index := first_true(is_wrong)) is not None:
            row = rows[index + 1]
            raise UserError(
                f"path: {path}: row {row + first_row}, column '{config.time}': expected the hour "
                f"after {_date(hours[rows[index]])} of site '{site}', got {_date(hours[row])}; "
                f"{cure}"
            )
        position = hours[rows] - hours[rows[0]]
        parts = []
        for names in ((label,), config.lanes, config.weather):
            hourly = np.full((position[-1] + 1, len(names)), np.nan)
            for index, name in enumerate(names):
                if name in columns:
                    hourly[position, index] = columns[name][rows]
            parts.append(hourly)
        value, lanes, weather = parts
        series.append(HourlySeries(site, int(hours[rows[0]]), value[:, 0], lanes, weather))
    return series
