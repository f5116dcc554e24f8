"""The typed schema of a configuration."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
)

from hetero_fl.config.base import (
    VERSION,
    ConfigSection,
    FilePath,
    OptimizerConfig,
    Reference,
    StalenessConfig,
    check_folder_name,
    check_version,
    choice_type,
)
from hetero_fl.config.clients import ClientsConfig, ModelConfig, PreprocessConfig, expand_model_name
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.config.data import DataConfig
from hetero_fl.config.protection import AggregationConfig, AttacksConfig, PrivacyConfig
from hetero_fl.config.simulation import CohortConfig, DevicesConfig, FaultsConfig
from hetero_fl.utils.text import format_list

STATISTIC_SUFFIXES = ("_std", "_worst", "_undefined")
"""Suffixes of the keys in `metrics.jsonl` for statistics of a metric over the clients."""
Executor = choice_type("auto", "serial", "batched", "processes", "ray", "torchrun")
Device = choice_type("auto", "cpu", "cuda", "mps", prefix="cuda:", synonyms={"gpu": "cuda"})


class ServerConfig(ConfigSection):
    """Training on the server, and an optional student model.

    Example:
        >>> import hetero_fl as hfl
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 4}, "rounds": 1}
        >>> federation = hfl.Federation.from_config(config)
        >>> server = hfl.Server(optimizer=hfl.Adam(lr=1e-4))
        >>> federation.prepare(hfl.FedAvg(), server=server).config.server.optimizer.lr
        0.0001
    """

    model: Annotated[ModelConfig, BeforeValidator(expand_model_name)] | None = Field(
        None,
        description="model of a student that the server distills from the clients' consensus; "
        "`null`: no student",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    preprocess: PreprocessConfig = PreprocessConfig()


class EvaluationConfig(ConfigSection):
    """Evaluation schedule and early stopping.

    Example:
        >>> import hetero_fl as hfl
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 4}, "rounds": 1}
        >>> federation = hfl.Federation.from_config(config)
        >>> prepared = federation.prepare(hfl.FedAvg(), evaluation=hfl.Evaluation(every=5))
        >>> prepared.config.evaluation.every
        5
    """

    every: PositiveInt = Field(
        1, description="rounds between two evaluations; the last round is always evaluated"
    )
    patience: PositiveInt | None = Field(
        None,
        description="stop after this number of evaluations without a better validation metric; "
        "`null`: no early stopping",
    )
    clients: PositiveInt | None = Field(
        None,
        description="number of clients whose models are evaluated, sampled once; `null`: all, or "
        "100 of more than 1,000",
    )
    metrics: dict[str, Reference] = Field(
        {},
        description="further metrics by name: functions of predictions (probabilities, or values "
        "for a regression) and targets that return a number",
    )

    @field_validator("metrics")
    @classmethod
    def _check_metric_names(cls, metrics: dict[str, Any]) -> dict[str, Any]:
        """Check that the names are valid and do not end like statistics of other metrics."""
        for name in metrics:
            if not re.fullmatch("[a-z][a-z0-9_]*", name) or name.endswith(STATISTIC_SUFFIXES):
                raise ValueError(
                    "a name must consist of lower-case letters, digits and '_' and not end in "
                    f"{format_list(STATISTIC_SUFFIXES)}, got '{name}'"
                )
        return metrics


class RuntimeConfig(ConfigSection):
    """Execution of a run: mode, executor, processes, device and precision.

    Example:
        >>> import hetero_fl as hfl
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 4}, "rounds": 1}
        >>> federation = hfl.Federation.from_config(config)
        >>> runtime = hfl.Runtime(executor="serial", threads=1)
        >>> federation.prepare(hfl.FedAvg(), runtime=runtime).config.runtime.executor
        'serial'
    """

    mode: choice_type("sync", "async") = Field(  # type: ignore[valid-type]
        "sync",
        description="`sync`: each round waits for its cohort; `async`: `clients.per_round` clients "
        "train at any time, each at its own pace, and the server aggregates after `buffer` uploads",
    )
    buffer: PositiveInt | None = Field(
        None,
        description="`async`: uploads per aggregation; `null`: the number of clients that train at "
        "a time",
    )
    staleness: StalenessConfig = StalenessConfig()
    executor: Executor = Field(  # type: ignore[valid-type]
        "auto",
        description="how clients are computed; `serial`: one after another; `batched`: clients "
        "with the same architecture vectorized; `processes`, `ray`, `torchrun`: in worker "
        "processes; `auto`: chosen by the size of the run",
    )
    address: str | None = Field(
        None,
        description="address of the Ray cluster, `auto` for one on this machine; `null`: "
        "RAY_ADDRESS if it is set, else a new cluster for this run; does not affect results",
    )
    workers: PositiveInt | None = Field(
        None,
        description="number of worker processes; `null`: the number of cores, with `torchrun` its "
        "processes except the first; does not affect results",
    )
    chunk: PositiveInt | None = Field(
        None,
        description="maximum number of clients with one architecture that are computed together; "
        "`null`: 128 for `batched`, chosen by `auto` for worker processes, else 1",
    )
    threads: PositiveInt | None = Field(
        None,
        description="threads per process; `null`: chosen from the number of cores and the models",
    )
    device: Device = Field(  # type: ignore[valid-type]
        "auto", description="device of computations; `auto`: the first GPU, or the CPU without one"
    )
    store_memory: NonNegativeInt = Field(
        1024,
        description="memory in MiB for clients' private state, the rest is stored on disk; does "
        "not affect results",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="`bfloat16`: automatic mixed precision with float32 parameters and losses, "
        "for GPUs",
    )
    deterministic: bool = Field(
        False,
        description="use only deterministic algorithms on a GPU; slower, and operations without a "
        "deterministic implementation raise an error; no effect on a CPU",
    )
    divergence: Literal["skip", "stop"] = Field(
        "skip",
        description="when a client's loss is not finite; `skip`: drop the client from the round; "
        "`stop`: end the run",
    )


class LoggerConfig(ConfigSection):
    """A logger, to which each round of a run is written.

    The other keys are settings of the logger.
    """

    model_config = ConfigDict(extra="allow")

    kind: str = Field(
        description="`csv`, `tensorboard`, `wandb`, `mlflow`, a registered logger, or "
        "`python:module:Name` of a subclass of `hetero_fl.Logger`"
    )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the logger, which are all keys except `kind`."""
        return dict(self.model_extra or {})


def _expand_logger_kind(value: object) -> object:
    """Convert a string to `{"kind": value}`, and return other values unchanged."""
    return {"kind": value} if isinstance(value, str) else value


class OutputConfig(ConfigSection):
    """Optional output files of a run, and loggers.

    Example:
        >>> import hetero_fl as hfl
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 4}, "rounds": 1}
        >>> federation = hfl.Federation.from_config(config)
        >>> run = federation.train(hfl.FedAvg(), output=hfl.Output(plots=False, report=False))
        >>> (run.path / "report.html").exists()
        False
    """

    _removed = {"tensorboard": "output.loggers=[tensorboard]"}
    _former_defaults = {"tensorboard": False}

    plots: bool = Field(True, description="write figures to `plots/*.png`")
    report: bool = Field(True, description="write `report.html`")
    best_models: bool = Field(
        True,
        description="also save the models of the rounds with the best local and global validation "
        "scores, in `models/best_personal/` and `models/best_global/`",
    )
    loggers: list[Annotated[LoggerConfig, BeforeValidator(_expand_logger_kind)]] = Field(
        [],
        description="loggers to which each round is written, by `kind` or with settings; do not "
        "affect results (see [below](#settings-of-the-loggers))",
    )

    @field_validator("loggers")
    @classmethod
    def _check_kinds(cls, loggers: list[LoggerConfig]) -> list[LoggerConfig]:
        """Check that each kind of logger occurs once."""
        kinds = [entry.kind for entry in loggers]
        repeated = [kind for kind in kinds if kinds.count(kind) > 1]
        if repeated:
            raise ValueError(f"each kind of logger may occur once, got '{repeated[0]}' twice")
        return loggers


# Settings of clients that may also be written in the section `algorithm`.
CLIENT_OPTIONS = (
    "logit_adjustment",
    "local_prior",
    "prior_correction",
    "recalibrate",
    "fine_tune_epochs",
    "fine_tune_before",
)


class Config(ConfigSection):
    """The configuration of a run."""

    version: Annotated[int, AfterValidator(check_version)] = Field(
        VERSION,
        description="version of the configuration format; files without this key have version 1",
    )
    name: Annotated[str, AfterValidator(check_folder_name)] = Field(
        "run",
        min_length=1,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="name of the run; the default run directory is `runs/<name>-<timestamp>`",
    )
    seed: NonNegativeInt = Field(
        0,
        description="random seed of partition, proxy set, initial weights, client sampling and "
        "batches",
    )
    rounds: PositiveInt = Field(10, le=1_000_000, description="number of rounds")
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    server: ServerConfig = ServerConfig()
    algorithm: dict[str, Any] = Field(
        {"name": "fedavg"},
        description="`name` of the method and its settings "
        "(see [below](#settings-of-the-algorithms))",
    )
    channel: ChannelConfig = ChannelConfig()
    aggregation: AggregationConfig = AggregationConfig()
    attacks: AttacksConfig | None = Field(
        None, description="simulated malicious clients; `null`: none"
    )
    privacy: PrivacyConfig | None = Field(
        None, description="differential privacy; `null`: no noise is added"
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    devices: DevicesConfig | None = Field(
        None, description="simulated devices; `null`: time is not simulated"
    )
    faults: FaultsConfig | None = Field(None, description="simulated faults; `null`: none")
    cohort: CohortConfig = CohortConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    output: OutputConfig = OutputConfig()
    init_from: FilePath | None = Field(
        None,
        description="directory of a run whose models initialize this run; `null`: random "
        "initialization",
    )
