"""All pictures of a run, drawn from its files into its `plots/`."""

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


def draw_plots(run: RunDirectory, say: Callable[[str], None] | None = None) -> dict[str, bytes]:
    """A finished run's pictures as PNG, by name, in the order of the report.

    Left out: `communication` where nothing was exchanged, `time` and `tasks` where no time was simulated, `staleness` where
    rounds wait for their cohorts, `privacy` where nothing was protected, `forecasts` where rows have no dates, `confusion` and
    `calibration` where targets are no classes.

    Args:
        run: The finished run.
        say: Where a picture that cannot be drawn is reported in one line, and left out; None raises what went wrong.

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
        lambda: rounds.plot_tasks(summary, records, details),
        lambda: rounds.plot_staleness(summary, records, details),
        lambda: rounds.plot_privacy(summary, records),
        lambda: scores.plot_forecasts(summary, details),
        lambda: scores.plot_confusion(summary, details),
        lambda: scores.plot_calibration(summary, details),
    )
    pictures: dict[str, bytes] = {}
    with style.plot_style():
        for name, make in zip(NAMES, figures, strict=True):
            with report_errors(f"the picture {name!r} cannot be drawn", say):
                if (made := make()) is not None:
                    pictures[name] = style.to_png(made)
    return pictures


@contextmanager
def report_errors(subject: str, say: Callable[[str], None] | None) -> Iterator[None]:
    """Report an error in one line that begins with `subject`, and go on; without `say` it is raised."""
    try:
        yield
    except Exception as error:
        if say is None:
            raise
        say(one_line(f"{subject}: {type(error).__name__}: {error}"))


def write_plots(
    run_dir: str | os.PathLike[str], say: Callable[[str], None] | None = None
) -> list[Path]:
    """Draw a finished run's pictures into its `plots/`, and return their paths.

    `say`: see `draw`. Raises UserError if the folder is no finished run.
    """
    run = RunDirectory.open(run_dir)
    pictures = draw_plots(run, say)
    run.plots.mkdir(exist_ok=True)
    paths = {name: run.plots / f"{name}.png" for name in pictures}
    for name, content in pictures.items():
        paths[name].write_bytes(content)
    return list(paths.values())
