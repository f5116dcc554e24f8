"""Runs, comparisons, scorings, audits and exports, from Python. The one place that knows every room."""

from hetero_fl.experiment.auditing.audit import audit
from hetero_fl.experiment.comparison import compare
from hetero_fl.experiment.exporting.export import export
from hetero_fl.experiment.joining import join
from hetero_fl.experiment.prepared import Prepared, prepare
from hetero_fl.experiment.scoring import evaluate
from hetero_fl.experiment.single import run

__all__ = ["Prepared", "audit", "compare", "evaluate", "export", "join", "prepare", "run"]
