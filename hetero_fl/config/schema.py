"""The whole configuration of a run, as one typed schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from hetero_fl.config.base import ConfigSection, OptimizerConfig, StalenessConfig, choice_type
from hetero_fl.config.clients import ClientsConfig, ModelConfig, PreprocessConfig, expand_model_name
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.config.data import DataConfig
from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.config.robustness import AggregationConfig, AttacksConfig
from hetero_fl.config.simulation import CohortConfig, DevicesConfig, FaultsConfig


class ServerConfig(ConfigSection):
    """What the server trains with, and the one student that it may train for itself."""

    model: Annotated[ModelConfig, BeforeValidator(expand_model_name)] | None = Field(
        None,
        description="architecture of a student distilled at the server from the clients' consensus; none: no student",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    preprocess: PreprocessConfig = PreprocessConfig()


class EvaluationConfig(ConfigSection):
    """When models are read, and when a run that no longer improves stops."""

    every: PositiveInt = Field(
        1, description="rounds between two evaluations; the last round is always evaluated"
    )
    patience: PositiveInt | None = Field(
        None, description="stop after so many evaluations without a better validation"
    )
    clients: PositiveInt | None = Field(
        None,
        description="read so many clients' models, drawn once by the seed; none: all, or 100 of more than 1,000",
    )


class RuntimeConfig(ConfigSection):
    """Where and how a run computes. Threads are part of the result's bits, the number of workers is not."""

    mode: choice_type("sync", "async") = Field(  # type: ignore[valid-type]
        "sync",
        description="sync: rounds that wait for the whole cohort; async: clients.per_round clients train at any time, each at "
        "its own pace, and the server aggregates when enough uploads have come",
    )
    buffer: PositiveInt | None = Field(
        None,
        description="async: uploads after which the server aggregates; none: as many as clients train at a time",
    )
    staleness: StalenessConfig = StalenessConfig()
    executor: choice_type("auto", "serial", "batched", "processes", "ray", "torchrun") = Field(  # type: ignore[valid-type]
        "auto",
        description="how steps are carried out; auto: chosen before the run from its size and, where it is close, a few timed steps",
    )
    address: str | None = Field(
        None,
        description="of the Ray cluster, `auto` for the one that runs on this machine; none: what RAY_ADDRESS says, "
        "else a cluster for this run alone; changes no result",
    )
    workers: PositiveInt | None = Field(
        None,
        description="worker processes (executors that have them); none: as many as cores; changes no result; "
        "with torchrun, its processes but the first",
    )
    chunk: PositiveInt | None = Field(
        None,
        description="clients of one architecture computed together at most; none: 128 if batched, a worker's share of a large "
        "group if auto takes workers, else 1",
    )
    threads: PositiveInt | None = Field(
        None, description="threads of a process; none: chosen from cores and models"
    )
    device: choice_type("auto", "cpu", "cuda", "mps", prefix="cuda:") = Field(  # type: ignore[valid-type]
        "auto", description="auto: the first GPU if there is one"
    )
    store_memory: NonNegativeInt = Field(
        1024,
        description="MiB of clients' private state held in memory, the rest lies on disk; may change when a run is resumed",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="bfloat16: products in half the bits (autocast), parameters and losses as ever; for GPUs",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU: use only algorithms that compute the same bits in every run; slower, and an operation without "
        "one raises an error; no effect on a CPU",
    )
    divergence: Literal["skip", "stop"] = Field(
        "skip",
        description="a client whose loss is no longer finite: leave it out of the round, or end the run",
    )


class OutputConfig(ConfigSection):
    """What a run leaves behind besides metrics and models."""

    plots: bool = Field(True, description="`plots/*.png`")
    report: bool = Field(True, description="`report.html`")
    tensorboard: bool = Field(
        False, description="the same figures below `tensorboard/`; needs `hetero_fl[tensorboard]`"
    )


# client settings that may be written next to `algorithm.name`, too
CLIENT_OPTIONS = ("logit_adjustment",)


class Config(ConfigSection):
    """One run: data, clients, method, and how it is computed."""

    name: str = Field(
        "run",
        min_length=1,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="`runs/<name>-<time>` holds the results",
    )
    seed: NonNegativeInt = Field(
        0, description="partition, proxy set, initial weights, sampling and batches follow from it"
    )
    rounds: PositiveInt = Field(10, description="global rounds")
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    server: ServerConfig = ServerConfig()
    algorithm: dict[str, Any] = Field(
        {"name": "fedavg"}, description="the method's name and its own settings beside it"
    )
    channel: ChannelConfig = ChannelConfig()
    aggregation: AggregationConfig = AggregationConfig()
    attacks: AttacksConfig | None = Field(
        None, description="clients that lie, for studies; none: nobody does"
    )
    privacy: PrivacyConfig | None = Field(
        None, description="differential privacy; none: nothing is noised"
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    devices: DevicesConfig | None = Field(None, description="none: nobody's time is simulated")
    faults: FaultsConfig | None = Field(None, description="none: nothing goes wrong on purpose")
    cohort: CohortConfig = CohortConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    output: OutputConfig = OutputConfig()
    init_from: str | None = Field(
        None, description="a run directory whose models this run starts from"
    )

    @model_validator(mode="before")
    @classmethod
    def _move_client_options(cls, raw: Any) -> Any:
        """Read `algorithm.logit_adjustment` as `clients.defaults.logit_adjustment`."""
        algorithm = raw.get("algorithm") if isinstance(raw, dict) else None
        clients = raw.get("clients") or {} if isinstance(raw, dict) else {}
        if not isinstance(algorithm, dict) or not isinstance(clients, dict):
            return raw
        options = {key: algorithm[key] for key in CLIENT_OPTIONS if key in algorithm}
        defaults = clients.get("defaults") or {}
        if not options or not isinstance(defaults, dict):
            return raw
        algorithm = {key: value for key, value in algorithm.items() if key not in options}
        clients = {**clients, "defaults": {**defaults, **options}}
        return {**raw, "algorithm": algorithm, "clients": clients}
