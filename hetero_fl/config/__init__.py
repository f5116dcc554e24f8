"""The configuration of a run: a typed schema, and its loading from files and dictionaries."""

from hetero_fl.config.describe import describe_difference, dump, resolve_config, resume_relevant
from hetero_fl.config.population import expand_population
from hetero_fl.config.schema import Config

__all__ = [
    "Config",
    "describe_difference",
    "dump",
    "expand_population",
    "resolve_config",
    "resume_relevant",
]
