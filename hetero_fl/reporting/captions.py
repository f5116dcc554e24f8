"""Titles and captions of the pictures in a run's report."""

from __future__ import annotations

from typing import Any

from hetero_fl.reporting.client_plots import FEW
from hetero_fl.reporting.score_plots import PANELS
from hetero_fl.reporting.time_plots import ROUNDS, SHOWN
from hetero_fl.reporting.wording import (
    FEW_ROWS,
    READINGS,
    is_regression,
    last_scores,
    metric_name,
    selection,
    sentence,
    target,
)

Json = dict[str, Any]


def captions(summary: Json, details: Json) -> dict[str, tuple[str, str]]:
    """Title and caption of each picture."""
    regression = is_regression(last_scores(summary))
    many = len(summary["clients"])
    where = READINGS["global" if summary["global"] else "personal"]
    chosen = (
        f"All {many} clients together, then the {PANELS - 1} that are weakest on the {where}. " if many > PANELS else ""
    )
    matrices = "All clients together, label by label. " if target(summary, details) == "multilabel" else chosen
    empty = ", and is empty where no test row is of that class"
    several = summary["personal"] and many <= 6 and target(summary, details) != "multilabel"
    headed = " n: local test rows of the client." if several else ""
    against = metric_name(selection(summary, details))
    hollow = f" n: local test rows; hollow: fewer than {FEW_ROWS}." if summary["personal"] else ""
    if many > FEW:
        points = (
            "A point is a client, coloured by its model; on the dashed line it does equally well on both tests."
            + hollow
        )
    else:
        points = (
            "The two readings of each client's model after the last round. The line between them is the gap." + hollow
        )
    held = ("Who holds which labels", "The rows that each client trains on, by label.")
    private = bool(summary.get("privacy"))
    if regression or not details["label_counts"]:
        left_out = " Label counts are left out: this run protects them." if private else ""
        held = ("Who holds how much", f"The rows of each client, by use.{left_out}")
    if private:
        empty += ". Local test splits are left out: their matrices would add up to label counts"
    return {
        "curves": (
            "Learning curves",
            "Mean over clients by round. Left: the metric by which rounds are selected. The band is one standard "
            "deviation over clients, so it shows how far they are apart, not how certain the mean is. A "
            "metric that is undefined for every client has no curve.",
        ),
        "clients": ("Every client, local and global test", points),
        "labels": held,
        "communication": (
            f"Bytes against {against}",
            "Bytes are those of the encoded messages of all clients, summed from the first round.",
        ),
        "time": (
            f"{sentence(against)} against simulated time",
            "Left: by the simulated time at which each round ended. Right: what came of each round's invitations. Late is "
            "who was not there when the round was closed.",
        ),
        "tasks": (
            "Who was at it when",
            f"The tasks of the first {ROUNDS} rounds, from invitation to arrival or failure; of many clients, the {SHOWN} most "
            "often invited.",
        ),
        "staleness": (
            "How stale uploads were",
            "Versions that the server made between giving out a task and taking its upload: the more, the less it counted.",
        ),
        "privacy": (
            "Privacy spent",
            "The largest ε of any client by round: what whoever sees all that left may have learnt of one record or client.",
        ),
        "forecasts": (
            "Truth and forecast",
            "The last rows of each client's own test split in time; the output that is named. The dashed line is the simple rule "
            "that is nearest there.",
        ),
        "confusion": (
            "Which class is taken for which",
            f"{matrices}After the last round. Classes are in the task's order, one colour scale for all; "
            f"a row adds up to 100%{empty}.{headed}",
        ),
        "calibration": (
            "Confidence against accuracy",
            f"{chosen}Below the dashed line a model is surer than it may be, above it less sure. ECE: expected "
            "calibration error, the mean distance to the line. The larger a point, the more predictions it stands for.",
        ),
    }
