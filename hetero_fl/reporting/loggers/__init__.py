"""Loggers, which write each round of a run to a file or to an experiment tracker.

Importing this package registers the built-in loggers in `register_logger`.
"""

from hetero_fl.reporting.loggers.base import LoggedRun, Logger, register_logger, round_scalars
from hetero_fl.reporting.loggers.built_in import (
    CSVLogger,
    MLflowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from hetero_fl.reporting.loggers.run_loggers import (
    RunLoggers,
    check_loggers,
    make_logger,
    make_loggers,
)

__all__ = [
    "CSVLogger",
    "LoggedRun",
    "Logger",
    "MLflowLogger",
    "RunLoggers",
    "TensorBoardLogger",
    "WandbLogger",
    "check_loggers",
    "make_logger",
    "make_loggers",
    "register_logger",
    "round_scalars",
]
