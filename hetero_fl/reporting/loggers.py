"""Loggers, which write each round of a run to a file or to an experiment tracker."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, PrivateAttr
from typing_extensions import override

from hetero_fl.config.base import Settings
from hetero_fl.utils.registry import Registry

EVALUATIONS = ("personal", "global", "server")

MAX_PARAMETER_CHARACTERS = 500
"""Maximum length of a parameter in all stores of MLflow."""


@dataclass
class LoggedRun:
    """The run that a logger logs.

    Args:
        name: Name of the run, from the configuration.
        path: The run directory.
        run_id: Random id of the run, which does not change when the run is resumed.
        config: The resolved configuration as plain values.
        first_round: The first round that will be logged. A larger number than 1 means that the
            logger continues after an interruption.
        log: Function that prints one line and appends the line to `log.txt`.
        state: Values that the logger stores for a resumed run, such as the id of a run at a
            service. They must be serializable as JSON.
    """

    name: str
    path: Path
    run_id: str
    config: Mapping[str, Any]
    first_round: int = 1
    log: Callable[[str], None] = lambda _line: None
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name of the run directory, which distinguishes the runs of a comparison."""
        return self.path.resolve().name


class Logger(Settings):
    """Base class of loggers, which receive each round of a run.

    The fields of a subclass are its settings in `output.loggers`. A subclass overrides the methods
    that it needs and stores its state in private attributes.

    Rounds are logged in order and after they have been committed to disk. If a run is resumed, only
    new rounds are logged. Rounds that could not be logged, for example because a server was not
    reachable, are logged later.

    Example:
        >>> import hetero_fl
        >>> @hetero_fl.register_logger("losses")
        ... class LossLogger(hetero_fl.Logger):
        ...     def log(self, record):
        ...         print(f"round {record['round']}: {len(record['train_loss'])} losses")
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 2}, "rounds": 1}
        >>> _ = hetero_fl.run(
        ...     config,
        ...     out="runs/losses",
        ...     overrides=["output.loggers=[losses]", "output.plots=false", "output.report=false"],
        ... )
        round 1: 2 losses
    """

    module: ClassVar[str] = ""
    """Name of the module that the logger requires, if the module is not part of hetero_fl."""
    extra: ClassVar[str] = ""
    """Extra of hetero_fl that installs the module."""
    rewrites: ClassVar[bool] = False
    """Whether the logger starts over on resume, and all earlier rounds are logged again."""

    def start(self, run: LoggedRun) -> None:
        """Start or continue the logging of a run."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the record of a round, which is a line of `metrics.jsonl`."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the end of the run.

        Args:
            summary: Content of `summary.json`. The other files of the run have been written.
        """

    def close(self) -> None:
        """Release resources. The method is called last, also after an error or an interruption."""


register_logger: Registry[type[Logger]] = Registry(
    "logger", lambda: Logger, plugins="hetero_fl.loggers"
)


def round_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a round under hierarchical names, such as `test/global/accuracy`.

    Metrics are means over clients. Undefined metrics are left out.

    Args:
        record: Record of the round, as in `metrics.jsonl`.

    Example:
        >>> from hetero_fl.reporting.loggers import round_scalars
        >>> record = {"train_loss": {"a": 1.0, "b": 2.0}, "up_bytes": 8, "down_bytes": 16}
        >>> record |= {"failed": {}, "seconds": {"training": 0.5}, "server": {"accuracy": 0.9}}
        >>> for name, value in round_scalars(record).items():
        ...     print(name, value)
        test/server/accuracy 0.9
        train/loss 1.5
        clients/failed 0
        communication/up_bytes 8
        communication/down_bytes 16
        seconds/training 0.5
    """
    scalars: dict[str, float | None] = {}
    for test in EVALUATIONS:
        for scores, prefix in ((record, "test"), (record.get("validation") or {}, "validation")):
            for name, value in (scores.get(test) or {}).items():
                scalars[f"{prefix}/{test}/{name}"] = value
    scalars["train/loss"] = _mean(record["train_loss"].values())
    logged = list(record.get("logged", {}).values())
    for name in dict.fromkeys(name for values in logged for name in values):
        scalars[f"logged/{name}"] = _mean(values.get(name) for values in logged)
    scalars["clients/failed"] = len(record["failed"])
    for direction in ("up_bytes", "down_bytes"):
        scalars[f"communication/{direction}"] = record[direction]
    for part, seconds in record["seconds"].items():
        scalars[f"seconds/{part}"] = seconds
    if "simulated" in record:
        scalars["seconds/simulated"] = record["simulated"]["end"]
    if record.get("privacy"):
        scalars["privacy/epsilon"] = record["privacy"]["epsilon"]
    return {name: value for name, value in scalars.items() if value is not None}


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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
        is_wider = columns != self._columns
        with open(self._path, "w" if is_wider else "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            if is_wider:
                writer.writeheader()
                writer.writerows(self._rows)
            writer.writerow(row)
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


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the key path and the text of each setting that is not null."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}".lstrip("."))
    elif value is not None and value != []:
        text = value if isinstance(value, str) else json.dumps(value)
        yield path, text[:MAX_PARAMETER_CHARACTERS]
