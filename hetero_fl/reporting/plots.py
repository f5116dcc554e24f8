"""All pictures of a run, drawn from its files into its `plots/`."""

from __future__ import annotations

import os
from pathlib import Path

from hetero_fl.reporting import client_plots, forecast_plots, privacy_plots, round_plots, score_plots, style, time_plots
from hetero_fl.reporting.rundir import RunDirectory

NAMES = (
    "curves",
    "clients",
    "labels",
    "communication",
    "time",
    "tasks",
    "staleness",
    "privacy",
    "forecasts",
    "confusion",
    "calibration",
)


def draw(run: RunDirectory) -> dict[str, bytes]:
    """A finished run's pictures as PNG, by name, in the order of the report.

    Left out: `communication` where nothing was exchanged, `time` and `tasks` where no time was simulated, `staleness` where
    rounds wait for their cohorts, `privacy` where nothing was protected, `forecasts` where rows have no dates, `confusion` and
    `calibration` where targets are no classes.
    Raises UserError if a file of the run is missing.
    """
    summary, records, details = run.summary(), run.metrics(), run.details()
    with style.drawing():
        figures = (
            round_plots.curves(summary, records, details),
            client_plots.clients(summary, details),
            client_plots.labels(summary, details),
            round_plots.communication(summary, records, details),
            time_plots.time(summary, records, details),
            time_plots.tasks(summary, records, details),
            time_plots.staleness(summary, records, details),
            privacy_plots.privacy(summary, records),
            forecast_plots.forecasts(summary, details),
            score_plots.confusion(summary, details),
            score_plots.calibration(summary, details),
        )
        return {name: style.png(made) for name, made in zip(NAMES, figures, strict=True) if made is not None}


def write_plots(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Draw a finished run's pictures into its `plots/`, and return their paths.

    Raises UserError if the folder is no finished run.
    """
    run = RunDirectory.open(run_dir)
    pictures = draw(run)
    run.plots.mkdir(exist_ok=True)
    paths = {name: run.plots / f"{name}.png" for name in pictures}
    for name, content in pictures.items():
        paths[name].write_bytes(content)
    return list(paths.values())
