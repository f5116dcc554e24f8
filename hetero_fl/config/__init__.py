"""The configuration: one typed schema, loaded from YAML, JSON or a dictionary."""

from hetero_fl.config.describe import deciding, difference, dump, resolved
from hetero_fl.config.population import expand
from hetero_fl.config.schema import Config

__all__ = ["Config", "deciding", "difference", "dump", "expand", "resolved"]
