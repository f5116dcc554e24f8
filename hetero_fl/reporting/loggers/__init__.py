"""Loggers, which write each round of a run to a file or to an experiment tracker.

Importing this package registers the built-in loggers in `register_logger`.
"""

from hetero_fl.reporting.loggers.base import LoggedRun, Logger, register_logger, round_scalars
from hetero_fl.reporting.loggers.csv_table import CSVLogger
from hetero_fl.reporting.loggers.mlflow_run import MLflowLogger
from hetero_fl.reporting.loggers.run_loggers import (
    RunLoggers,
    check_loggers,
    make_logger,
    make_loggers,
)
from hetero_fl.reporting.loggers.tensorboard_events import TensorBoardLogger
from hetero_fl.reporting.loggers.wandb_run import WandbLogger

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
