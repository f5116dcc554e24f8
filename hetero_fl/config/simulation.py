"""Settings of simulated devices, faults and cohorts."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from hetero_fl.config.base import ConfigSection, choice_type, format_value

Probability = Annotated[float, Field(ge=0, le=1)]
WIDEST = 10.0


def _check_log_spread(value: float) -> float:
    """Reject values that are implausibly large as the standard deviation of a logarithm."""
    if value > WIDEST:
        raise ValueError(
            f"must be <= {WIDEST:g}, got {value:g}; it is the standard deviation of the natural "
            "logarithm"
        )
    return value


Spread = Annotated[NonNegativeFloat, AfterValidator(_check_log_spread)]


class QuantityConfig(ConfigSection):
    """A log-normal distribution from which each client's value is sampled once."""

    median: PositiveFloat = Field(description="median over the clients")
    sigma: Spread = Field(
        0.0,
        description="standard deviation of the natural logarithm; 0: the same value for all "
        "clients; 0.9: the middle 80 % of the clients differ by a factor of 10",
    )


def _expand_number(value: object) -> object:
    """Convert a number to a distribution without spread, and return distributions unchanged."""
    if isinstance(value, dict | QuantityConfig):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"expected a number or a mapping {{median, sigma}}, got {format_value(value)}"
        )
    return {"median": value, "sigma": 0.0}


Quantity = Annotated[QuantityConfig, BeforeValidator(_expand_number)]


class AvailabilityConfig(ConfigSection):
    """Daily period in which a client is online."""

    share: float = Field(1.0, gt=0, le=1, description="share of the day that the client is online")
    day: PositiveFloat = Field(86400.0, description="length of a day in simulated seconds")
    phase: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="start of the online period as a share of the day; `null`: sampled for each "
        "client",
    )


class DeviceConfig(ConfigSection):
    """Simulated device of a client. By default, a device is always available and takes no time.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Client("phone", "mlp", machine=hfl.Device(up=1e5))
        Client('phone', model=mlp, machine={'up': {'median': 100000.0, 'sigma': 0.0}})
    """

    speed: Quantity | None = Field(
        None,
        description="speed in FLOP/s, a number or `{median, sigma}` to sample it; `null`: "
        "computation takes no time",
    )
    up: Quantity | None = Field(
        None,
        description="upload bandwidth in bytes/s, a number or `{median, sigma}`; `null`: uploads "
        "take no time",
    )
    down: Quantity | None = Field(
        None,
        description="download bandwidth in bytes/s, a number or `{median, sigma}`; `null`: "
        "downloads take no time",
    )
    jitter: Spread | None = Field(
        None,
        description="σ of a log-normal factor on the duration of each task; `null`: none",
    )
    availability: AvailabilityConfig | None = Field(
        None, description="when the client is online; `null`: always"
    )
    failure: Probability | None = Field(
        None, description="probability that the client fails during a task; `null`: 0"
    )


class DevicesConfig(DeviceConfig):
    """Simulated devices of all clients.

    Settings in `clients.groups[].machine` and `clients.overrides[].machine` take precedence.

    Example:
        >>> import hetero_fl as hfl
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 4}, "rounds": 1}
        >>> federation = hfl.Federation.from_config(config)
        >>> devices = hfl.Devices(speed={"median": 1e9, "sigma": 0.5}, up=1e6)
        >>> federation.prepare(hfl.FedAvg(), devices=devices).config.devices.speed.median
        1000000000.0
    """

    _removed = {"file": "machine of each group of clients"}


class FaultsConfig(ConfigSection):
    """Probabilities of simulated faults per task. A task has at most one fault.

    Example:
        >>> import hetero_fl as hfl
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 4}, "rounds": 1}
        >>> federation = hfl.Federation.from_config(config)
        >>> federation.prepare(hfl.FedAvg(), faults=hfl.Faults(lost=0.1)).config.faults.lost
        0.1
    """

    _removed = {"server": "--resume, which continues a run whose process was killed"}
    _former_defaults = {"server": []}

    before: Probability = Field(
        0.0, description="probability that the client fails before training"
    )
    during: Probability = Field(
        0.0, description="probability that the client fails during training"
    )
    after: Probability = Field(
        0.0, description="probability that the client fails after training, before its upload"
    )
    lost: Probability = Field(0.0, description="probability that the upload is lost")
    late: Probability = Field(0.0, description="probability that the upload is delayed by `delay`")
    twice: Probability = Field(
        0.0, description="probability that the upload arrives twice; the duplicate is dropped"
    )
    corrupted: Probability = Field(
        0.0, description="probability that the upload is corrupted and therefore rejected"
    )
    delay: PositiveFloat = Field(3600.0, description="delay of `late` uploads in seconds")

    @property
    def probabilities(self) -> dict[str, float]:
        """Probabilities of the faults, keyed by name."""
        names = ("before", "during", "after", "lost", "late", "twice", "corrupted")
        return {name: getattr(self, name) for name in names}

    @model_validator(mode="after")
    def _check_total_probability(self) -> FaultsConfig:
        """Check that the probabilities of all faults sum to at most 1."""
        total = sum(self.probabilities.values())
        if total > 1 + 1e-9:
            raise ValueError(f"the sum of the probabilities must be <= 1, got {total:g}")
        return self


class CohortConfig(ConfigSection):
    """Sampling of the clients of a round, the deadline, and the handling of missing uploads.

    Example:
        >>> import hetero_fl as hfl
        >>> config = {"data": {"name": "digits"}, "clients": {"count": 4}, "rounds": 1}
        >>> federation = hfl.Federation.from_config(config)
        >>> cohort = hfl.Cohort(least=2)
        >>> federation.prepare(hfl.FedAvg(), cohort=cohort).config.cohort.least
        2
    """

    _removed = {
        "attempts": "cohort.too_few=skip or fail",
        "partial_work": "fewer steps for slow clients",
    }
    _former_defaults = {"attempts": 10, "partial_work": False}

    sampling: choice_type(  # type: ignore[valid-type]
        "uniform", "available", removed={"oort": "available or uniform"}
    ) = Field(
        "uniform",
        description="`uniform`: all clients with equal probability; `available`: only clients that "
        "are online",
    )
    over_selection: float = Field(
        1.0,
        ge=1,
        description="sample this multiple of `clients.per_round` and use the first `per_round` "
        "uploads that arrive",
    )
    deadline: PositiveFloat | None = Field(
        None,
        description="maximum duration of a round in seconds, simulated or, with real clients, "
        "wall-clock; `null`: wait for all clients",
    )
    least: PositiveInt = Field(1, description="minimum number of uploads for an aggregation")
    too_few: (
        choice_type(  # type: ignore[valid-type]
            "skip", "fail", removed={"repeat": "skip or fail"}
        )
        | None
    ) = Field(
        None,
        description="with fewer uploads than `least`; `skip`: continue without an aggregation; "
        "`fail`: end the run; `null`: `skip` with `devices`, `faults`, `deadline` or real clients, "
        "else `fail`",
    )

    def num_sampled(self, per_round: int | None, clients: int) -> int:
        """Return the number of clients to sample for a round.

        Args:
            per_round: Number of uploads to aggregate, `clients.per_round`. If None, all clients are
                sampled.
            clients: Number of clients.
        """
        if per_round is None:
            return clients
        return min(clients, math.ceil(self.over_selection * per_round - 1e-9))
