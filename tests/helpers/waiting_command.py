"""The command, whose run waits to be ended when its first round is complete: it cannot be over before a test comes to that."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from hetero_fl.cli import main
from hetero_fl.federation.synchronous import SynchronousTrainer

SIGN = "waits"  # a file in the working folder


def wait() -> None:
    """Until SIGTERM has been heard by whoever hears it; Ctrl-C is heard at once."""
    heard, handler = list[int](), signal.getsignal(signal.SIGTERM)
    assert callable(handler)

    def hear(number: int, frame: FrameType | None) -> None:
        handler(number, frame)
        heard.append(number)

    signal.signal(signal.SIGTERM, hear)
    Path(SIGN).touch()
    while not heard:
        time.sleep(0.02)
    signal.signal(signal.SIGTERM, handler)


def waiting(self: SynchronousTrainer) -> Any:
    if self.completed == 1:
        wait()
    return held(self)


if __name__ == "__main__":
    held, SynchronousTrainer.run_round = SynchronousTrainer.run_round, waiting  # type: ignore[method-assign]
    sys.exit(main())
