"""Rules that bear liars, a short file for each family."""

from hetero_fl.aggregation.rules import coordinates, krum, norms, predictions
from hetero_fl.aggregation.rules.base import Block, PredictionRule, Rule, middle, prediction_rule, rule

__all__ = ["Block", "PredictionRule", "Rule", "middle", "prediction_rule", "rule"]
del coordinates, krum, norms, predictions
