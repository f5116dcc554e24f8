"""Hourly time series as windows for forecasting: generated traffic, or series from a file.

Values are divided by a level, the site's mean in the training period or in the preceding week, so
that sites of different sizes are comparable. No training row depends on later periods, and rows
with targets in two periods are excluded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hetero_fl.config.data import WEEK, ReadConfig, SeriesConfig, SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset, Examples, concatenate_examples
from hetero_fl.data.registry import register_source
from hetero_fl.utils.errors import UserError, check_names
from hetero_fl.utils.seeding import keyed_numpy_generator

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

    @property
    def end(self) -> int:
        """Last hour, in hours since 1970."""
        return self.start + len(self.value) - 1


@dataclass(frozen=True)
class Periods:
    """The boundaries of the training, validation and test periods.

    Attributes:
        train: Last hour of the training period, in hours since 1970.
        validation: Last hour of the validation period, in hours since 1970. The test period
            follows.
    """

    train: int
    validation: int

    @classmethod
    def from_series(cls, sites: Sequence[HourlySeries], config: SeriesConfig) -> Periods:
        """Divide the time from the first to the last hour of all sites into three periods.

        `config.validation` and `config.test` are the shares of the last two periods.
        """
        first = min(s.start for s in sites)
        last = max(s.end for s in sites)
        validation = last - round(config.test * (last - first))
        return cls(validation - round(config.validation * (last - first)), validation)


def make_windows(
    sites: Sequence[HourlySeries],
    config: SeriesConfig,
    *,
    name: str,
    unit: str,
    lanes: Sequence[str],
    weather: Sequence[str],
    simulated: bool = False,
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
        simulated: Whether the data is generated.
        about: Short description.

    Raises:
        UserError: If a site has no training row, or the mean value of a site is not positive.
    """
    periods = Periods.from_series(sites, config)
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
        simulated,
        about,
        (unit or "value", *week_before, *CALENDAR, *weather, *lanes),
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
    return str(np.datetime64(hour, "h")).replace("T", " ") + " h"


DAYS = 300
BEGIN = 455_880
"""Monday, January 3, 2022, in hours since 1970."""
PUBLIC = "public"
# Mean number of vehicles per hour, first day, share of the peaks, shift of the peaks in hours,
# trend, effect of rain, and whether cameras count the vehicles.
JUNCTIONS: dict[str, tuple[float, int, float, float, float, float, bool]] = {
    "camera_1": (900.0, 0, 0.75, 0.0, 0.30, 0.10, True),
    "camera_2": (400.0, 120, 0.65, 0.5, 0.15, 0.15, True),
    "sensor_1": (60.0, 0, 0.50, -0.5, 0.25, 0.25, False),
    "sensor_2": (25.0, 190, 0.60, 0.0, 0.10, 0.20, False),
    PUBLIC: (200.0, 0, 0.60, 0.0, 0.20, 0.15, False),
}
LANES = 3
WEATHER = 2


@register_source("traffic", keys=("path", "label", "group", "series", "read"), generates=True)
def traffic(config: SourceConfig, _root: Path) -> Dataset:
    """Generate the hourly traffic of four junctions (groups), or read a file.

    A `.csv`, `.tsv` or `.parquet` file has one row per hour and junction. `series.time` names the
    column of dates, `label` the column of counts (`Vehicles` by default), and `group` the column of
    junctions (`Junction` by default, if it exists).
    """
    series = config.series or SeriesConfig()
    if config.path is not None:
        path = Path(config.path).expanduser()
        return read_traffic(path, series, config.label, config.group, config.read)
    for key in ("label", "group"):
        if getattr(config, key) is not None:
            raise UserError(f"{key}: needs path, as it names a column; set path or remove it")
    selected = series.sites or tuple(name for name in JUNCTIONS if name != PUBLIC)
    check_names(selected, JUNCTIONS, "series.sites: unknown site")
    sites = [site for site in make_junctions() if site.name in selected]
    return make_windows(
        sites,
        series,
        name="traffic",
        unit="vehicles",
        simulated=True,
        about="generated junctions, hour by hour",
        lanes=tuple(f"lane_{i + 1}" for i in range(LANES)),
        weather=("temperature", "rain"),
    )


def read_traffic(
    path: Path,
    series: SeriesConfig,
    label: str | None,
    group: str | None,
    read: ReadConfig | None = None,
) -> Dataset:
    """Read the hourly series of a file as windows.

    Args:
        path: File to read.
        series: Series settings.
        label: Column of the values. If None, `Vehicles`.
        group: Column of the sites. If None, `Junction` if the file has this column.
        read: Separators and decimal mark of a CSV or TSV file. If None, those of English.

    Raises:
        UserError: If the file cannot be read, or `read_sites` or `make_windows` fails.
    """
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.recordings import read_sites
    from hetero_fl.data.sources.table_files import read_frame

    frame = read_frame(path, (group or "Junction",), read=read)
    group = group or ("Junction" if "Junction" in frame.columns else None)
    sites = read_sites(frame, path, series, label or "Vehicles", group)
    try:
        return make_windows(
            sites,
            series,
            name="traffic",
            unit=(label or "Vehicles").lower(),
            about=f"{path.name}, hour by hour",
            lanes=series.lanes,
            weather=series.weather,
        )
    except UserError as error:
        raise UserError(f"path: {path}: {error}") from None


def make_junctions() -> list[HourlySeries]:
    """Generate the hourly vehicle counts of four junctions, followed by a public junction.

    Counts follow Poisson distributions with mean
    `level * profile * trend * weather * incident * exp(u)`. The profile over day and week and the
    linear trend differ between junctions, but the weather is the same for all. Incidents reduce the
    count for some hours, and u is an autoregressive process, a part of which is the same for all
    junctions. Cameras count the vehicles on three lanes. Sensors count all vehicles and measure the
    weather.
    """
    hours = DAYS * 24
    town = keyed_numpy_generator("data", "traffic", 0, "town")
    weather = _weather(town, hours)
    common = _drift(town, hours, 0.05)
    series = []
    for name, (level, day, peaks, shift, trend, rain, cameras) in JUNCTIONS.items():
        rng = keyed_numpy_generator("data", "traffic", 0, name)
        begin = day * 24
        hour = np.arange(hours)
        mean = level * _profile(hour, peaks, shift) * (1 + trend * hour / hours)
        mean *= 1 - rain * np.tanh(weather[:, 1] / 2)
        incident, first_lane = _incidents(rng, hours)
        mean *= incident * np.exp(common + _drift(rng, hours, 0.06))
        lanes = np.full((hours, LANES), np.nan)
        if cameras:
            share = np.stack([0.4 + 0.05 * np.sin(2 * np.pi * hour / 24), np.full(hours, 0.35)], 1)
            share = np.concatenate([share, 1 - share.sum(1, keepdims=True)], 1)
            share[:, 0] *= first_lane
            share /= share.sum(1, keepdims=True)
            lanes = rng.poisson(mean[:, None] * share).astype(np.float64)
            value = lanes.sum(1)
        else:
            value = rng.poisson(mean).astype(np.float64)
        measured = np.full((hours, WEATHER), np.nan) if cameras else weather
        series.append(
            HourlySeries(name, BEGIN + begin, value[begin:], lanes[begin:], measured[begin:])
        )
    return series


def _profile(hour: np.ndarray, peaks: float, shift: float) -> np.ndarray:
    """Return the relative traffic by time of day and week, with a mean of about 1 over a week."""
    clock = (hour % 24).astype(np.float64)
    weekend = hour // 24 % 7 >= 5

    def bump(middle: float, width: float) -> np.ndarray:
        away = np.minimum(abs(clock - middle), 24 - abs(clock - middle))
        return np.asarray(np.exp(-0.5 * (away / width) ** 2))

    working = peaks * (2.4 * bump(8 + shift, 1.4) + 2.6 * bump(17.5 + shift, 1.8)) + (
        1 - peaks
    ) * 2.2 * bump(13, 4.5)
    free = 1.7 * bump(14.5, 4.0)
    return 0.15 + np.where(weekend, free, working)


def _drift(rng: np.random.Generator, hours: int, size: float) -> np.ndarray:
    """Generate an autoregressive series of order 1 with standard deviation `size`."""
    steps = rng.normal(0, size * (1 - 0.9**2) ** 0.5, hours)
    series = np.empty(hours)
    last = 0.0
    for t, step in enumerate(steps):
        last = series[t] = 0.9 * last + step
    return series


def _weather(rng: np.random.Generator, hours: int) -> np.ndarray:
    """Generate temperature in °C and rain in mm per hour, shape `[hours, 2]`."""
    hour = np.arange(hours)
    season = 9 * np.cos(2 * np.pi * hour / (365 * 24))
    temperature = 10 - season - 4 * np.cos(2 * np.pi * (hour - 3) / 24)
    rain = np.zeros(hours)
    for begin in np.flatnonzero(rng.random(hours) < 1 / 40):
        rain[begin : begin + rng.integers(2, 10)] = rng.exponential(1.5)
    return np.stack([temperature + _drift(rng, hours, 3.0), rain], 1)


def _incidents(rng: np.random.Generator, hours: int) -> tuple[np.ndarray, np.ndarray]:
    """Generate incidents as factors of the count and of the first lane's share, `[hours]` each.

    The share of the first lane decreases one hour before an incident.
    """
    total = np.ones(hours)
    first_lane = np.ones(hours)
    for begin in np.flatnonzero(rng.random(hours) < 1 / 120):
        end = begin + rng.integers(2, 7)
        lost = rng.uniform(1 / 3, 2 / 3)
        total[begin:end] = 1 - lost
        total[end : end + 2] *= 1 + lost / 3
        first_lane[max(0, begin - 1) : end] = 0.3
    return total, first_lane
