"""Trace one round: the modules that it enters, and the frames down to a training step."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType

import hetero_fl

ROOT = Path(__file__).parents[2]


class RoundTracer:
    """A profile function that records calls into the package during the third round.

    Attributes:
        modules: Files of the package that the round entered.
        depth: Largest number of frames of the package between the round and a training step.
    """

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self.depth = 0
        self._is_active = False

    def __call__(self, frame: FrameType, event: str, _value: object) -> None:
        if event == "call" and self._is_active:
            code = frame.f_code
            if "/hetero_fl/" in code.co_filename:
                self.modules.add(code.co_filename)
            elif code.co_name == "backward" and code.co_filename.endswith("_tensor.py"):
                self.depth = max(self.depth, _depth(frame))

    def after_round(self, record: dict[str, object]) -> None:
        """Record the next round only if it is the third."""
        self._is_active = record["round"] == 2


def _depth(frame: FrameType | None) -> int:
    depth = 0
    while frame is not None and frame.f_code.co_name != "run_round":
        depth += "/hetero_fl/" in frame.f_code.co_filename
        frame = frame.f_back
    return depth


def trace_round(method: str, out: Path) -> RoundTracer:
    """Run four rounds of `digits_quickstart` with a method, and trace the third.

    Args:
        method: Name of the method.
        out: The run directory.
    """
    tracer = RoundTracer()
    overrides = [
        "rounds=4",
        "evaluation.every=4",
        f"algorithm.name={method}",
        "runtime.executor=serial",
        "runtime.threads=1",
        "output.plots=false",
        "output.report=false",
    ]
    sys.setprofile(tracer)
    threading.setprofile(tracer)
    try:
        hetero_fl.run(
            ROOT / "configs" / "digits_quickstart.yaml",
            out=out,
            callbacks=[tracer.after_round],
            overrides=overrides,
            quiet=True,
        )
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert tracer.depth > 0, "no call of Tensor.backward was seen"
    return tracer
