"""Which executor carries out a run: by name, or by a rule from what is known before the run."""

from __future__ import annotations

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.channel.protocol import Direct
from hetero_fl.config.schema import RuntimeConfig
from hetero_fl.runtime.executor import Executor, InProcess
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.remember import Remembering
from hetero_fl.runtime.serial import Serial
from hetero_fl.runtime.site import Site
from hetero_fl.runtime.store import Store


def make_executor(
    config: RuntimeConfig,
    algorithm: Algorithm,
    federation: Federation,
    device: torch.device,
    store: Store | None = None,
) -> Executor:
    """The executor of a configuration."""
    performer = Remembering(Serial(device))
    return InProcess(Site(algorithm, federation, store or Store(), performer, Direct()))
