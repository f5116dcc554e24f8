#!/usr/bin/env python3
"""Measure the overhead per client in addition to training, and the time until the first round.

    python -m benchmarks overhead

For the first measurement, many clients take one step with a linear model in a round with the serial
executor. The overhead is the difference from the same steps in plain PyTorch, divided by the number
of clients. Target: 2 ms. For the second measurement, `scripts/train.py` runs digits_quickstart in a
new process until the line of the first round is printed, including imports and evaluation. Target:
5 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common import arguments, in_turns, parsed, rounds_of
from hetero_fl.data import make_table
from hetero_fl.experiment import PreparedRun, prepare

ROOT = Path(__file__).resolve().parents[2]
BATCH, ROWS, LR = 10, 20, 0.1


def configuration(clients: int) -> dict[str, object]:
    """Return a configuration of FedAvg with logistic regression, one step per round."""
    return {
        "data": {"split": {"validation": 0.0, "test": 0.0}, "test_limit": 50},
        "clients": {
            "count": clients,
            "defaults": {
                "model": "linear",
                "optimizer": {"name": "sgd", "lr": LR},
                "batch_size": BATCH,
                "steps": 1,
            },
        },
        "algorithm": {"name": "fedavg"},
    }


class BareSteps:
    """The training steps in plain PyTorch.

    Args:
        prepared: The run, which provides data and model.
    """

    def __init__(self, prepared: PreparedRun) -> None:
        federation = prepared.federation
        (arch,) = {card.arch for card in federation.client_infos.values()}
        self.rows = [
            federation.data.columns(c, "train", card.preprocess)
            for c, card in federation.client_infos.items()
        ]
        self.module = arch.build()
        self.optimizer = torch.optim.SGD(self.module.parameters(), LR, fused=True)

    def round(self) -> None:
        """Take one step for each client."""
        for rows in self.rows:
            self.optimizer.zero_grad()
            F.cross_entropy(self.module(rows["x"][:BATCH]).logits, rows["y"][:BATCH]).backward()
            self.optimizer.step()


def first_round() -> float:
    """Return the seconds from the start of `scripts/train.py` to the line of the first round.

    Raises:
        SystemExit: If the script ends before the first round.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "scripts" / "train.py")]
        command += [
            "--config",
            str(ROOT / "configs" / "digits_quickstart.yaml"),
            "--out",
            f"{folder}/run",
        ]
        started = time.perf_counter()
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("round 1"):
                    seconds = time.perf_counter() - started
                    process.kill()
                    return seconds
    raise SystemExit(f"{' '.join(command)}: ended before its first round")


def main() -> None:
    """Execute and print both measurements."""
    options = parsed(arguments(__doc__, pairs=9))
    clients = 20 if options.quick else 200
    prepared = prepare(configuration(clients), dataset=make_table(clients * 2 * ROWS, 200))
    bare, rounds = (
        BareSteps(prepared),
        rounds_of(prepared, executor="serial", threads=options.threads),
    )
    seconds = in_turns({"bare steps": bare.round, "serial": rounds.run_round}, options.pairs)
    each = [
        1e3 * (a - b) / clients
        for a, b in zip(seconds["serial"], seconds["bare steps"], strict=True)
    ]
    step = 1e3 * statistics.median(seconds["bare steps"]) / clients
    print(
        f"around one step of a linear model ({step:.2f} ms): {spread(each)} ms a client; target 2"
    )
    starts = [first_round() for _ in range(options.pairs)]
    print(f"start to first round of digits_quickstart: {spread(starts)} s; target 5")


def spread(values: list[float]) -> str:
    """Format the median and range of values."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
