"""The source `traffic`: files, errors in files and windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hetero_fl.config.data import SeriesConfig
from hetero_fl.data import Dataset, Examples
from hetero_fl.data.sources.traffic import (
    HOUR,
    HourlySeries,
    divide_time,
    make_windows,
)
from tests.support.cases import each_case
from tests.support.federated_data import read_source
from tests.support.mistakes import check_refused, refusal

LEAN = {"window": 6, "horizons": (1, 3)}


def load(
    path: Path | None = None, label: str | None = None, group: str | None = None, **series: object
) -> Dataset:
    return read_source("traffic", path, label=label, group=group, series={**LEAN, **series})


def table(hours: int = 400, sites: tuple[str, ...] = ("1", "2")) -> pd.DataFrame:
    frames = []
    for place, name in enumerate(sites):
        dates = pd.Timestamp("2023-01-01") + pd.to_timedelta(np.arange(hours), unit="h")
        count = 20 + 10 * place + np.arange(hours) % 24
        frames.append(
            pd.DataFrame(
                {"DateTime": dates.strftime("%Y-%m-%d %H:%M"), "Junction": name, "Vehicles": count}
            )
        )
    return pd.concat(frames, ignore_index=True)


def written(frame: pd.DataFrame, tmp_path: Path, name: str = "t.csv") -> Path:
    path = tmp_path / name
    frame.to_csv(path, index=False, sep="\t" if name.endswith(".tsv") else ",")
    return path


@each_case(
    ("form", "configured"),
    (
        ("%Y-%m-%d %H:%M", False),
        ("%Y-%m-%dT%H:%M:%S", False),
        ("%Y-%m-%dT%H:%M:%SZ", False),
        ("%d/%m/%Y %H:%M", True),
        ("%m/%d/%Y %H:%M", True),
    ),
)
def test_dates_are_iso_or_in_the_configured_format(
    form: str, configured: bool, tmp_path: Path
) -> None:
    frame, plain = table(), table()
    frame["DateTime"] = pd.to_datetime(frame["DateTime"]).dt.strftime(form)
    a = load(written(frame, tmp_path), format=form if configured else None)
    b = load(written(plain, tmp_path, "p.csv"))
    assert a.train.time is not None and b.train.time is not None
    assert torch.equal(a.train.time, b.train.time)


def with_cell(row: int, column: str, value: object) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.astype({"Vehicles": object})
        frame.loc[row, column] = value
        return frame

    return change


# Rows from 401 belong to junction 2.
MISTAKES: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "column": (
        lambda frame: frame.rename(columns={"Vehicles": "Cars"}),
        "data.label: column 'Vehicles' not found in PATH",
    ),
    "text in a number": (
        with_cell(7, "Vehicles", "many"),
        "data.path: PATH: row 8, column 'Vehicles': expected a number, got 'many'",
    ),
    "empty": (
        with_cell(7, "Vehicles", None),
        "data.path: PATH: row 8, column 'Vehicles': missing value",
    ),
    "no date": (
        with_cell(450, "DateTime", "yesterday"),
        "data.path: PATH: row 451, column 'DateTime': expected a date as YYYY-MM-DD hh:mm, got "
        "'yesterday'",
    ),
    "other date format": (
        lambda frame: frame[:2].assign(DateTime=["03/04/2023 10:00", "03/04/2023 11:00"]),
        "row 1, column 'DateTime': expected a date as YYYY-MM-DD hh:mm, got '03/04/2023 10:00'; "
        "set series.format for another format",
    ),
    "order": (
        lambda frame: frame.iloc[[*range(410), 411, 410, *range(412, 800)]],
        "data.path: PATH: row 412, column 'DateTime': expected the hour after 2023-01-01 11 h of "
        "site '2', got 2023-01-01 10 h; sort the rows",
    ),
    "twice": (
        lambda frame: frame.iloc[[*range(6), *range(5, 800)]],
        "data.path: PATH: row 7, column 'DateTime': expected the hour after 2023-01-01 05 h of "
        "site '1', got 2023-01-01 05 h; sort the rows and remove duplicates",
    ),
    "gap": (
        lambda frame: frame.drop(index=range(20, 23)),
        "data.path: PATH: row 21, column 'DateTime': expected the hour after 2023-01-01 19 h of "
        "site '1', got 2023-01-01 23 h; add the missing hours, or for a table set series.gaps=skip",
    ),
    "minutes": (
        with_cell(9, "DateTime", "2023-01-01 09:20"),
        "data.path: PATH: row 10, column 'DateTime': dates must be whole hours apart, got "
        "'2023-01-01 09:20' and",
    ),
}


def test_error_names_file_row_and_column(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for what, (change, line) in MISTAKES.items():
        path = written(change(table()), tmp_path)
        with subtests.test(what=what):
            assert line.replace("PATH", str(path)) in refusal(load, path)


def test_gaps_may_be_skipped(tmp_path: Path) -> None:
    full = load(written(table(), tmp_path)).train
    for what in ("gap", "empty"):
        change, _ = MISTAKES[what]
        skipped = load(written(change(table()), tmp_path), gaps="skip").train
        assert 0 < len(skipped) < len(full)


def test_named_columns_must_exist(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for keys, message in (
        ({"weather": ("rian",)}, r"data\.series\.weather: column 'rian' not found in"),
        ({"sites": ("3",)}, r"data\.series\.sites: site '3' not found in .*; choose from 1, 2"),
        (
            {"group": "Juncton"},
            r"data\.group: column 'Juncton' not found in .*; did you mean 'Junction'",
        ),
    ):
        with subtests.test(message=message):
            check_refused(message, load, written(table(), tmp_path), **keys)


START = 455_880  # a Monday, 0 h
CONFIG = SeriesConfig(window=5, horizons=(1, 4), validation=0.1, test=0.2)


def site(name: str = "a", hours: int = 1000, begin: int = 0, seed: int = 0) -> HourlySeries:
    draws = np.random.default_rng(seed)
    value = 50 + 20 * np.sin(np.arange(hours) / 24) + draws.normal(0, 5, hours)
    return HourlySeries(
        name, START + begin, value, draws.random((hours, 1)), draws.normal(10, 3, (hours, 1))
    )


def make_dataset(sites: list[HourlySeries], config: SeriesConfig = CONFIG) -> Dataset:
    return make_windows(
        sites, config, name="series", unit="cars", lanes=("lane",), weather=("warmth",)
    )


def test_window_layout() -> None:
    one = site()
    data, periods = make_dataset([one]), divide_time([one], CONFIG)
    mean = one.value[: periods.train + 1 - START].mean()
    assert data.columns == (
        "cars",
        "week_before_1",
        "week_before_4",
        "hour_sin",
        "hour_cos",
        "week_sin",
        "week_cos",
        "warmth",
        "lane",
    )
    train = data.train
    assert train.y is not None and train.time is not None and train.unit is not None
    assert torch.allclose(train.unit, torch.tensor(mean).float())
    for row in (0, 17, len(train) - 1):
        now = int(train.time[row]) // HOUR - START - 4
        seen = np.arange(now - 4, now + 1)
        x = train.x[row].double().numpy()
        assert np.allclose(x[:, 0] * mean, one.value[seen], rtol=1e-5)
        assert np.allclose(x[:, 1] * mean, one.value[seen + 1 - 168], rtol=1e-5)
        assert np.allclose(x[:, 2] * mean, one.value[seen + 4 - 168], rtol=1e-5)
        assert np.allclose(
            x[:, 3:5],
            np.stack([np.sin(seen % 24 * np.pi / 12), np.cos(seen % 24 * np.pi / 12)], 1),
            atol=1e-5,
        )
        angle = seen % 168 * 2 * np.pi / 168
        assert np.allclose(x[:, 5:7], np.stack([np.sin(angle), np.cos(angle)], 1), atol=1e-5)
        assert np.allclose(x[:, 8] * mean, one.lanes[seen, 0], rtol=1e-5)
        assert np.allclose(train.y[row].double() * mean, one.value[[now + 1, now + 4]], rtol=1e-5)
        assert np.allclose(
            train.baselines["persistence"][row].double() * mean, one.value[now], rtol=1e-5
        )
        week = one.value[[now + 1 - 168, now + 4 - 168]]
        assert np.allclose(train.baselines["a week before"][row].double() * mean, week, rtol=1e-5)


def test_training_targets_precede_later_periods() -> None:
    data, periods = (
        make_dataset([site(), site("b", 700, 300, 1)]),
        divide_time([site()], CONFIG),
    )
    assert data.validation is not None and data.test is not None and data.span == 3 * HOUR
    last = {
        name: part.time // HOUR for name, part in data.splits().items() if part.time is not None
    }
    assert int(last["train"].max()) == periods.train
    assert (
        int(last["validation"].min()) - 3 > periods.train
        and int(last["validation"].max()) == periods.validation
    )
    assert int(last["test"].min()) - 3 > periods.validation
    assert int(last["test"].max()) == START + 999


def changed(one: HourlySeries, end: int) -> HourlySeries:
    """Return series that are the same until an hour and different after it."""
    cut = end + 1 - one.start
    value, lanes, weather = one.value.copy(), one.lanes.copy(), one.weather.copy()
    for column in (value, lanes, weather):
        column[cut:] = column[cut:] * 3 + 7
    return replace(one, value=value, lanes=lanes, weather=weather)


def columns_of(part: Examples) -> dict[str, torch.Tensor]:
    """Return the inputs, targets, times, units and baselines of rows, as far as there are any."""
    found = {"x": part.x, "y": part.y, "time": part.time, "unit": part.unit, **part.baselines}
    return {name: values for name, values in found.items() if values is not None}


EVERY: list[dict[str, Any]] = [
    {},
    {"level": "week"},
    {"target": "busy"},
    {"target": "busy", "level": "week"},
    {"window": 1, "horizons": (168,)},
    {"window": 6, "horizons": (24, 48), "level": "week"},
    {"window": 24, "horizons": (1,)},
]


@each_case("settings", EVERY)
def test_rows_do_not_depend_on_the_periods_after_theirs(settings: Any) -> None:
    config = CONFIG.model_copy(update=settings)
    sites = [site(), site("b", 700, 300, 1)]
    periods = divide_time(sites, config)
    plain = make_dataset(sites, config).splits()

    for name, end in (("train", periods.train), ("validation", periods.validation)):
        other = make_dataset([changed(each, end) for each in sites], config).splits()

        before, after = columns_of(plain[name]), columns_of(other[name])
        assert len(before["x"]) and before.keys() == after.keys()
        assert [column for column in before if not before[column].equal(after[column])] == []


@each_case("settings", EVERY)
def test_inputs_and_baselines_do_not_depend_on_later_hours(settings: Any) -> None:
    config = CONFIG.model_copy(update=settings)
    # In the validation period, level and scales are fixed.
    end = divide_time([site()], config).train + 29
    plain, other = (make_dataset([each], config) for each in (site(), changed(site(), end)))

    for name, part in plain.splits().items():
        before, after = columns_of(part), columns_of(other.splits()[name])
        known = before["time"] // HOUR - config.horizons[-1] <= end
        assert all(
            before[column][known].equal(after[column][known]) for column in before.keys() - {"y"}
        )


def test_sites_share_cut_dates_but_not_scaling() -> None:
    data = make_dataset([site(), site("b", 500, 500, 1)])
    train = data.train
    assert train.group is not None and train.unit is not None and train.group_names == ("a", "b")
    assert 0 < int((train.group == 1).sum()) < int((train.group == 0).sum())
    assert (
        len(train.unit[train.group == 0].unique())
        == len(train.unit[train.group == 1].unique())
        == 1
    )


def test_missing_hours_omit_dependent_rows() -> None:
    one, holed = site(), site()
    holed.value[300] = np.nan
    full, fewer = make_dataset([one]).train, make_dataset([holed]).train
    assert full.time is not None and fewer.time is not None
    missing_hours = set((full.time // HOUR).tolist()) - set((fewer.time // HOUR).tolist())
    now = {hour - START - 4 for hour in missing_hours}
    needed = {now for now in range(200, 700) if 300 in needs(now)}
    assert now == {n for n in needed if n + 4 <= divide_time([one], CONFIG).train - START}
    assert torch.isfinite(fewer.x[..., :3]).all()


def needs(now: int) -> set[int]:
    seen = set(range(now - 4, now + 1))
    return seen | {h + 1 - 168 for h in seen} | {h + 4 - 168 for h in seen} | {now + 1, now + 4}


def test_unmeasured_values_are_missing() -> None:
    one = site()
    blind = replace(one, lanes=np.full_like(one.lanes, np.nan))
    x = make_dataset([blind]).train.x
    assert x[..., -1].isnan().all() and torch.isfinite(x[..., :-1]).all()


def test_busy_hours_are_classified() -> None:
    one = site()
    config = CONFIG.model_copy(update={"target": "busy", "busy": 0.7})
    data, periods = make_dataset([one], config), divide_time([one], config)
    assert (
        data.task.kind == "multilabel"
        and data.task.names == ("1 h ahead", "4 h ahead")
        and data.train.unit is None
    )
    threshold = np.quantile(one.value[: periods.train + 1 - START], 0.7)
    assert data.train.y is not None and data.train.time is not None
    now = (data.train.time // HOUR - START - 4).numpy()
    assert np.array_equal(data.train.y[:, 1].numpy(), one.value[now + 4] > threshold)
    assert np.array_equal(
        data.train.baselines["persistence"][:, 0].numpy() > 0, one.value[now] > threshold
    )
    single = make_dataset([one], config.model_copy(update={"horizons": (4,)}))
    assert (single.task.kind, single.task.names) == ("multiclass", ("free", "busy"))
    assert single.train.y is not None and single.train.y.dtype == torch.int64
    assert single.train.baselines["persistence"].shape == (len(single.train), 2)
