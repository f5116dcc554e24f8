"""Logger for MLflow."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock
from pydantic import Field, PrivateAttr
from typing_extensions import override

from hetero_fl.reporting.loggers.base import LoggedRun, Logger, register_logger, round_scalars

# Maximum length of a parameter in all stores of MLflow.
MAX_PARAMETER_CHARACTERS = 500
# Maximum number of parameters in a request.
MAX_BATCH = 100


@register_logger("mlflow")
class MLflowLogger(Logger):
    """Log to MLflow: parameters from the configuration, a metric per number, and the report.

    A resumed run continues the same run at MLflow. An interrupted run has the status `KILLED`.
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

    _client: Any = PrivateAttr(None)
    _run_id: str = PrivateAttr("")
    _path: Path = PrivateAttr()
    _has_finished: bool = PrivateAttr(False)

    @override
    def start(self, run: LoggedRun) -> None:
        from mlflow import MlflowClient

        self._path = run.path
        # The first access creates the tables of a database, which fails in two processes at once.
        with FileLock(_lock_file()):
            self._client = MlflowClient(self.tracking_uri)
            self._open_run(run)

    def _open_run(self, run: LoggedRun) -> None:
        """Create a run at MLflow, or continue the run that was created before an interruption."""
        if "run_id" in run.state:
            self._run_id = run.state["run_id"]
            self._client.update_run(self._run_id, status="RUNNING")
            return
        created = self._client.create_run(
            _experiment_id(self._client, self.experiment or run.name),
            run_name=self.run_name or run.label,
            tags={**self.tags, "hetero_fl.run": run.run_id},
        )
        self._run_id = created.info.run_id
        run.state["run_id"] = self._run_id
        self._log_parameters(run.config)

    def _log_parameters(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        parameters = [
            Param(key, value[:MAX_PARAMETER_CHARACTERS]) for key, value in _leaves(config, "")
        ]
        for start in range(0, len(parameters), MAX_BATCH):
            batch = parameters[start : start + MAX_BATCH]
            self._client.log_batch(self._run_id, params=batch)

    @override
    def log(self, record: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(name, float(value), now, record["round"])
            for name, value in round_scalars(record).items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    @override
    def finish(self, summary: Mapping[str, Any]) -> None:
        for name in ("config.yaml", "summary.json", "report.html"):
            if (self._path / name).exists():
                self._client.log_artifact(self._run_id, str(self._path / name))
        self._has_finished = True

    @override
    def close(self) -> None:
        if self._run_id:
            status = "FINISHED" if self._has_finished else "KILLED"
            self._client.set_terminated(self._run_id, status)


def _lock_file() -> Path:
    """Return the file with which processes of one user wait for each other."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"hetero_fl-mlflow-{user}.lock"


def _experiment_id(client: Any, name: str) -> str:
    """Return the id of an experiment, which is created if necessary."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            # Another process, such as another run of a comparison, has created the experiment.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the key path and the text of each setting that is not null."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}".lstrip("."))
    elif value is not None and value != []:
        yield path, value if isinstance(value, str) else json.dumps(value)
