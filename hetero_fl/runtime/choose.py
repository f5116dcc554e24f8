"""Which executor carries out a run: by name, or by a rule from what is known before the run."""

from __future__ import annotations

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.channel.protocol import Direct
from hetero_fl.config.schema import RuntimeConfig
from hetero_fl.runtime.crews.processes import Processes
from hetero_fl.runtime.executor import Executor, InProcess
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.jobs import Setup
from hetero_fl.runtime.performers import make_performer
from hetero_fl.runtime.site import Site
from hetero_fl.runtime.store import Store
from hetero_fl.runtime.workers import Workers


def make_executor(
    config: RuntimeConfig,
    algorithm: Algorithm,
    federation: Federation,
    device: torch.device,
    store: Store | None = None,
) -> Executor:
    """The executor of a configuration."""
    store, performer = store or Store(), make_performer(device)
    if config.executor == "processes":
        setup = Setup(algorithm, federation, config.threads or 1, (str(device),), torch.get_default_dtype())
        return Workers(Processes(setup, config.workers), federation.cards, store, performer)
    return InProcess(Site(algorithm, federation, store, performer, Direct()))
