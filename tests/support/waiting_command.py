"""The command line, with a run that waits to be stopped after its first round."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from hetero_fl.cli import main
from hetero_fl.federation.trainer import FederatedTrainer

# A file in the working folder.
SIGN = "waits"


def wait() -> None:
    """Wait for SIGTERM, or raise KeyboardInterrupt on Ctrl-C."""
    received, handler = list[int](), signal.getsignal(signal.SIGTERM)
    assert callable(handler)

    def record(number: int, frame: FrameType | None) -> None:
        handler(number, frame)
        received.append(number)

    signal.signal(signal.SIGTERM, record)
    Path(SIGN).touch()
    while not received:
        time.sleep(0.02)
    signal.signal(signal.SIGTERM, handler)


def waiting(self: FederatedTrainer) -> Any:
    if self.completed == 1:
        wait()
    return original_run_round(self)


if __name__ == "__main__":
    original_run_round, FederatedTrainer.run_round = FederatedTrainer.run_round, waiting  # type: ignore[method-assign]
    sys.exit(main())
