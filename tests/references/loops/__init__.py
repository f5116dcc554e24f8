"""Plain loops: methods for one machine with lists of models, optimizers and tensors.

They take the same gradient steps and forward passes as the framework, in the same batches, with
fused optimizers and the same memory layout, but share no rule of a method with it. Tests compare
losses and scores, and benchmarks steps and operations. They omit encoding, transfer and isolation.
"""

from __future__ import annotations

from collections.abc import Mapping

from tests.references.loops import (
    asynchronous,
    averaging,
    bounds,
    distillation,
    features,
    mutual,
    personalization,
)
from tests.references.loops.base import Loop

REFERENCES: Mapping[str, type[Loop]] = {
    "local": Loop,
    "ensemble": bounds.Ensemble,
    "centralized": bounds.Centralized,
    "fedavg": averaging.FedAvg,
    "fedavg_ft": averaging.FedAvg,
    "fedlc": averaging.FedLC,
    "fedprox": averaging.FedProx,
    "fedavgm": averaging.FedAvgM,
    "fedadam": averaging.FedAdam,
    "fedyogi": averaging.FedYogi,
    "scaffold": averaging.Scaffold,
    "fednova": averaging.FedNova,
    "fedasync": asynchronous.FedAsync,
    "fedbuff": asynchronous.FedBuff,
    "fedbn": personalization.FedBN,
    "fedper": personalization.FedPer,
    "fedrep": personalization.FedRep,
    "fedbabu": personalization.FedBABU,
    "lg_fedavg": personalization.LGFedAvg,
    "ditto": personalization.Ditto,
    "heterofl": averaging.HeteroFL,
    "fedmd": distillation.FedMD,
    "feddf": distillation.FedDF,
    "ds_fl": distillation.DSFL,
    "kt_pfl": distillation.KTpFL,
    "hybrid": distillation.Hybrid,
    "fd": features.FD,
    "fedproto": features.FedProto,
    "fedtgp": features.FedTGP,
    "fedgh": features.FedGH,
    "fedgkt": features.FedGKT,
    "fedgen": features.FedGen,
    "fml": mutual.FML,
    "fedkd": mutual.FedKD,
    "fedmrl": mutual.FedMRL,
    "dense": bounds.Dense,
}
