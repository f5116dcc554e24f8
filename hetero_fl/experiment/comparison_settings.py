"""Which settings each method of a comparison gets, and from where: file, override, variant, study or grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from hetero_fl.algorithms import Algorithm, algorithm
from hetero_fl.config import load_config
from hetero_fl.config.load import written_algorithm
from hetero_fl.experiment.jobs import Point, Source, Variant
from hetero_fl.own_code import CodePermission
from hetero_fl.reporting.comparison_settings import Setting, UsedSettings
from hetero_fl.reporting.wording import algorithm_base, algorithm_name

SECTION = "algorithm"


def used_settings(
    source: Source,
    base: Sequence[str],
    points: Mapping[Variant, Point],
    origins: Mapping[str, str],
    file: str = "the configuration",
    grid: str = "grid",
    allow_code: bool | CodePermission = False,
) -> UsedSettings:
    """Return the settings of every variant that differ from its method's defaults.

    Args:
        source: The configuration of the comparison.
        base: Overrides that hold for every run.
        points: The grid point of each variant; empty without a grid.
        origins: Where labels of variants and overrides were written, if not in the call: a study's name, say.
        file: What the configuration is called.
        grid: What settings of a grid point are said to come from.
        allow_code: Whether code that the configuration names may run (see `hetero_fl.load_config`).
    """
    section = f"{SECTION} section of {file}"
    methods = []
    for variant, point in points.items():
        written = [(override, origins.get(override, "override")) for override in base]
        written += [(override, origins.get(variant.label, "variant")) for override in variant.overrides]
        written += [(override, grid) for override in point]
        settings = load_config(source, [override for override, _ in written], allow_code).algorithm
        defaults = _defaults(settings["name"])
        found = [
            Setting(key, _plain(value), _origin(f"{SECTION}.{key}", written, section))
            for key, value in settings.items()
            if key != "name" and value != defaults.get(key)
        ]
        # Keys of other sections that only this variant or the grid sets.
        for override, origin in written[len(base) :]:
            key, _, value = override.partition("=")
            if key.partition(".")[0] != SECTION:
                found.append(Setting(key, value, origin))
        order = [section, *(origin for _, origin in written)]
        methods.append((variant.label, tuple(sorted(found, key=lambda setting: order.index(setting.origin)))))
    return UsedSettings(tuple(methods), _note(source, section, [variant.label for variant in points]))


def _defaults(name: str) -> dict[str, Any]:
    kind: type[Algorithm] = algorithm[name]
    try:
        return kind().model_dump()
    except ValidationError:  # a custom method with a required setting
        return kind.model_construct().model_dump()


def _origin(key: str, written: Sequence[tuple[str, str]], otherwise: str) -> str:
    """Return the origin of the last override that sets the key or a part of it."""
    for override, origin in reversed(written):
        named = override.partition("=")[0]
        if named in (SECTION, key) or named.startswith(f"{key}."):
            return origin
    return otherwise


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _note(source: Source, section: str, labels: Sequence[str]) -> str:
    """Return a sentence on which method the configuration's own settings went to; empty if it has none."""
    written = written_algorithm(source)
    own = ", ".join(f"{key} = {_plain(value)}" for key, value in written.items() if key != "name")
    name = written.get("name")
    if not own or not isinstance(name, str):
        return ""
    method, told = algorithm_name(name), f"The settings in the {section} ({own})"
    if name in map(algorithm_base, labels):
        return f"{told} were applied to {method} only; every other method starts from its own defaults."
    return f"{told} are those of {method}, which is not compared: every method starts from its own defaults."
