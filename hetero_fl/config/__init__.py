"""The configuration: one typed schema, loaded from YAML, JSON or a dictionary."""

from hetero_fl.config.load import load_config
from hetero_fl.config.record import deciding, difference, dump, resolved
from hetero_fl.config.roster import expand
from hetero_fl.config.schema import Config

__all__ = ["Config", "deciding", "difference", "dump", "expand", "load_config", "resolved"]
