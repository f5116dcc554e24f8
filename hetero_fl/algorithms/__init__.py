"""Federated learning methods, one module per method or family of methods.

Importing this package registers all methods in `register_algorithm`.
"""

from hetero_fl.algorithms.averaging import FedAvg, FedAvgFT, FedLC, FedNova, FedProx, Scaffold
from hetero_fl.algorithms.base import STUDENT, Algorithm, AsyncPolicy, Needs, register_algorithm
from hetero_fl.algorithms.baselines import Centralized, Ensemble, Local
from hetero_fl.algorithms.data_free import Dense, FedGen
from hetero_fl.algorithms.distillation import ProxyDistillation, ProxyTraining
from hetero_fl.algorithms.heterofl import HeteroFL
from hetero_fl.algorithms.hybrid import FedDF, Hybrid
from hetero_fl.algorithms.mutual import FML, FedKD, FedMRL, MenteeTraining
from hetero_fl.algorithms.personalization import Ditto, FedBABU, FedBN, FedPer, FedRep, LGFedAvg
from hetero_fl.algorithms.prediction import add_log_prior, adjust_to_labels, log_scores
from hetero_fl.algorithms.prototypes import FD, FedGH, FedProto, FedTGP
from hetero_fl.algorithms.proxy_distillation import DSFL, FedMD, KTpFL
from hetero_fl.algorithms.round_parts import (
    Items,
    SharedPart,
    average_models,
    load_model,
    local_fit,
    may_share,
    send_model,
    upload_model,
)
from hetero_fl.algorithms.server_updates import FedAdam, FedAsync, FedAvgM, FedBuff, FedYogi
from hetero_fl.algorithms.split import FedGKT

__all__ = [
    "DSFL",
    "FD",
    "FML",
    "STUDENT",
    "Algorithm",
    "AsyncPolicy",
    "Centralized",
    "Dense",
    "Ditto",
    "Ensemble",
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
    "HeteroFL",
    "Hybrid",
    "Items",
    "KTpFL",
    "LGFedAvg",
    "Local",
    "MenteeTraining",
    "Needs",
    "ProxyDistillation",
    "ProxyTraining",
    "Scaffold",
    "SharedPart",
    "add_log_prior",
    "adjust_to_labels",
    "average_models",
    "load_model",
    "local_fit",
    "log_scores",
    "may_share",
    "register_algorithm",
    "send_model",
    "upload_model",
]
