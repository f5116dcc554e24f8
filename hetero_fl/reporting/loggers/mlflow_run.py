"""Logger for MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr
from typing_extensions import override

from hetero_fl.reporting.loggers.base import LoggedRun, Logger, register_logger, round_scalars

# Maximum length of a parameter in all stores of MLflow.
MAX_PARAMETER_CHARACTERS = 500


@register_logger("mlflow")
class MLflowLogger(Logger):
    """Log to MLflow: parameters from the configuration, a metric per number, and the report.

    A resumed run continues the same run at MLflow. An interrupted run has the status `KILLED`. The
    tracking server and the experiment become those of the program. If the program has an active
    run at MLflow, the new run is nested in it.
    """

    module: ClassVar[str] = "mlflow"

    tracking_uri: str | None = Field(
        None,
        description="address of the tracking server, or `sqlite:///FILE`; `null`: "
        "MLFLOW_TRACKING_URI if it is set, else the default of MLflow",
    )
    experiment: str | None = Field(
        None, description="name of the experiment; `null`: `name` of the configuration"
    )
    run_name: str | None = Field(
        None, description="displayed name of the run; `null`: name of the run directory"
    )
    tags: dict[str, str] = Field({}, description="tags of the run")

    _run_id: str = PrivateAttr("")
    _path: Path = PrivateAttr()
    _has_finished: bool = PrivateAttr(False)

    @override
    def start(self, run: LoggedRun) -> None:
        import mlflow

        self._path = run.path
        if self.tracking_uri is not None:
            mlflow.set_tracking_uri(self.tracking_uri)
        experiment = mlflow.set_experiment(self.experiment or run.name)
        # Nested, because the program may have another active run.
        active = mlflow.start_run(
            run_id=run.state.get("run_id"),
            experiment_id=experiment.experiment_id,
            run_name=self.run_name or run.label,
            tags={**self.tags, "hetero_fl.run": run.run_id},
            nested=True,
        )
        self._run_id = active.info.run_id
        if "run_id" not in run.state:
            run.state["run_id"] = self._run_id
            mlflow.log_params(dict(_leaves(run.config, "")))

    @override
    def log(self, record: Mapping[str, Any]) -> None:
        import mlflow

        mlflow.log_metrics(round_scalars(record), step=record["round"], run_id=self._run_id)

    @override
    def finish(self, summary: Mapping[str, Any]) -> None:
        import mlflow

        for name in ("config.yaml", "summary.json", "report.html"):
            if (self._path / name).exists():
                mlflow.log_artifact(str(self._path / name), run_id=self._run_id)
        self._has_finished = True

    @override
    def close(self) -> None:
        if self._run_id:
            import mlflow

            mlflow.end_run("FINISHED" if self._has_finished else "KILLED")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the key path and the text of each setting that is not null."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}".lstrip("."))
    elif value is not None and value != []:
        text = value if isinstance(value, str) else json.dumps(value)
        yield path, text[:MAX_PARAMETER_CHARACTERS]
