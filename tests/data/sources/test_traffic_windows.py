"""Windows of hourly series: layout, and no leak of the future into training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hetero_fl.config.data import SeriesConfig
from hetero_fl.data import Dataset
from hetero_fl.data.sources.traffic import HOUR, HourlySeries, Periods, make_windows
from tests.support.cases import each_case

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
    data, periods = make_dataset([one]), Periods.from_series([one], CONFIG)
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


def test_training_rows_do_not_depend_on_the_test_period(subtests: pytest.Subtests) -> None:
    for window, horizons in ((1, (168,)), (6, (24, 48)), (24, (1,))):
        for level in ("training", "week"):
            with subtests.test(window=window, level=level):
                config = CONFIG.model_copy(
                    update={"window": window, "horizons": horizons, "level": level}
                )
                one, later = site(), site()
                start = Periods.from_series([one], config).validation + 1 - one.start
                later.value[start:], later.lanes[start:], later.weather[start:] = 999.0, 9.0, 99.0
                parts = [make_dataset([given], config).splits() for given in (one, later)]
                for name in ("train", "validation"):
                    before, after = (part[name] for part in parts)
                    assert (
                        len(before)
                        and torch.equal(before.x, after.x)
                        and torch.equal(before.y, after.y)
                    )
                    assert torch.equal(before.unit, after.unit)


def test_training_targets_precede_later_periods() -> None:
    data, periods = (
        make_dataset([site(), site("b", 700, 300, 1)]),
        Periods.from_series([site()], CONFIG),
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


def changed(one: HourlySeries, periods: Periods) -> HourlySeries:
    """Return series with the same past and another future."""
    cut = periods.train + 1 - one.start
    value, lanes, weather = one.value.copy(), one.lanes.copy(), one.weather.copy()
    for column in (value, lanes, weather):
        column[cut:] = column[cut:] * 3 + 7
    return replace(one, value=value, lanes=lanes, weather=weather)


def leaks(config: SeriesConfig) -> bool:
    """Return whether another future changes a training row."""
    sites = [site(), site("b", 700, 300, 1)]
    periods = Periods.from_series(sites, config)
    before, after = (
        make_dataset(sites, config).train,
        make_dataset([changed(s, periods) for s in sites], config).train,
    )
    pairs = [
        (before.x, after.x),
        (before.y, after.y),
        (before.time, after.time),
        (before.unit, after.unit),
    ]
    pairs += [(before.baselines[name], after.baselines[name]) for name in before.baselines]
    return any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs)


def foresees(config: SeriesConfig) -> bool:
    """Return whether inputs or baselines of a row depend on later hours."""
    one = site()
    # in the validation period, level and scales are fixed
    cut = Periods.from_series([one], config).train + 30 - START
    other = replace(one, value=np.where(np.arange(1000) < cut, one.value, 3 * one.value + 7))
    parts = zip(
        make_dataset([one], config).splits().values(),
        make_dataset([other], config).splits().values(),
        strict=True,
    )
    for before, after in parts:
        assert before.time is not None and after.time is not None
        known = before.time // HOUR - START - config.horizons[-1] < cut
        pairs = [
            (before.x, after.x),
            *((before.baselines[n], after.baselines[n]) for n in before.baselines),
        ]
        pairs += (
            [(before.unit, after.unit)]
            if before.unit is not None and after.unit is not None
            else []
        )
        if any(not torch.equal(a[known], b[known]) for a, b in pairs):
            return True
    return False


EVERY: list[dict[str, str]] = [
    {},
    {"level": "week"},
    {"target": "busy"},
    {"target": "busy", "level": "week"},
]


@each_case("settings", EVERY)
def test_training_rows_do_not_depend_on_the_future(settings: Any) -> None:
    config = CONFIG.model_copy(update=settings)
    assert not leaks(config) and not foresees(config)


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
    assert now == {n for n in needed if n + 4 <= Periods.from_series([one], CONFIG).train - START}
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
    data, periods = make_dataset([one], config), Periods.from_series([one], config)
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
