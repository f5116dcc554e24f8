"""The metrics of a run as a data frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hetero_fl.reporting.formatting import is_metric
from hetero_fl.utils.extras import check_extra

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("round", "client", "test", "metric", "value")
TESTS = ("global", "personal")


def history_frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a data frame with one row for each round, client and metric.

    Args:
        records: The records of the rounds, as in `metrics.jsonl`.

    Returns:
        A data frame with the columns `round`, `client`, `test`, `metric` and `value`. The client is
        "server" for the server's model and "mean" for the mean over the clients. The training loss
        of a client has the test "train" and the metric "loss".
    """
    check_extra("tables", ["pandas"], "Run.history")
    # Imported here because loading pandas is slow.
    import pandas as pd

    return pd.DataFrame(_rows(records), columns=list(COLUMNS))


def _rows(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for record in records:
        number = record["round"]
        for client, loss in record.get("train_loss", {}).items():
            yield number, client, "train", "loss", loss
        clients = record.get("clients") or {}
        for client, scores in clients.items():
            for test in TESTS:
                for metric, value in (scores.get(test) or {}).items():
                    yield number, client, test, metric, value
        for test in TESTS:
            for metric, value in (record.get(test) or {}).items():
                if is_metric(metric):
                    yield number, "mean", test, metric, value
        for metric, value in (record.get("server") or {}).items():
            yield number, "server", "global", metric, value
