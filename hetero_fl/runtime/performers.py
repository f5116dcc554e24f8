"""Who computes steps in a process, by name."""

from __future__ import annotations

import torch

from hetero_fl.runtime.plans import Performer
from hetero_fl.runtime.remember import Remembering
from hetero_fl.runtime.serial import Serial


def make_performer(device: torch.device) -> Performer:
    """A performer on that device that does not evaluate equal models twice."""
    return Remembering(Serial(device))
