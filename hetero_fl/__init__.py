"""Federated learning with heterogeneous models.

`Federation` trains clients with their own models and data; `run` and `compare` do the same for a
configuration file.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hetero_fl.utils.version import __version__ as __version__

if TYPE_CHECKING:
    from hetero_fl.algorithms import (
        DSFL,
        FD,
        FML,
        Algorithm,
        Centralized,
        Dense,
        Ditto,
        Ensemble,
        FedAdam,
        FedAsync,
        FedAvg,
        FedAvgFT,
        FedAvgM,
        FedBABU,
        FedBN,
        FedBuff,
        FedDF,
        FedGen,
        FedGH,
        FedGKT,
        FedKD,
        FedLC,
        FedMD,
        FedMRL,
        FedNova,
        FedPer,
        FedProto,
        FedProx,
        FedRep,
        FedTGP,
        FedYogi,
        HeteroFL,
        Hybrid,
        KTpFL,
        LGFedAvg,
        Local,
        Needs,
        Scaffold,
        local_fit,
        register_algorithm,
    )
    from hetero_fl.config.clients import (
        AugmentConfig as Augment,
        ClientSettings,
        PreprocessConfig as Preprocess,
        ScannerConfig as Scanner,
    )
    from hetero_fl.config.communication import ChannelConfig as Channel
    from hetero_fl.config.optimizers import SGD, Adam, AdamW
    from hetero_fl.config.partitions import IID, Classes, Dirichlet, Natural, Partition, Quantity
    from hetero_fl.config.privacy import PrivacyConfig as Privacy
    from hetero_fl.config.robustness import (
        AggregationConfig as Aggregation,
        AttacksConfig as Attacks,
    )
    from hetero_fl.config.schema import (
        EvaluationConfig as Evaluation,
        OutputConfig as Output,
        RuntimeConfig as Runtime,
        ServerConfig as Server,
    )
    from hetero_fl.config.simulation import (
        CohortConfig as Cohort,
        DeviceConfig as Device,
        DevicesConfig as Devices,
        FaultsConfig as Faults,
    )
    from hetero_fl.core.objectives import Objective
    from hetero_fl.core.payload import Item, ItemSpec
    from hetero_fl.core.plan import ClassSums, Fit, Predict, Rows
    from hetero_fl.core.task import Task
    from hetero_fl.data import from_arrays, register_partition, register_source
    from hetero_fl.experiment import audit, compare, evaluate, export, join, prepare, run
    from hetero_fl.experiment.client import Client, split
    from hetero_fl.experiment.configuration import load_config
    from hetero_fl.experiment.federation import Federation
    from hetero_fl.experiment.trainer import Trainer
    from hetero_fl.reporting.comparison.result import Comparison
    from hetero_fl.reporting.loggers import Logger, register_logger
    from hetero_fl.reporting.run import Run
    from hetero_fl.utils.errors import UserError
    from model_zoo import SplitModel, register_model

__all__ = [
    "DSFL",
    "FD",
    "FML",
    "IID",
    "SGD",
    "Adam",
    "AdamW",
    "Aggregation",
    "Algorithm",
    "Attacks",
    "Augment",
    "Centralized",
    "Channel",
    "ClassSums",
    "Classes",
    "Client",
    "ClientSettings",
    "Cohort",
    "Comparison",
    "Dense",
    "Device",
    "Devices",
    "Dirichlet",
    "Ditto",
    "Ensemble",
    "Evaluation",
    "Faults",
    "FedAdam",
    "FedAsync",
    "FedAvg",
    "FedAvgFT",
    "FedAvgM",
    "FedBABU",
    "FedBN",
    "FedBuff",
    "FedDF",
    "FedGH",
    "FedGKT",
    "FedGen",
    "FedKD",
    "FedLC",
    "FedMD",
    "FedMRL",
    "FedNova",
    "FedPer",
    "FedProto",
    "FedProx",
    "FedRep",
    "FedTGP",
    "FedYogi",
    "Federation",
    "Fit",
    "HeteroFL",
    "Hybrid",
    "Item",
    "ItemSpec",
    "KTpFL",
    "LGFedAvg",
    "Local",
    "Logger",
    "Natural",
    "Needs",
    "Objective",
    "Output",
    "Partition",
    "Predict",
    "Preprocess",
    "Privacy",
    "Quantity",
    "Rows",
    "Run",
    "Runtime",
    "Scaffold",
    "Scanner",
    "Server",
    "SplitModel",
    "Task",
    "Trainer",
    "UserError",
    "audit",
    "compare",
    "evaluate",
    "export",
    "from_arrays",
    "join",
    "load_config",
    "local_fit",
    "prepare",
    "register_algorithm",
    "register_logger",
    "register_model",
    "register_partition",
    "register_source",
    "run",
    "split",
]

# Public names by module, `Original:Public` if they differ. All others are in hetero_fl.algorithms.
_PUBLIC_NAMES = {
    "hetero_fl.config.clients": [
        "AugmentConfig:Augment",
        "ClientSettings",
        "PreprocessConfig:Preprocess",
        "ScannerConfig:Scanner",
    ],
    "hetero_fl.config.communication": ["ChannelConfig:Channel"],
    "hetero_fl.config.optimizers": ["SGD", "Adam", "AdamW"],
    "hetero_fl.config.partitions": [
        "IID",
        "Classes",
        "Dirichlet",
        "Natural",
        "Partition",
        "Quantity",
    ],
    "hetero_fl.config.privacy": ["PrivacyConfig:Privacy"],
    "hetero_fl.config.robustness": ["AggregationConfig:Aggregation", "AttacksConfig:Attacks"],
    "hetero_fl.config.schema": [
        "EvaluationConfig:Evaluation",
        "OutputConfig:Output",
        "RuntimeConfig:Runtime",
        "ServerConfig:Server",
    ],
    "hetero_fl.config.simulation": [
        "CohortConfig:Cohort",
        "DeviceConfig:Device",
        "DevicesConfig:Devices",
        "FaultsConfig:Faults",
    ],
    "hetero_fl.core.objectives": ["Objective"],
    "hetero_fl.core.payload": ["Item", "ItemSpec"],
    "hetero_fl.core.plan": ["ClassSums", "Fit", "Predict", "Rows"],
    "hetero_fl.core.task": ["Task"],
    "hetero_fl.data": ["from_arrays", "register_partition", "register_source"],
    "hetero_fl.experiment": ["audit", "compare", "evaluate", "export", "join", "prepare", "run"],
    "hetero_fl.experiment.client": ["Client", "split"],
    "hetero_fl.experiment.federation": ["Federation"],
    "hetero_fl.experiment.preparation": ["load_config"],
    "hetero_fl.experiment.trainer": ["Trainer"],
    "hetero_fl.reporting.comparison.result": ["Comparison"],
    "hetero_fl.reporting.loggers": ["Logger", "register_logger"],
    "hetero_fl.reporting.run": ["Run"],
    "hetero_fl.utils.errors": ["UserError"],
    "model_zoo": ["SplitModel", "register_model"],
}
_LOCATIONS = {
    name.rpartition(":")[2]: (module, name.partition(":")[0])
    for module, names in _PUBLIC_NAMES.items()
    for name in names
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    # Public names are imported on first use, so that `import hetero_fl` is fast.
    if name not in __all__:
        raise AttributeError(f"module 'hetero_fl' has no attribute {name!r}")
    module, original = _LOCATIONS.get(name, ("hetero_fl.algorithms", name))
    return getattr(import_module(module), original)
