"""Partial sharing: one mechanism, told apart by the part of the model that travels."""

from __future__ import annotations

from hetero_fl.algorithms.base import algorithm
from hetero_fl.algorithms.fedavg import FedAvg


@algorithm("fedper")
class FedPer(FedAvg):
    """The backbone is averaged, each client keeps its own head (Arivazhagan et al. 2019)."""

    shared = ("backbone.",)


@algorithm("lg_fedavg")
class LGFedAvg(FedAvg):
    """The head is averaged, each client keeps its own backbone (Liang et al. 2020, LG-FedAvg)."""

    shared = ("head.",)
