"""Draw the plots of a finished run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure

from hetero_fl.reporting.plots import clients, rounds, scores, style
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import one_line

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


def draw_plots(run: RunDirectory, log: Callable[[str], None] | None = None) -> dict[str, bytes]:
    """Draw the plots of a finished run.

    Plots that do not apply to the run are omitted: `communication` without exchanged bytes, `time`
    and `tasks` without simulated time, `staleness` for synchronous runs, `privacy` without privacy,
    `forecasts` without timestamps, `confusion` and `calibration` without classes.

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
    figures: tuple[Callable[[], Figure | None], ...] = (
        lambda: rounds.plot_curves(summary, records, details),
        lambda: clients.plot_client_scores(summary, details),
        lambda: clients.plot_labels(summary, details),
        lambda: rounds.plot_communication(summary, records, details),
        lambda: rounds.plot_time(summary, records, details),
        lambda: rounds.plot_tasks(records),
        lambda: rounds.plot_staleness(records),
        lambda: rounds.plot_privacy(summary, records),
        lambda: scores.plot_forecasts(summary, details),
        lambda: scores.plot_confusion(summary, details),
        lambda: scores.plot_calibration(summary, details),
    )
    pictures: dict[str, bytes] = {}
    with style.plot_style():
        for name, draw in zip(NAMES, figures, strict=True):
            with report_errors(f"the plot {name!r} cannot be drawn", log):
                if (figure := draw()) is not None:
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
