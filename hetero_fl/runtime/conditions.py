"""The conditions under which a run is held: clients' machines, what goes wrong, and how a round deals with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from hetero_fl.config.devices import CohortConfig, DeviceConfig
from hetero_fl.config.schema import Config
from hetero_fl.errors import UserError
from hetero_fl.runtime.devices import Devices
from hetero_fl.runtime.faults import Faults
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.timing import Timing


@dataclass(frozen=True)
class Conditions:
    """`simulated`: whether rounds take simulated time and arrivals are counted; `here`: where clients are on their own machines
    and time is real, who is there now."""

    policy: CohortConfig
    devices: Devices
    timing: Timing
    faults: Faults
    per_round: int | None  # clients whose uploads a round is meant to have; none: everybody's
    simulated: bool
    here: Callable[[], Collection[str]] | None = None

    @classmethod
    def ideal(cls, federation: Federation, per_round: int | None = None) -> Conditions:
        """Nothing takes time and nothing goes wrong."""
        devices = Devices.of(federation, None)
        return cls(CohortConfig(), devices, Timing(devices), Faults(None, devices), per_round, False)

    @classmethod
    def of(
        cls, federation: Federation, config: Config, here: Callable[[], Collection[str]] | None = None
    ) -> Conditions:
        """The conditions that a configuration describes. Raises UserError for policies that have nothing to go by.

        Where clients are on machines of their own, what would be simulated is left out.
        """
        policy, per_round, apart = config.cohort, config.clients.per_round, federation.data.apart
        own = any(kind.settings.machine != DeviceConfig() for kind in federation.cards.kinds)
        if (policy.over_selection > 1 or policy.sampling == "oort") and per_round is None:
            key = "over_selection" if policy.over_selection > 1 else "sampling: oort"
            raise UserError(f"cohort.{key}: chooses among clients, but clients.per_round is not given: all are invited")
        if policy.over_selection > 1 and config.devices is None and not own and not apart:
            raise UserError("cohort.over_selection: takes the first to arrive, but without `devices` nobody takes time")
        if policy.least > (per_round or len(federation.cards)):
            raise UserError(f"cohort.least: found {policy.least}, but {per_round or len(federation.cards)} are invited")
        secret = config.channel.secure_sum
        if policy.too_few == "repeat" and secret is not None and policy.least > secret.survivors(federation.cohort):
            raise UserError(
                f"cohort.least: found {policy.least}, with cohort.too_few: repeat and channel.secure_sum, which opens sums of "
                f"{secret.survivors(federation.cohort)}: of two sums of a round the difference tells single uploads; take no "
                "more, or too_few: skip"
            )
        if apart:
            devices = Devices.of(federation, None)
            return cls(policy, devices, Timing(devices), Faults(None, devices), per_round, False, here)
        devices = Devices.of(federation, config.devices)
        faults = Faults(config.faults, devices)
        simulated = own or any(found is not None for found in (config.devices, config.faults, policy.deadline))
        return cls(policy, devices, Timing(devices), faults, per_round, simulated)

    @property
    def invited(self) -> int:
        """How many clients are invited to a round."""
        everybody = len(self.devices.federation.cards)
        if self.per_round is None:
            return everybody
        return min(everybody, math.ceil(self.policy.over_selection * self.per_round - 1e-9))

    @property
    def too_few(self) -> str:
        """What is done about a round with too few uploads."""
        return str(self.policy.too_few or ("skip" if self.simulated or self.here is not None else "fail"))

    def notes(self) -> list[str]:
        """What is possible but perhaps not meant."""
        if self.devices.federation.data.apart:
            return []
        policy, lines = self.policy, []
        waits = policy.deadline is None and policy.over_selection == 1
        if waits and self.faults.config.late:
            lines.append("faults.late: without cohort.deadline or over_selection a round waits for what is late")
        if policy.sampling == "available" and self.per_round is None:
            lines.append("cohort.sampling: without clients.per_round everybody who is online is invited")
        return lines


def unused(federation: Federation, config: Config) -> list[str]:
    """What a configuration says for simulations, and a run on machines of its own has no use for; in one line, if anything."""
    found = [name for name in ("devices", "faults") if getattr(config, name) is not None]
    found += ["machine"] if any(kind.settings.machine != DeviceConfig() for kind in federation.cards.kinds) else []
    found += ["cohort.partial_work"] if config.cohort.partial_work else []
    return [f"not used, as nobody's time is simulated: {', '.join(found)}"] if found else []
