"""Federated learning methods, one module per method or family of methods.

Importing this package registers all methods in `register_algorithm`.
"""

from hetero_fl.algorithms.asynchronous import FedAsync, FedBuff
from hetero_fl.algorithms.base import (
    STUDENT,
    Algorithm,
    AsyncPolicy,
    Items,
    Needs,
    SharedPart,
    average_models,
    may_share,
    register_algorithm,
    upload_model,
)
from hetero_fl.algorithms.baselines import Centralized, Ensemble, Local
from hetero_fl.algorithms.data_free import Dense, FedGen
from hetero_fl.algorithms.ds_fl import DSFL
from hetero_fl.algorithms.fd import FD
from hetero_fl.algorithms.fedavg import FedAvg, FedAvgFT, FedNova, FedProx
from hetero_fl.algorithms.feddf import FedDF
from hetero_fl.algorithms.fedgkt import FedGKT
from hetero_fl.algorithms.fedlc import FedLC
from hetero_fl.algorithms.fedmd import FedMD
from hetero_fl.algorithms.fedopt import FedAdam, FedAvgM, FedYogi
from hetero_fl.algorithms.heterofl import HeteroFL
from hetero_fl.algorithms.hybrid import Hybrid
from hetero_fl.algorithms.kt_pfl import KTpFL
from hetero_fl.algorithms.local_training import add_log_prior, local_fit
from hetero_fl.algorithms.mutual import FML, FedKD, FedMRL
from hetero_fl.algorithms.personalization import Ditto, FedBABU, FedBN, FedPer, FedRep, LGFedAvg
from hetero_fl.algorithms.prototypes import FedGH, FedProto, FedTGP
from hetero_fl.algorithms.scaffold import Scaffold

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
    "Needs",
    "Scaffold",
    "SharedPart",
    "add_log_prior",
    "average_models",
    "local_fit",
    "may_share",
    "register_algorithm",
    "upload_model",
]
