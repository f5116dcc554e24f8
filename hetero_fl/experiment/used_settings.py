"""Settings of compared methods that differ from the defaults, with the origin of each setting.

The origin of a setting is a text that says where the setting was set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hetero_fl.algorithms import register_algorithm
from hetero_fl.config.schema import CLIENT_OPTIONS, Config
from hetero_fl.experiment.configuration import load_config, raw_algorithm_section
from hetero_fl.reporting.comparison.facts import Setting, UsedSettings
from hetero_fl.reporting.formatting import algorithm_base, algorithm_name
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.code_permission import AllowCode

if TYPE_CHECKING:
    from hetero_fl.experiment.comparison.jobs import Point, Source, Variant

METHOD_DEFAULT = "default of the method"
"""Origin of client options that a method enables by default."""

SECTION = "algorithm"
# Keys of client settings, mapped to the equivalent keys of the algorithm section.
CLIENT_KEYS = {f"clients.defaults.{name}": f"{SECTION}.{name}" for name in CLIENT_OPTIONS}


def used_settings(
    source: Source,
    base: Sequence[str],
    points: Mapping[Variant, Point],
    origins: Mapping[str, str],
    *,
    file: str = "the configuration",
    grid: str = "grid",
    allow_code: AllowCode = False,
) -> UsedSettings:
    """Return the settings of each variant that differ from the method's defaults.

    Args:
        source: The configuration of the comparison.
        base: Overrides for all runs.
        points: The grid point of each variant, which is empty without a grid.
        origins: Origins of variants and overrides that were not set in the call, such as the name
            of a study. The keys are labels of variants and overrides.
        file: Name of the configuration file.
        grid: Origin of the settings of a grid point.
        allow_code: Whether code that a file refers to may be executed (see
            `hetero_fl.load_config`).

    Returns:
        The settings with their origins, in the order of the origins.
    """
    section = f"{SECTION} section of {file}"
    client_section = f"clients section of {file}"
    in_clients = set(CLIENT_OPTIONS) - set(raw_algorithm_section(source))
    methods = []
    for variant, point in points.items():
        written = [(override, origins.get(override, "override")) for override in base]
        written += [
            (override, origins.get(variant.label, "variant")) for override in variant.overrides
        ]
        written += [(override, grid) for override in point]
        config = load_config(source, [override for override, _ in written], allow_code)
        settings = config.algorithm | _client_options(config)
        # A user-defined method may have settings without a default, which validation would reject.
        defaults = register_algorithm[settings["name"]].model_construct().model_dump()
        found = [
            Setting(
                key,
                _format_setting(value),
                _origin(
                    f"{SECTION}.{key}", written, client_section if key in in_clients else section
                ),
            )
            for key, value in settings.items()
            if key != "name" and value != defaults.get(key)
        ]
        # Add keys of other sections that only this variant or the grid sets.
        for override, origin in written[len(base) :]:
            key, _, value = override.partition("=")
            if key.partition(".")[0] != SECTION and key not in CLIENT_KEYS:
                found.append(Setting(key, value, origin))
        order = [section, client_section, *(origin for _, origin in written)]
        methods.append(
            (variant.label, tuple(sorted(found, key=lambda setting: order.index(setting.origin))))
        )
    return UsedSettings(
        tuple(methods), _note(source, section, [variant.label for variant in points])
    )


def add_method_defaults(settings: UsedSettings, runs: Mapping[str, RunDirectory]) -> UsedSettings:
    """Add the client options that methods enable by default, such as logit adjustment in Hybrid.

    Args:
        settings: The settings from `used_settings`.
        runs: One finished run of each method, keyed by the label of the method. Methods without a
            run remain unchanged.

    Returns:
        The settings of each method. The added options come first.
    """
    methods = []
    for label, found in settings.methods:
        options = _method_options(runs[label]) if label in runs else {}
        added = [
            Setting(name, _format_setting(value), METHOD_DEFAULT)
            for name, value in options.items()
            if name not in {setting.key for setting in found}
        ]
        methods.append((label, (*added, *found)))
    return UsedSettings(tuple(methods), settings.note)


def _method_options(run: RunDirectory) -> dict[str, Any]:
    """Return the client options that the method set for all clients of a run."""
    clients = run.config().get("clients") or {}
    sections = [clients.get("defaults") or {}]
    for key in ("groups", "overrides"):
        sections += clients.get(key) or []
    used = [client.get("settings", {}) for client in run.details()["clients"].values()]
    first = used[0] if used else {}
    return {
        name: first[name]
        for name in CLIENT_OPTIONS
        if name in first
        and all(settings.get(name) == first[name] for settings in used)
        and not any(section.get(name) is not None for section in sections)
    }


def _client_options(config: Config) -> dict[str, Any]:
    """Return the client options in `clients.defaults` that are not None."""
    defaults = config.clients.defaults
    options = {name: getattr(defaults, name, None) for name in CLIENT_OPTIONS}
    return {name: value for name, value in options.items() if value is not None}


def _origin(key: str, overrides: Sequence[tuple[str, str]], otherwise: str) -> str:
    """Return the origin of a key.

    Args:
        key: The key.
        overrides: Pairs of an override and its origin.
        otherwise: Origin of the key if no override sets the key or a part of its value.
    """
    for override, origin in reversed(overrides):
        written_key = override.partition("=")[0]
        target = CLIENT_KEYS.get(written_key, written_key)
        if target in (SECTION, key) or target.startswith(f"{key}."):
            return origin
    return otherwise


def _format_setting(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_format_setting, value))}]"
    return "none" if value is None else str(value)


def _note(source: Source, section: str, labels: Sequence[str]) -> str:
    """Explain which method uses the settings in the algorithm section of the configuration.

    The text is empty if the section has no settings.
    """
    written = raw_algorithm_section(source)
    settings = ", ".join(
        f"{key} = {_format_setting(value)}" for key, value in written.items() if key != "name"
    )
    name = written.get("name")
    if not settings or not isinstance(name, str):
        return ""
    method = algorithm_name(name)
    subject = f"The settings in the {section}"
    if name in map(algorithm_base, labels):
        return f"{subject} apply to {method} only; all other methods use their defaults."
    return (
        f"{subject} ({settings}) belong to {method}, which is not compared: "
        "all methods use their defaults."
    )
