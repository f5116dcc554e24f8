"""The configuration: one typed schema, loaded from YAML, JSON or a dictionary."""

from hetero_fl.config.load import dump, first_difference, load_config
from hetero_fl.config.roster import expand
from hetero_fl.config.schema import Config

__all__ = ["Config", "dump", "expand", "first_difference", "load_config"]
