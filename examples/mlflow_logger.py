"""Log the rounds of a run to MLflow (`pip install mlflow`).

Run this example from the root of a checkout:

    python examples/mlflow_logger.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def mlflow_logger(**settings: Any) -> Callable[[Mapping[str, Any]], None]:
    """Return a callback for `hetero_fl.run` that logs each round to MLflow.

    Args:
        **settings: Arguments of `mlflow.start_run`.
    """
    import mlflow

    mlflow.start_run(**settings)

    def log(record: Mapping[str, Any]) -> None:
        mlflow.log_metrics(round_metrics(record), step=record["round"])

    return log


def round_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a round: means over clients, the mean training loss and the bytes.

    Args:
        record: Record of the round that `hetero_fl.run` passes to callbacks.
    """
    # `personal` is the local test, `global` is the global test, and `server` is the server's model.
    # A metric is None if it is not defined, for example because a class is missing.
    metrics = {
        f"{evaluation}/{metric}": value
        for evaluation in ("personal", "global", "server")
        for metric, value in (record.get(evaluation) or {}).items()
        if value is not None
    }
    losses = list(record["train_loss"].values())
    if losses:
        metrics["train_loss"] = sum(losses) / len(losses)
    return metrics | {"up_bytes": record["up_bytes"], "down_bytes": record["down_bytes"]}


if __name__ == "__main__":
    import mlflow

    import hetero_fl

    run = hetero_fl.run(
        "configs/digits_quickstart.yaml", callbacks=[mlflow_logger(run_name="digits")], quiet=False
    )
    mlflow.log_artifact(str(run.path / "report.html"))
    mlflow.end_run()
