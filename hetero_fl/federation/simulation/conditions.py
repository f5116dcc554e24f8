"""Conditions of a run: whether time is simulated, and settings that have no effect."""

from __future__ import annotations

from itertools import islice

from hetero_fl.config.schema import Config
from hetero_fl.config.simulation import CohortConfig, DeviceConfig, FaultsConfig
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.simulation.devices import Devices

# Maximum number of clients for which a deadline is checked.
MAX_CHECKED = 1000


def is_simulated(federation: FederationSpec, config: Config) -> bool:
    """Return whether the tasks of a run take simulated time or fail at random.

    Time is always simulated in asynchronous runs, unless clients are on other machines.
    """
    if federation.data.is_distributed:
        return False
    settings = (config.devices, config.faults, config.cohort.deadline)
    has_settings = has_own_machines(federation) or any(s is not None for s in settings)
    return has_settings or config.runtime.mode == "async"


def simulation_notes(federation: FederationSpec, config: Config) -> list[str]:
    """Return messages about settings that have no effect or probably an unintended effect.

    The result is empty if clients are on other machines.

    Args:
        federation: The federation.
        config: The configuration.
    """
    if federation.data.is_distributed:
        return []
    policy = config.cohort
    faults = config.faults or FaultsConfig()
    devices = Devices(federation, config.devices)
    timing = list(devices.timing_of_profiles())
    by_availability = policy.sampling == "available"
    waits_for_all = policy.deadline is None and policy.over_selection == 1
    always_online = all(is_always_online for _, _, is_always_online in timing)
    takes_time = any(tasks_take_time for _, tasks_take_time, _ in timing)
    is_instant = always_online and not takes_time and faults == FaultsConfig()
    rules = [
        (
            waits_for_all and faults.late > 0,
            "faults.late: without cohort.deadline or cohort.over_selection, a round waits for "
            "late uploads",
        ),
        (
            by_availability and config.clients.per_round is None,
            "cohort.sampling: without clients.per_round, all online clients are sampled",
        ),
        (
            by_availability and always_online,
            "cohort.sampling: available is equivalent to uniform, because all clients are "
            "always online; set devices.availability",
        ),
        (
            policy.deadline is not None and is_instant,
            "cohort.deadline: has no effect, because tasks take no time; set devices.speed, "
            "devices.up or devices.down",
        ),
        (
            faults.delay != FaultsConfig().delay and not faults.late,
            "faults.delay: has no effect, because faults.late is 0",
        ),
    ]
    return [line for applies, line in rules if applies] + _unreachable_deadline(devices, policy)


def _unreachable_deadline(devices: Devices, policy: CohortConfig) -> list[str]:
    """Return a list with a message if no client can finish training before the deadline."""
    if policy.deadline is None:
        return []
    shortest = min(
        devices.training_seconds(client_id, 0)
        for client_id in islice(devices.federation.client_infos, MAX_CHECKED)
    )
    if shortest <= policy.deadline:
        return []
    return [
        f"cohort.deadline: no client can meet {policy.deadline:g} s; training takes the "
        f"fastest client {shortest:.3g} s"
    ]


def has_own_machines(federation: FederationSpec) -> bool:
    """Return whether the settings of any client describe a device."""
    profiles = federation.client_infos.profiles
    return any(profile.settings.machine != DeviceConfig() for profile in profiles)


def unused_simulation_keys(federation: FederationSpec, config: Config) -> list[str]:
    """Return a message about the simulation settings, which have no effect in a deployment.

    The message is returned as a list of one element. If there are no such settings, the list is
    empty.

    Args:
        federation: The federation.
        config: The configuration of the deployment.
    """
    unused = [name for name in ("devices", "faults") if getattr(config, name) is not None]
    if has_own_machines(federation):
        unused.append("machine")
    return [f"{', '.join(unused)}: no effect, because time is not simulated"] if unused else []
