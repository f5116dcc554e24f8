"""Checks of settings and user-defined functions before training.

Features exclude each other, and rules concern the values of settings. Both are functions of the
facts of a run, and are checked as early as these are known: before data is loaded, or before
training.
"""

from hetero_fl.experiment.compatibility.config_facts import Facts
from hetero_fl.experiment.compatibility.rules import check, notes
from hetero_fl.experiment.compatibility.run_facts import RunFacts
from hetero_fl.experiment.compatibility.user_code import check_user_code, check_user_method

__all__ = ["Facts", "RunFacts", "check", "check_user_code", "check_user_method", "notes"]
