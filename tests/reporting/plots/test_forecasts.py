"""Forecast plots: outputs, baselines, clients and missing values."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.dates import num2date

from hetero_fl.reporting.plots import style
from hetero_fl.reporting.plots.scores import FORECAST_PANELS, plot_forecasts
from tests.support.figures import drawn

BEGIN = 1_672_531_200  # 1 January 2023


def make_forecasts(
    clients: int = 2, begin: int = BEGIN, rules: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    time = (begin + 3600 * np.arange(48)).tolist()
    near, far = [float(i % 24) for i in range(48)], [float(i % 24) + 5 for i in range(48)]
    labels = {"close": [near, [v + 1 for v in near]], "wide": [near, far]} if rules else {}
    found = {
        "time": time,
        "truth": [far, near],
        "predicted": [far, [v + 2 for v in near]],
        "baselines": labels,
    }
    ids = [f"c{i}" for i in range(clients)]
    details = {"forecast": dict.fromkeys(ids, found), "labels": ["1 h", "6 h"], "unit": "cars"}
    return {"clients": [{"id": i} for i in ids]}, details


def test_forecast_shows_last_output_and_nearest_baseline() -> None:
    figure = drawn(plot_forecasts, *make_forecasts())
    axes = figure.axes[0]
    truth, forecast, rule = (line.get_ydata() for line in axes.lines)
    assert len(figure.axes) == 2
    assert np.allclose(forecast, np.asarray(truth) + 2) and np.allclose(rule, np.asarray(truth) + 1)
    assert axes.get_title("left") == "c0, 6 h: mean absolute error 2.00, “close” 1.00"
    start = num2date(axes.lines[0].get_xdata(orig=False)[0])
    assert start.strftime("%Y-%m-%d") == "2023-01-01"
    assert figure.get_supylabel() == "cars"


def test_forecast_without_dates_and_baselines() -> None:
    (first, *_) = drawn(plot_forecasts, *make_forecasts(begin=0, rules=False)).axes
    assert len(first.lines) == 2 and first.lines[0].get_xdata()[1] == 3600
    # Times beyond the calendar are numbers.
    style.to_png(drawn(plot_forecasts, *make_forecasts(begin=1_672_531_200_000_000_000)))


def test_forecast_of_many_and_no_clients() -> None:
    figure = drawn(plot_forecasts, *make_forecasts(clients=30))
    assert len(figure.axes) == FORECAST_PANELS
    summary, details = make_forecasts()
    assert plot_forecasts(summary, {**details, "forecast": {}}) is None
    assert plot_forecasts(summary, {"labels": ["load"]}) is None
