"""Hourly traffic, generated or from a file, as windows to forecast from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hetero_fl.config.data import WEEK, SeriesConfig, SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset, Examples, concatenate_examples
from hetero_fl.data.registry import register_source
from hetero_fl.utils.errors import UserError, check_names
from hetero_fl.utils.seeding import keyed_numpy_generator

# Series by the hour as examples: a window of the past, the hours to forecast as they were a week
# before, and what came next.
#
# Everything is relative to a level, the site's own mean in the training period or that of the week
# up to now, so that sites of any size have inputs and outputs in common; `Examples.unit` brings
# figures back. Nothing that decides a training row (level, scales, threshold) looks beyond the end
# of the training period, and a row whose targets lie on both sides of a cut is in neither part.

HOUR = 3600
SURE = math.log(9.0)  # what a baseline that says yes or no gives: nine to one
CALENDAR = ("hour_sin", "hour_cos", "week_sin", "week_cos")


@dataclass(frozen=True)
class HourlySeries:
    """One place where something is counted by the hour.

    `start`: the first hour, counted from 1970. `value`: float64 `[T]`, NaN where an hour is missing. `lanes`: `[T, L]`, parts of
    the value; `weather`: `[T, W]`; NaN where they are not measured.
    """

    name: str
    start: int
    value: np.ndarray
    lanes: np.ndarray
    weather: np.ndarray

    @property
    def end(self) -> int:
        """The last hour."""
        return self.start + len(self.value) - 1


@dataclass(frozen=True)
class Periods:
    """The last hours of training and validation; the test period comes after."""

    train: int
    validation: int

    @classmethod
    def from_series(cls, sites: Sequence[HourlySeries], config: SeriesConfig) -> Periods:
        """Shares of the time from the first hour of any site to the last, the same dates for all."""
        first = min(s.start for s in sites)
        last = max(s.end for s in sites)
        validation = last - round(config.test * (last - first))
        return cls(validation - round(config.validation * (last - first)), validation)


def make_windows(
    sites: Sequence[HourlySeries], config: SeriesConfig, *, name: str, unit: str, lanes: Sequence[str], weather: Sequence[str],
    simulated: bool = False, about: str = "",
) -> Dataset:  # fmt: skip
    """The data set of some sites: series `[N, window, columns]`, dated, in groups by site.

    The columns: the value; for each horizon the value a week before the hour that is so far ahead; where in the day and in
    the week the hour is (sine, cosine); the weather, in deviations of the site's training period; the lanes, relative to the
    level as the value is. Targets: the value so many hours ahead, or whether it is above the threshold, a quantile of the
    training period. Baselines: the value now (persistence), and a week before the target.

    Raises:
        UserError: a site without a row to train on; values whose mean is not above 0.
    """
    periods = Periods.from_series(sites, config)
    parts: dict[str, list[Examples]] = {"train": [], "validation": [], "test": []}
    names = tuple(s.name for s in sites)
    task = _task(config, unit)
    for place, site in enumerate(sites):
        rows = _rows(site, config, periods, task)
        for part, mask in _parts(rows, config, periods).items():
            own = rows.select_rows(torch.nonzero(mask).squeeze(1))
            own.group = torch.full((len(own),), place)
            own.group_names = names
            if part == "train" and not len(own):
                raise UserError(
                    f"series: site '{site.name}' begins on {_date(site.start)}, too late: rows to train on need a week and a "
                    f"window before them and end on {_date(periods.train)}; lower validation or test, or leave the site out by "
                    "`sites`"
                )
            parts[part].append(own)
    made = {part: concatenate_examples(found) for part, found in parts.items()}
    return Dataset(
        name, task, made["train"], made["validation"], made["test"], simulated, about,
        (unit or "value", *(f"week_before_{h}" for h in config.horizons), *CALENDAR, *weather, *lanes),
        span=(config.horizons[-1] - config.horizons[0]) * HOUR,
        notes=(
            f"{name}: training until {_date(periods.train)}, validation until {_date(periods.validation)}, then test; "
            f"levels of the sites: {', '.join(f'{s.name} {mean_level(s, periods):.3g}' for s in sites)} {unit}".rstrip(),
        ),
    )  # fmt: skip


def mean_level(site: HourlySeries, periods: Periods) -> float:
    """The mean of the site's training period."""
    past = site.value[: max(0, periods.train + 1 - site.start)]
    mean = float(np.nanmean(past)) if np.isfinite(past).any() else math.nan
    if len(past) and not mean > 0:
        raise UserError(
            f"series: site '{site.name}': the mean until {_date(periods.train)} is {mean:g}; want one above 0"
        )
    return mean


def _rows(site: HourlySeries, config: SeriesConfig, periods: Periods, task: Task) -> Examples:
    """Every row of a site that has its window, the week before and its targets; `time` is the last target's."""
    window = config.window
    horizons = np.array(config.horizons)
    begin = WEEK - horizons[0] + window - 1
    if config.level == "week":  # hours before the first would be read off the end
        begin = max(begin, WEEK - 1)
    now = np.arange(begin, len(site.value) - horizons[-1])  # the last hour that a row sees
    seen = now[:, None] + np.arange(1 - window, 1)
    past = slice(0, max(0, periods.train + 1 - site.start))
    value = site.value
    scale = np.full((len(now), 1), mean_level(site, periods))
    if config.level == "week":
        week = value[now[:, None] + np.arange(1 - WEEK, 1)]
        scale = np.where(np.isfinite(week).all(1), week.mean(1), np.nan)[:, None]
        scale[scale <= 0] = np.nan  # nothing to be relative to: no row
    hour = (site.start + seen).astype(np.float64)
    day = 2 * np.pi * hour / 24
    weekly = 2 * np.pi * (hour + 72) / WEEK  # 1970 began on a Thursday
    columns = [value[seen] / scale, *(value[seen + h - WEEK] / scale for h in horizons)]
    known = columns.copy()
    columns += [np.sin(day), np.cos(day), np.sin(weekly), np.cos(weekly)]
    columns += [_standardize(column, past)[seen] for column in site.weather.T]
    columns += [column[seen] / scale for column in site.lanes.T]
    ahead = now[:, None] + horizons
    target = value[ahead] / scale
    before = value[ahead - WEEK] / scale
    persistence = np.repeat(value[now][:, None] / scale, len(horizons), 1)
    whole = np.isfinite(np.concatenate([*known, target, persistence, before], 1)).all(1)
    said = {"persistence": persistence, "a week before": before}
    rows = Examples(
        torch.from_numpy(np.stack(columns, -1)[whole]).float(),
        torch.from_numpy(target[whole]).float(),
        time=torch.from_numpy((site.start + ahead[whole, -1]) * HOUR),
        baselines={
            name: torch.from_numpy(outputs[whole]).float() for name, outputs in said.items()
        },
    )
    if task.kind == "regression":
        rows.unit = torch.from_numpy(scale[whole, 0]).float()
        return rows
    threshold = (
        float(np.nanquantile(value[past], config.busy))
        if np.isfinite(value[past]).any()
        else math.inf
    )

    def above(relative: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((relative * scale)[whole] > threshold + 1e-9 * abs(threshold))

    busy = above(target)
    rows.y = busy[:, 0].long() if task.kind == "multiclass" else busy.float()
    rows.baselines = {name: _outputs(above(outputs), task) for name, outputs in said.items()}
    return rows


def _parts(rows: Examples, config: SeriesConfig, periods: Periods) -> dict[str, torch.Tensor]:
    """Masks of the rows all of whose targets lie in the period."""
    assert rows.time is not None
    last = rows.time // HOUR
    first = last - (config.horizons[-1] - config.horizons[0])
    return {
        "train": last <= periods.train,
        "validation": (first > periods.train) & (last <= periods.validation),
        "test": first > periods.validation,
    }


def _standardize(column: np.ndarray, past: slice) -> np.ndarray:
    """(x − mean) / standard deviation, both of the past alone; as it is where nothing was measured then."""
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


def _outputs(above: torch.Tensor, task: Task) -> torch.Tensor:
    """Outputs of a rule that says yes or no."""
    yes = SURE * (2 * above.float() - 1)
    return torch.cat([torch.zeros_like(yes), yes], 1) if task.kind == "multiclass" else yes


def _date(hour: int) -> str:
    return str(np.datetime64(hour, "h")).replace("T", " ") + " h"


# Traffic by the hour: generated junctions, or a file of real ones.
#
# *Generated.* Four junctions and a public one, an hour a row, 300 days from a Monday. The vehicles
# of a junction are Poisson with mean
#
#     level · profile(hour, day) · trend(t) · weather(t) · incident(t) · exp(u_t)
#
# *profile*: on working days a morning and an evening peak over a broad day, at weekends one late,
# lower peak; each junction has its own share of the three, and its own hours. *trend*: linear, up
# to a third over the whole time, its own for each junction. *weather*: one region, one weather.
# Temperature is a season, a day and an autoregression; rain comes in spells of some hours with
# exponential strength; rain lowers the count, by a junction's own share. *incident*: about one in
# five days, for two to six hours, a third to two thirds of the vehicles are lost and some of them
# come after it; at a junction with cameras its first lane empties an hour before the whole does.
# *u*: an autoregression (0.9 an hour), the town's part in common for all junctions, the rest a
# junction's own. Cameras count three lanes, whose shares move with the hour; sensors give the
# total, and the weather. The junctions differ in volume (900 to 25 vehicles an hour) and in how
# long they have counted (300 to 110 days).

DAYS = 300
BEGIN = 455_880  # Monday, 3 January 2022, in hours since 1970
PUBLIC = "public"
# name: vehicles an hour, first day, share of the peaks, shift of the peaks in hours, trend, rain, cameras
JUNCTIONS: dict[str, tuple[float, int, float, float, float, float, bool]] = {
    "camera_1": (900.0, 0, 0.75, 0.0, 0.30, 0.10, True),
    "camera_2": (400.0, 120, 0.65, 0.5, 0.15, 0.15, True),
    "sensor_1": (60.0, 0, 0.50, -0.5, 0.25, 0.25, False),
    "sensor_2": (25.0, 190, 0.60, 0.0, 0.10, 0.20, False),
    PUBLIC: (200.0, 0, 0.60, 0.0, 0.20, 0.15, False),
}
LANES = 3
WEATHER = 2


@register_source("traffic", keys=("path", "label", "group", "series"), generates=True)
def traffic(config: SourceConfig, root: Path) -> Dataset:
    """Generated junctions; or with `path` the rows of a `.csv`, `.tsv` or `.parquet` file: `series.time` names the column of
    dates, `label` that of the vehicles (`Vehicles`), `group` that of the junctions (`Junction`, if there is one)."""
    series = config.series or SeriesConfig()
    if config.path is not None:
        return read_traffic(Path(config.path).expanduser(), series, config.label, config.group)
    for name in ("label", "group"):
        if getattr(config, name) is not None:
            raise UserError(f"{name}: names a column of a file, but there is no path")
    wanted = series.sites or tuple(name for name in JUNCTIONS if name != PUBLIC)
    check_names(wanted, JUNCTIONS, "series.sites: found")
    sites = [site for site in make_junctions() if site.name in wanted]
    return make_windows(
        sites, series, name="traffic", unit="vehicles", simulated=True, about="generated junctions, hour by hour",
        lanes=tuple(f"lane_{i + 1}" for i in range(LANES)), weather=("temperature", "rain"),
    )  # fmt: skip


def read_traffic(path: Path, series: SeriesConfig, label: str | None, group: str | None) -> Dataset:
    """The windows of a file; see `hetero_fl.data.sources.recordings.read_sites`."""
    # pandas takes half a second to load: only where it is used
    from hetero_fl.data.sources.recordings import read_sites
    from hetero_fl.data.sources.table_files import read_frame

    frame = read_frame(path, (group or "Junction",))
    group = group or ("Junction" if "Junction" in frame.columns else None)
    sites = read_sites(frame, path, series, label or "Vehicles", group)
    try:
        made = make_windows(
            sites, series, name="traffic", unit=(label or "Vehicles").lower(), about=f"{path.name}, hour by hour",
            lanes=series.lanes, weather=series.weather,
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"path: {path}: {error}") from None
    return made


def make_junctions() -> list[HourlySeries]:
    """The junctions of the module's text, the public one last."""
    hours = DAYS * 24
    town = keyed_numpy_generator("data", "traffic", 0, "town")
    weather = _weather(town, hours)
    common = _drift(town, hours, 0.05)
    made = []
    for name, (level, day, peaks, shift, trend, rain, cameras) in JUNCTIONS.items():
        draws = keyed_numpy_generator("data", "traffic", 0, name)
        begin = day * 24
        hour = np.arange(hours)
        mean = level * _profile(hour, peaks, shift) * (1 + trend * hour / hours)
        mean *= 1 - rain * np.tanh(weather[:, 1] / 2)
        incident, early = _incidents(draws, hours)
        mean *= incident * np.exp(common + _drift(draws, hours, 0.06))
        lanes = np.full((hours, LANES), np.nan)
        if cameras:
            share = np.stack([0.4 + 0.05 * np.sin(2 * np.pi * hour / 24), np.full(hours, 0.35)], 1)
            share = np.concatenate([share, 1 - share.sum(1, keepdims=True)], 1)
            share[:, 0] *= early
            share /= share.sum(1, keepdims=True)
            lanes = draws.poisson(mean[:, None] * share).astype(np.float64)
            value = lanes.sum(1)
        else:
            value = draws.poisson(mean).astype(np.float64)
        seen = np.full((hours, WEATHER), np.nan) if cameras else weather
        made.append(HourlySeries(name, BEGIN + begin, value[begin:], lanes[begin:], seen[begin:]))
    return made


def _profile(hour: np.ndarray, peaks: float, shift: float) -> np.ndarray:
    """Mean about 1 over a week."""
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


def _drift(draws: np.random.Generator, hours: int, size: float) -> np.ndarray:
    """An autoregression of standard deviation `size`."""
    steps = draws.normal(0, size * (1 - 0.9**2) ** 0.5, hours)
    found = np.empty(hours)
    last = 0.0
    for t, step in enumerate(steps):
        last = found[t] = 0.9 * last + step
    return found


def _weather(draws: np.random.Generator, hours: int) -> np.ndarray:
    """Temperature in °C and rain in mm an hour, `[hours, 2]`."""
    hour = np.arange(hours)
    warm = 10 - 9 * np.cos(2 * np.pi * hour / (365 * 24)) - 4 * np.cos(2 * np.pi * (hour - 3) / 24)
    rain = np.zeros(hours)
    for begin in np.flatnonzero(draws.random(hours) < 1 / 40):
        rain[begin : begin + draws.integers(2, 10)] = draws.exponential(1.5)
    return np.stack([warm + _drift(draws, hours, 3.0), rain], 1)


def _incidents(draws: np.random.Generator, hours: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors on the count, and on the first lane, which empties an hour before, `[hours]` each."""
    whole = np.ones(hours)
    lane = np.ones(hours)
    for begin in np.flatnonzero(draws.random(hours) < 1 / 120):
        end = begin + draws.integers(2, 7)
        lost = draws.uniform(1 / 3, 2 / 3)
        whole[begin:end] = 1 - lost
        whole[end : end + 2] *= 1 + lost / 3
        lane[max(0, begin - 1) : end] = 0.3
    return whole, lane
