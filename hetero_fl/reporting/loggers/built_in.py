"""The loggers for CSV files, TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, PrivateAttr
from typing_extensions import override

from hetero_fl.reporting.loggers.base import (
    EVALUATIONS,
    LoggedRun,
    Logger,
    register_logger,
    round_scalars,
)
from hetero_fl.utils.serialization import write_atomically

# Maximum length of a parameter in all stores of MLflow.
MAX_PARAMETER_CHARACTERS = 500


@register_logger("csv")
class CSVLogger(Logger):
    """Write `metrics.csv` in the run directory, with one row per round and one column per number.

    Cells of rounds without evaluation are empty. The file is written again if a later round has
    further columns, and on resume.
    """

    rewrites: ClassVar[bool] = True

    _path: Path = PrivateAttr()
    _columns: list[str] = PrivateAttr()
    _rows: list[Mapping[str, Any]] = PrivateAttr()

    @override
    def start(self, run: LoggedRun) -> None:
        self._path = run.path / "metrics.csv"
        self._columns = []
        self._rows = []

    @override
    def log(self, record: Mapping[str, Any]) -> None:
        row = {"round": record["round"], **round_scalars(record)}
        columns = list(dict.fromkeys([*self._columns, *row]))
        if columns == self._columns:
            with open(self._path, "a", encoding="utf-8", newline="") as file:
                file.write(_to_csv([row], columns))
        else:
            header = {name: name for name in columns}
            write_atomically(self._path, _to_csv([header, *self._rows, row], columns).encode())
            self._columns = columns
        self._rows.append(row)


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


@register_logger("tensorboard")
class TensorBoardLogger(Logger):
    """Write event files to `tensorboard/` in the run directory.

    The step is the round. The resolved configuration is logged as text.
    """

    module: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "loggers"

    _writer: Any = PrivateAttr(None)

    @override
    def start(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides events of this and later steps that were written before an interruption.
        purged = run.first_round if run.first_round > 1 else None
        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=purged)
        if purged is None:
            text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
            self._writer.add_text("config", f"```yaml\n{text}```", 0)

    @override
    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in round_scalars(record).items():
            self._writer.add_scalar(name, value, record["round"])
        self._writer.flush()

    @override
    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@register_logger("wandb")
class WandbLogger(Logger):
    """Log to Weights & Biases.

    A resumed run continues the same run at Weights & Biases. The library stores its files in
    `wandb/` in the run directory.
    """

    module: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "loggers"

    project: str = Field("hetero_fl", min_length=1, description="project of the run")
    entity: str | None = Field(
        None, description="user or team that owns the project; `null`: the default of the account"
    )
    name: str | None = Field(
        None, description="displayed name of the run; `null`: name of the run directory"
    )
    group: str | None = Field(
        None, description="group of the run; `null`: `name` of the configuration"
    )
    tags: list[str] = Field([], description="tags of the run")
    mode: Literal["online", "offline", "disabled"] | None = Field(
        None,
        description="`offline`: write files only, for `wandb sync`; `disabled`: log nothing; "
        "`null`: WANDB_MODE if it is set, else online",
    )

    _run: Any = PrivateAttr(None)
    _has_finished: bool = PrivateAttr(False)

    @override
    def start(self, run: LoggedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name or run.label,
            group=self.group or run.name,
            tags=self.tags,
            config=dict(run.config),
            dir=str(run.path),
            id=run.run_id,
            resume="allow",
            mode=self.mode,
            # A program may have other runs.
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        if self._run.offline:
            run.log(f"wandb: offline; to upload: wandb sync {run.path / 'wandb'}/*-{run.run_id}*")
        elif self._run.url:
            run.log(f"wandb: {self._run.url}")

    @override
    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(round_scalars(record), step=record["round"])

    @override
    def finish(self, summary: Mapping[str, Any]) -> None:
        for test in EVALUATIONS:
            self._run.summary[f"summary/{test}"] = summary[test]
        self._has_finished = True

    @override
    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if self._has_finished else 1)


def _to_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the key path and the text of each setting that is not null."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}".lstrip("."))
    elif value is not None and value != []:
        text = value if isinstance(value, str) else json.dumps(value)
        yield path, text[:MAX_PARAMETER_CHARACTERS]
