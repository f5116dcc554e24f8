"""Functions that prepare, run, compare, evaluate, audit, export and join federated runs."""

from hetero_fl.experiment.auditing.audit import audit
from hetero_fl.experiment.comparison.compare import compare
from hetero_fl.experiment.evaluation import evaluate
from hetero_fl.experiment.exporting.export import export
from hetero_fl.experiment.joining.join import join
from hetero_fl.experiment.preparation import PreparedRun, prepare
from hetero_fl.experiment.runner import run

__all__ = ["PreparedRun", "audit", "compare", "evaluate", "export", "join", "prepare", "run"]
