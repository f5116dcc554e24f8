"""The protocol of loggers, their registry, and the scalars of a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hetero_fl.config.base import Settings
from hetero_fl.utils.registry import Registry

EVALUATIONS = ("personal", "global", "server")


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
