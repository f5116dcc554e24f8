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
        DSFL as DSFL,
    )
    from hetero_fl.algorithms import (
        FD as FD,
    )
    from hetero_fl.algorithms import (
        FML as FML,
    )
    from hetero_fl.algorithms import (
        Algorithm as Algorithm,
    )
    from hetero_fl.algorithms import (
        Centralized as Centralized,
    )
    from hetero_fl.algorithms import (
        Dense as Dense,
    )
    from hetero_fl.algorithms import (
        Ditto as Ditto,
    )
    from hetero_fl.algorithms import (
        Ensemble as Ensemble,
    )
    from hetero_fl.algorithms import (
        FedAdam as FedAdam,
    )
    from hetero_fl.algorithms import (
        FedAsync as FedAsync,
    )
    from hetero_fl.algorithms import (
        FedAvg as FedAvg,
    )
    from hetero_fl.algorithms import (
        FedAvgFT as FedAvgFT,
    )
    from hetero_fl.algorithms import (
        FedAvgM as FedAvgM,
    )
    from hetero_fl.algorithms import (
        FedBABU as FedBABU,
    )
    from hetero_fl.algorithms import (
        FedBN as FedBN,
    )
    from hetero_fl.algorithms import (
        FedBuff as FedBuff,
    )
    from hetero_fl.algorithms import (
        FedDF as FedDF,
    )
    from hetero_fl.algorithms import (
        FedGen as FedGen,
    )
    from hetero_fl.algorithms import (
        FedGH as FedGH,
    )
    from hetero_fl.algorithms import (
        FedGKT as FedGKT,
    )
    from hetero_fl.algorithms import (
        FedKD as FedKD,
    )
    from hetero_fl.algorithms import (
        FedLC as FedLC,
    )
    from hetero_fl.algorithms import (
        FedMD as FedMD,
    )
    from hetero_fl.algorithms import (
        FedMRL as FedMRL,
    )
    from hetero_fl.algorithms import (
        FedNova as FedNova,
    )
    from hetero_fl.algorithms import (
        FedPer as FedPer,
    )
    from hetero_fl.algorithms import (
        FedProto as FedProto,
    )
    from hetero_fl.algorithms import (
        FedProx as FedProx,
    )
    from hetero_fl.algorithms import (
        FedRep as FedRep,
    )
    from hetero_fl.algorithms import (
        FedTGP as FedTGP,
    )
    from hetero_fl.algorithms import (
        FedYogi as FedYogi,
    )
    from hetero_fl.algorithms import (
        HeteroFL as HeteroFL,
    )
    from hetero_fl.algorithms import (
        Hybrid as Hybrid,
    )
    from hetero_fl.algorithms import (
        KTpFL as KTpFL,
    )
    from hetero_fl.algorithms import (
        LGFedAvg as LGFedAvg,
    )
    from hetero_fl.algorithms import (
        Local as Local,
    )
    from hetero_fl.algorithms import (
        Scaffold as Scaffold,
    )
    from hetero_fl.algorithms import (
        register_algorithm as register_algorithm,
    )
    from hetero_fl.config.clients import AugmentConfig as Augment
    from hetero_fl.config.clients import ClientSettings as ClientDefaults
    from hetero_fl.config.clients import PreprocessConfig as Preprocess
    from hetero_fl.config.clients import ScannerConfig as Scanner
    from hetero_fl.config.communication import ChannelConfig as Channel
    from hetero_fl.config.optimizers import SGD, Adam, AdamW
    from hetero_fl.config.partitions import IID, Classes, Dirichlet, Natural, Quantity
    from hetero_fl.config.privacy import PrivacyConfig as Privacy
    from hetero_fl.config.robustness import AggregationConfig as Aggregation
    from hetero_fl.config.robustness import AttacksConfig as Attacks
    from hetero_fl.config.schema import EvaluationConfig as Evaluation
    from hetero_fl.config.schema import OutputConfig as Output
    from hetero_fl.config.schema import RuntimeConfig as Runtime
    from hetero_fl.config.schema import ServerConfig as Server
    from hetero_fl.config.simulation import CohortConfig as Cohort
    from hetero_fl.config.simulation import DeviceConfig as Device
    from hetero_fl.config.simulation import DevicesConfig as Devices
    from hetero_fl.config.simulation import FaultsConfig as Faults
    from hetero_fl.experiment import audit, compare, evaluate, export, join, prepare, run
    from hetero_fl.experiment.client import Client
    from hetero_fl.experiment.federation import Federation
    from hetero_fl.experiment.preparation import load_config
    from hetero_fl.experiment.split import split
    from hetero_fl.experiment.trainer import Trainer
    from hetero_fl.reporting.comparison.result import Comparison
    from hetero_fl.reporting.run import Run
    from model_zoo import SplitModel

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
    "Classes",
    "Client",
    "ClientDefaults",
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
    "HeteroFL",
    "Hybrid",
    "KTpFL",
    "LGFedAvg",
    "Local",
    "Natural",
    "Output",
    "Preprocess",
    "Privacy",
    "Quantity",
    "Run",
    "Runtime",
    "Scaffold",
    "Scanner",
    "Server",
    "SplitModel",
    "Trainer",
    "audit",
    "compare",
    "evaluate",
    "export",
    "join",
    "load_config",
    "prepare",
    "register_algorithm",
    "run",
    "split",
]

# Module of each public name that is not a method, with the name there if it differs.
_MODULES = {
    "audit": "hetero_fl.experiment",
    "compare": "hetero_fl.experiment",
    "evaluate": "hetero_fl.experiment",
    "export": "hetero_fl.experiment",
    "join": "hetero_fl.experiment",
    "prepare": "hetero_fl.experiment",
    "run": "hetero_fl.experiment",
    "Client": "hetero_fl.experiment.client",
    "Comparison": "hetero_fl.reporting.comparison.result",
    "Federation": "hetero_fl.experiment.federation",
    "Trainer": "hetero_fl.experiment.trainer",
    "split": "hetero_fl.experiment.split",
    "load_config": "hetero_fl.experiment.preparation",
    "Run": "hetero_fl.reporting.run",
    "SplitModel": "model_zoo",
    "Augment": "hetero_fl.config.clients:AugmentConfig",
    "ClientDefaults": "hetero_fl.config.clients:ClientSettings",
    "Preprocess": "hetero_fl.config.clients:PreprocessConfig",
    "Privacy": "hetero_fl.config.privacy:PrivacyConfig",
    "Channel": "hetero_fl.config.communication:ChannelConfig",
    "Runtime": "hetero_fl.config.schema:RuntimeConfig",
    "Evaluation": "hetero_fl.config.schema:EvaluationConfig",
    "Output": "hetero_fl.config.schema:OutputConfig",
    "Server": "hetero_fl.config.schema:ServerConfig",
    "Aggregation": "hetero_fl.config.robustness:AggregationConfig",
    "Attacks": "hetero_fl.config.robustness:AttacksConfig",
    "Devices": "hetero_fl.config.simulation:DevicesConfig",
    "Faults": "hetero_fl.config.simulation:FaultsConfig",
    "Cohort": "hetero_fl.config.simulation:CohortConfig",
    "Scanner": "hetero_fl.config.clients:ScannerConfig",
    "Device": "hetero_fl.config.simulation:DeviceConfig",
    "SGD": "hetero_fl.config.optimizers",
    "Quantity": "hetero_fl.config.partitions",
    "Natural": "hetero_fl.config.partitions",
    "IID": "hetero_fl.config.partitions",
    "Dirichlet": "hetero_fl.config.partitions",
    "Classes": "hetero_fl.config.partitions",
    "Adam": "hetero_fl.config.optimizers",
    "AdamW": "hetero_fl.config.optimizers",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    # Public names are imported on first use, so that `import hetero_fl` is fast.
    if name not in __all__:
        raise AttributeError(f"module 'hetero_fl' has no attribute {name!r}")
    module, _, original = _MODULES.get(name, "hetero_fl.algorithms").partition(":")
    return getattr(import_module(module), original or name)
