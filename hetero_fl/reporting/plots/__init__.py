"""Draw the plots of a finished run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hetero_fl.reporting.plots import clients, rounds, style
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import one_line

Json = dict[str, Any]

PLOTS: dict[str, Callable[[Json, Sequence[Json], Json], Figure | None]] = {
    "curves": partial(rounds.plot_curves, x="round"),
    "clients": lambda summary, _, details: clients.plot_client_scores(summary, details),
    "labels": lambda summary, _, details: clients.plot_labels(summary, details),
    "communication": partial(rounds.plot_curves, x="bytes"),
    "time": partial(rounds.plot_curves, x="time"),
    "outcomes": lambda _summary, records, _details: rounds.plot_outcomes(records),
    "privacy": lambda summary, records, _: rounds.plot_privacy(summary, records),
    "forecasts": lambda summary, _, details: clients.plot_forecasts(summary, details),
    "confusion": lambda summary, _, details: clients.plot_confusion(summary, details),
    "calibration": lambda summary, _, details: clients.plot_calibration(summary, details),
}
"""Functions of the summary, the records and the details of a run, in the order of the report.

A function returns None if the plot does not apply to the run.
"""


def draw_plots(run: RunDirectory, log: Callable[[str], None] | None = None) -> dict[str, bytes]:
    """Draw the plots of a finished run.

    Plots that do not apply to the run are omitted: `communication` without exchanged bytes, `time`
    and `outcomes` without simulated time, `privacy` without privacy, `forecasts` without
    timestamps, `confusion` and `calibration` without classes.

    Args:
        run: The finished run.
        log: Function that is called with a line for each plot that cannot be drawn. If None, the
            error is raised.

    Returns:
        The contents of the PNG files, keyed by the name of the plot, in the order of the report.

    Raises:
        UserError: If a file of the run is missing.
    """
    summary = run.summary()
    records = run.metrics()
    details = run.details()
    pictures: dict[str, bytes] = {}
    with style.plot_style():
        for name, draw in PLOTS.items():
            with report_errors(f"the plot {name!r} cannot be drawn", log):
                if (figure := draw(summary, records, details)) is not None:
                    pictures[name] = style.to_png(figure)
    return pictures


@contextmanager
def report_errors(subject: str, log: Callable[[str], None] | None) -> Iterator[None]:
    """Log an exception in the context as one line that begins with `subject`, and suppress it.

    If `log` is None, the exception is raised.
    """
    try:
        yield
    except Exception as error:
        if log is None:
            raise
        log(one_line(f"{subject}: {type(error).__name__}: {error}"))


def write_plots(
    run_dir: str | os.PathLike[str], log: Callable[[str], None] | None = None
) -> list[Path]:
    """Draw the plots of a finished run and save them in the folder `plots/`.

    Args:
        run_dir: The run directory.
        log: Function that is called with a line for each plot that cannot be drawn. If None, the
            error is raised.

    Returns:
        Paths of the PNG files.

    Raises:
        UserError: If the folder does not contain a finished run.
    """
    run = RunDirectory.open(run_dir)
    pictures = draw_plots(run, log)
    run.plots.mkdir(exist_ok=True)
    paths = {name: run.plots / f"{name}.png" for name in pictures}
    for name, content in pictures.items():
        paths[name].write_bytes(content)
    return list(paths.values())
