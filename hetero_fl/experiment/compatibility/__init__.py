"""Checks of settings and user-defined functions before training.

The rules in `RULES_ON_LOADING` are checked before data is loaded. The rules in
`RULES_AFTER_PREPARATION` are checked after the data is loaded and the models are specified. The
notes in `NOTES` and `LATER_NOTES` are written to the log.
"""

from hetero_fl.experiment.compatibility.config_facts import ConfigFacts
from hetero_fl.experiment.compatibility.notes import LATER_NOTES, NOTES, compatibility_notes
from hetero_fl.experiment.compatibility.rule import CompatibilityRule, check_rules
from hetero_fl.experiment.compatibility.rules import RULES_AFTER_PREPARATION, check_compatibility
from hetero_fl.experiment.compatibility.rules_on_loading import RULES_ON_LOADING
from hetero_fl.experiment.compatibility.run_facts import RunFacts
from hetero_fl.experiment.compatibility.user_code import check_user_code

__all__ = [
    "LATER_NOTES",
    "NOTES",
    "RULES_AFTER_PREPARATION",
    "RULES_ON_LOADING",
    "CompatibilityRule",
    "ConfigFacts",
    "RunFacts",
    "check_compatibility",
    "check_rules",
    "check_user_code",
    "compatibility_notes",
]
