#!/usr/bin/env python3
"""Compare a round of every method, including evaluation, with a bare loop in plain PyTorch.

    python -m benchmarks every_method [--methods fedprox,fedmd,…]

Three clients have the CNN of FedAvg, and three have a small CNN with BatchNorm. There are 1,800
images of 28x28 pixels and 200 public images. All computations are serial on one thread. In the
first two rounds, the losses must agree with the bare loop, which has the same arithmetic. In the
second round, the optimizer steps, the images passed through models, and the floating-point
operations of both sides are counted. Then rounds are timed in turns. Target: a ratio of 1.05. The
benchmark `heterogeneous` measures FD, FedProto, FML and FedKD.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import CLASSES, TrainerRun, arguments, in_turns, parsed
from hetero_fl.data import make_images
from hetero_fl.experiment import prepare
from model_zoo import SplitModel
from tests.references.loops import REFERENCES

TARGET = 1.05
# The benchmark `heterogeneous` measures the others.
METHODS = [name for name in REFERENCES if name not in ("fd", "fedproto", "fml", "fedkd")]
BATCH, LR = 32, 0.01
# Settings of methods whose defaults are not suitable for this benchmark.
SETTINGS: dict[str, dict[str, Any]] = {
    "heterofl": {"model": "cnn_bn_large"},
    "dense": {"synthesis_epochs": 2, "generator_steps": 5, "student_steps": 10},
}


def configuration(method: str, clients: int, rows: int, public: int) -> dict[str, Any]:
    """Return a configuration in which half of the clients have each model.

    Args:
        method: Name of the method.
        clients: Number of clients.
        rows: Number of private rows of all clients.
        public: Number of public rows.
    """
    return {
        # DENSE does all its work in the last round.
        "rounds": 1 if method == "dense" else 100,
        "data": {
            "train_limit": rows + public,
            "test_limit": public,
            "partition": {"kind": "dirichlet", "alpha": 0.5, "min_size": 20},
            "proxy": {"size": public},
            "split": {"validation": 0.0, "test": 0.25},
        },
        "clients": {
            "count": clients,
            "defaults": {
                "model": ["fedavg_cnn", "cnn_bn_small"],
                "optimizer": {"name": "sgd", "lr": LR},
                "batch_size": BATCH,
            },
        },
        "algorithm": {"name": method, **SETTINGS.get(method, {})},
    }


class Counted:
    """Context manager that counts optimizer steps, images passed through models, and operations.

    Attributes:
        steps: Number of optimizer steps.
        images: Number of images passed through models.
        operations: Number of floating-point operations, available after the `with` block.
    """

    def __enter__(self) -> Counted:
        self.steps = self.images = 0
        forward = SplitModel.forward

        def count(model: SplitModel, x: torch.Tensor) -> Any:
            self.images += len(x) if x.dim() == 4 else 0
            return forward(model, x)

        def stepped(*_: Any) -> None:
            self.steps += 1

        SplitModel.forward, self._forward = count, forward  # type: ignore[method-assign]
        self._hook = register_optimizer_step_post_hook(stepped)
        self._flops = FlopCounterMode(display=False)
        self._flops.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._flops.__exit__(*error)
        self._hook.remove()
        SplitModel.forward = self._forward  # type: ignore[method-assign]
        self.operations = self._flops.get_total_flops()


class Framework(TrainerRun):
    """A run that also records the losses of evaluations."""

    def __init__(self, *args: Any, **runtime: Any) -> None:
        super().__init__(*args, **runtime)
        self.scores: list[list[float]] = []

    def round(self) -> None:
        """Run and evaluate a round, and record the training and evaluation losses."""
        if self.rounds.federation.num_rounds == 1:
            self.rounds.completed = 0
        super().round()
        found = self.rounds.evaluate().clients.values()
        sets = ("personal", "global", "validation_global")
        self.scores.append(
            [float(r.scores[name]["loss"] or 0) for r in found for name in sets if name in r.scores]
        )


def apart(ours: list[list[float]], bare: list[list[float]]) -> float:
    """Return the largest relative difference of losses in the first two rounds.

    The result is infinite if a difference is not finite.
    """
    pairs = [
        pair for a, b in zip(ours[:2], bare[:2], strict=True) for pair in zip(a, b, strict=True)
    ]
    return max(
        (abs(a - b) / max(1.0, abs(b)) if math.isfinite(a - b) else math.inf for a, b in pairs),
        default=0.0,
    )


def measure(method: str, options: argparse.Namespace) -> str:
    """Measure a method and format its table row.

    Raises:
        SystemExit: If the losses of the run and the bare loop differ.
    """
    sizes = (4, 120, 20) if options.quick else (6, 1800, 200)
    case = configuration(method, *sizes)
    prepared = prepare(case, dataset=make_images(2000, 200, classes=CLASSES, channels=1, side=28))
    ours, bare = (
        Framework(prepared, executor="serial", threads=options.threads),
        REFERENCES[method](prepared),
    )
    counts = []
    for contender in (ours, bare):
        contender.round()
        with Counted() as count:
            contender.round()
        counts.append(count)
    losses = [list(values.values()) for values in bare.losses]
    scores = [list(values.values()) for values in bare.scores]
    worst = max(apart(ours.losses, losses), apart(ours.scores, scores))
    if not worst < options.tolerance:
        raise SystemExit(
            f"{method}: losses differ by {worst:.2g} from the bare loop's; no ratio means anything"
        )
    contenders: dict[str, Callable[[], None]] = {"ours": ours.round, "bare": bare.round}
    seconds = in_turns(contenders, options.pairs)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True)]
    middle, (mine, theirs) = statistics.median(ratios), counts
    each = [f"{getattr(mine, name):,} / {getattr(theirs, name):,}" for name in ("steps", "images")]
    operations = f"{mine.operations / 1e9:.2f} / {theirs.operations / 1e9:.2f}"
    time = f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    cells = [
        method,
        *each,
        operations,
        f"{worst:.0e}",
        f"{statistics.median(seconds['bare']):.2f}",
        time,
    ]
    return f"| {' | '.join(cells)} | {'' if middle <= TARGET else '**missed**'} |"


def main() -> None:
    """Measure all selected methods and print the table."""
    parser = arguments(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument(
        "--methods", default=",".join(METHODS), metavar="A,B,…", help="methods (all)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.005,
        help="largest relative difference of losses (0.005)",
    )
    options = parsed(parser)
    print(
        "| method | steps: ours / bare | images | 10⁹ operations | loss difference | bare, s "
        "| ours / bare | |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for method in options.methods.split(","):
        if method not in METHODS:
            raise SystemExit(
                f"--methods: found '{method}'; there are bare loops for {', '.join(METHODS)}"
            )
        print(measure(method, options), flush=True)


if __name__ == "__main__":
    main()
