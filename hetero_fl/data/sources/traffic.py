"""Traffic by the hour: generated junctions, or a file of real ones.

*Generated.* Four junctions and a public one, an hour a row, 300 days from a Monday. The vehicles of a junction are Poisson with
mean

    level · profile(hour, day) · trend(t) · weather(t) · incident(t) · exp(u_t)

*profile*: on working days a morning and an evening peak over a broad day, at weekends one late, lower peak; each junction has
its own share of the three, and its own hours. *trend*: linear, up to a third over the whole time, its own for each junction.
*weather*: one region, one weather. Temperature is a season, a day and an autoregression; rain comes in spells of some hours
with exponential strength; rain lowers the count, by a junction's own share. *incident*: about one in five days, for two to
six hours, a third to two thirds of the vehicles are lost and some of them come after it; at a junction with cameras its first
lane empties an hour before the whole does. *u*: an autoregression (0.9 an hour), the town's part in common for all junctions,
the rest a junction's own. Cameras count three lanes, whose shares move with the hour; sensors give the total, and the
weather. The junctions differ in volume (900 to 25 vehicles an hour) and in how long they have counted (300 to 110 days).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hetero_fl.config.source import SeriesConfig, SourceConfig
from hetero_fl.data.base import Dataset
from hetero_fl.data.registry import source
from hetero_fl.data.windows import Site, make_windows
from hetero_fl.errors import UserError, nearest
from hetero_fl.seeding import key

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
LANES, WEATHER = 3, 2


@source("traffic", keys=("path", "label", "group", "series"), generates=True)
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
    for name in wanted:
        if name not in JUNCTIONS:
            raise UserError(f"series.sites: found '{name}'{nearest(name, JUNCTIONS)}")
    sites = [site for site in make_junctions() if site.name in wanted]
    return make_windows(
        sites, series, name="traffic", unit="vehicles", simulated=True, about="generated junctions, hour by hour",
        lanes=tuple(f"lane_{i + 1}" for i in range(LANES)), weather=("temperature", "rain"),
    )  # fmt: skip


def read_traffic(path: Path, series: SeriesConfig, label: str | None, group: str | None) -> Dataset:
    """The windows of a file; see `hetero_fl.data.sources.hourly.read_sites`."""
    from hetero_fl.data.sources.frames import read_frame  # pandas takes half a second to load: only where it is used
    from hetero_fl.data.sources.hourly import read_sites

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


def make_junctions(days: int = DAYS, seed: int = 0) -> list[Site]:
    """The junctions of the module's text, the public one last."""
    hours = days * 24
    town = np.random.default_rng(key("data", "traffic", seed, "town"))
    weather = _weather(town, hours)
    common = _drift(town, hours, 0.05)
    made = []
    for name, (level, day, peaks, shift, trend, rain, cameras) in JUNCTIONS.items():
        draws = np.random.default_rng(key("data", "traffic", seed, name))
        begin = min(day, max(0, days - 20)) * 24
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
        made.append(Site(name, BEGIN + begin, value[begin:], lanes[begin:], seen[begin:]))
    return made


def _profile(hour: np.ndarray, peaks: float, shift: float) -> np.ndarray:
    """Mean about 1 over a week."""
    clock, weekend = (hour % 24).astype(np.float64), hour // 24 % 7 >= 5

    def bump(middle: float, width: float) -> np.ndarray:
        away = np.minimum(abs(clock - middle), 24 - abs(clock - middle))
        return np.asarray(np.exp(-0.5 * (away / width) ** 2))

    working = peaks * (2.4 * bump(8 + shift, 1.4) + 2.6 * bump(17.5 + shift, 1.8)) + (1 - peaks) * 2.2 * bump(13, 4.5)
    free = 1.7 * bump(14.5, 4.0)
    return 0.15 + np.where(weekend, free, working)


def _drift(draws: np.random.Generator, hours: int, size: float) -> np.ndarray:
    """An autoregression of standard deviation `size`."""
    steps, found, last = draws.normal(0, size * (1 - 0.9**2) ** 0.5, hours), np.empty(hours), 0.0
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
    whole, lane = np.ones(hours), np.ones(hours)
    for begin in np.flatnonzero(draws.random(hours) < 1 / 120):
        end, lost = begin + draws.integers(2, 7), draws.uniform(1 / 3, 2 / 3)
        whole[begin:end] = 1 - lost
        whole[end : end + 2] *= 1 + lost / 3
        lane[max(0, begin - 1) : end] = 0.3
    return whole, lane
