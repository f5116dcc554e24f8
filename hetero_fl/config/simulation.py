"""Simulated machines and what goes wrong with them: how fast, how well connected, how often online; faults by probability."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from hetero_fl.config.base import ConfigSection, choice_type

Chance = Annotated[float, Field(ge=0, le=1)]
WIDEST = 10.0  # sigma: beyond it clients differ by more than anything that computes


def _check_log_spread(value: float) -> float:
    """A spread in the quantity's own unit is meant where it is this large."""
    if value > WIDEST:
        raise ValueError(
            f"found {value:g}; it is of the natural logarithm, at most {WIDEST:g}: with 0.9 the middle 80 % differ ten-fold"
        )
    return value


Spread = Annotated[NonNegativeFloat, AfterValidator(_check_log_spread)]


class QuantityConfig(ConfigSection):
    """A number of each client's own, drawn once by the key: log-normal."""

    median: PositiveFloat = Field(description="half of the clients have less")
    sigma: Spread = Field(
        0.0,
        description="standard deviation of the natural logarithm; 0: all the same; 0.9: the middle 80 % differ ten-fold",
    )


def _fixed_quantity(value: object) -> object:
    """A plain number: everybody's."""
    if isinstance(value, dict | QuantityConfig):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        found = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
        raise ValueError(f"found {found}; give a number, or {{median, sigma}} to draw from")
    return {"median": value, "sigma": 0.0}


Quantity = Annotated[QuantityConfig, BeforeValidator(_fixed_quantity)]


class AvailabilityConfig(ConfigSection):
    """When a client is online: one stretch of every day, which begins at a time of its own."""

    share: float = Field(1.0, gt=0, le=1, description="of the day that it is online")
    day: PositiveFloat = Field(86400.0, description="seconds of a day")
    phase: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="when it comes online, as a share of the day; none: its own, drawn by the key",
    )


class DeviceConfig(ConfigSection):
    """A client's machine. What is not given takes no time, and is always there."""

    speed: Quantity | None = Field(
        None,
        description="floating-point operations a second (FLOP/s): a number, or `{median, sigma}` to draw from",
    )
    up: Quantity | None = Field(
        None, description="bytes a second to the server; a number, or `{median, sigma}`"
    )
    down: Quantity | None = Field(
        None, description="bytes a second from the server; a number, or `{median, sigma}`"
    )
    jitter: Spread | None = Field(
        None,
        description="how much the same training takes now more, now less time: sigma of a log-normal factor",
    )
    availability: AvailabilityConfig | None = Field(None, description="none: always online")
    failure: Chance | None = Field(None, description="chance that it fails in the midst of a task")


class DevicesConfig(DeviceConfig):
    """The clients' machines, for simulated time; `clients.groups[].machine` and overrides have the last word."""

    file: str | None = Field(
        None,
        description="a CSV of devices, a row each, with any of the columns speed, up, down, jitter, failure, online "
        "(`0-21600;64800-86400`: seconds of the day); a column `client` says whose a row is, else rows are drawn by the key",
    )


class FaultsConfig(ConfigSection):
    """What goes wrong, by probability for each task; at most one of them befalls it."""

    before: Chance = Field(0.0, description="the client fails before it trains")
    during: Chance = Field(0.0, description="it fails in the midst of training")
    after: Chance = Field(0.0, description="it fails when it has trained, before it sends")
    lost: Chance = Field(0.0, description="its upload never comes")
    late: Chance = Field(0.0, description="its upload comes `delay` seconds later")
    twice: Chance = Field(
        0.0, description="its upload comes twice; the second one is recognised and dropped"
    )
    corrupted: Chance = Field(
        0.0, description="bytes of its upload are changed on the way; it is refused"
    )
    delay: PositiveFloat = Field(3600.0, description="seconds of `late`")

    @model_validator(mode="before")
    @classmethod
    def _refuse_server(cls, values: Any) -> Any:
        # The configuration of every run with faults has the key, most of them an empty list.
        if isinstance(values, Mapping) and "server" in values:
            if values["server"]:
                raise ValueError(
                    "server is no longer simulated; leave it out (a run whose process is killed goes on with --resume)"
                )
            return {key: value for key, value in values.items() if key != "server"}
        return values

    @property
    def probabilities(self) -> dict[str, float]:
        """Probabilities by name."""
        names = ("before", "during", "after", "lost", "late", "twice", "corrupted")
        return {name: getattr(self, name) for name in names}

    @model_validator(mode="after")
    def _check_total_probability(self) -> FaultsConfig:
        total = sum(self.probabilities.values())
        if total > 1 + 1e-9:
            raise ValueError(
                f"found probabilities that add up to {total:g}; at most one fault befalls a task: at most 1"
            )
        return self


class CohortConfig(ConfigSection):
    """Who is invited to a round, how long the server waits for them, and what it does if too few come."""

    sampling: choice_type("uniform", "available", "oort") = Field(  # type: ignore[valid-type]
        "uniform",
        description="who is drawn: anybody; among those online; or those whose losses are high and who are quick enough (Oort), "
        "among those online",
    )
    over_selection: float = Field(
        1.0,
        ge=1,
        description="invite so many times clients.per_round and take the first per_round to arrive",
    )
    deadline: PositiveFloat | None = Field(
        None,
        description="seconds after which a round is closed, simulated or, in a federation, real; none: it waits for everybody",
    )
    partial_work: bool = Field(
        False,
        description="who would miss the deadline trains as many steps as there is time for, and is on time",
    )
    least: PositiveInt = Field(1, description="uploads without which a round is not averaged")
    too_few: choice_type("repeat", "skip", "fail") | None = Field(  # type: ignore[valid-type]
        None,
        description="fewer than `least`: invite anew, leave the server as it is, or end the run; none: skip where `devices`, "
        "`faults` or a deadline are simulated, and in a federation; else fail",
    )
    attempts: PositiveInt = Field(
        10, description="too_few: repeat: how often a round is tried before the run fails"
    )

    def num_sampled(self, per_round: int | None, clients: int) -> int:
        """How many of so many clients are invited to a round."""
        return (
            clients
            if per_round is None
            else min(clients, math.ceil(self.over_selection * per_round - 1e-9))
        )

    @model_validator(mode="after")
    def _check_deadline(self) -> CohortConfig:
        if self.partial_work and self.deadline is None:
            raise ValueError(
                "found partial_work without a deadline; give cohort.deadline, in simulated seconds"
            )
        return self
