"""Log the rounds of a run to MLflow (`pip install mlflow`).

python examples/mlflow_logger.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def mlflow_logger(**settings: Any) -> Callable[[Mapping[str, Any]], None]:
    """A callback for `hetero_fl.run`; `settings` are those of `mlflow.start_run` (run_name, experiment_id …)."""
    import mlflow

    mlflow.start_run(**settings)

    def log(record: Mapping[str, Any]) -> None:
        mlflow.log_metrics(figures(record), step=record["round"])

    return log


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """A round's means over clients by name (`global/accuracy`), its bytes, and the clients' mean training loss."""
    found = {
        f"{reading}/{metric}": value
        # at home, in common, the server's own model
        for reading in ("personal", "global", "server")
        for metric, value in (record.get(reading) or {}).items()
        if value is not None  # None: the metric is not defined (a class is missing)
    }
    losses = list(record["train_loss"].values())
    if losses:
        found["train_loss"] = sum(losses) / len(losses)
    return found | {"up_bytes": record["up_bytes"], "down_bytes": record["down_bytes"]}


if __name__ == "__main__":
    import mlflow

    import hetero_fl

    run = hetero_fl.run(
        "configs/digits_quickstart.yaml", callbacks=[mlflow_logger(run_name="digits")], quiet=False
    )
    mlflow.log_artifact(str(run.path / "report.html"))
    mlflow.end_run()
