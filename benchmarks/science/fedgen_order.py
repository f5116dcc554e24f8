#!/usr/bin/env python3
"""Measure how much batches sorted by class cost FedAvg in FedGen's setting.

    python -m benchmarks fedgen_order --data DIR [--seeds 0,1,2,3] [--alpha 0.1]

DIR contains `mnist.npz`. The benchmark is a training loop in plain PyTorch with the data, model and
settings of `configs/replication/fedgen_mnist.yaml`. As in the authors' code, clients keep their
BatchNorm statistics, and each client is evaluated on the test images of its own classes. Batches
are either taken in order from rows sorted by class, as in the authors' code at the time of
publication, or shuffled. The table contains the last score and the mean of the five best of forty
scores, in percent, and their mean and standard deviation over the seeds, of which each samples a
partition.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import seed_list
from hetero_fl.experiment import PreparedRun, prepare
from hetero_fl.reporting.rendering import markdown_table
from hetero_fl.utils.seeding import keyed_generator

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "replication" / "fedgen_mnist.yaml"
COHORT = 10
STEPS = 20
BATCH = 32
LR = 0.01
LR_DECAY = 0.99
EVALUATE_EVERY = 5


def batches(y: Tensor, draws: torch.Generator, shuffled: bool) -> Iterator[Tensor]:
    """Yield the row indices of full batches without end.

    Args:
        y: Labels, shape `[N]`.
        draws: Random generator.
        shuffled: Whether to shuffle the rows in each epoch. If False, rows are sorted by class.
    """
    sorted_rows = y.argsort(stable=True)
    while True:
        rows = torch.randperm(len(y), generator=draws) if shuffled else sorted_rows
        yield from (batch for batch in rows.split(BATCH) if len(batch) == BATCH)


def train_rounds(prepared: PreparedRun, shuffled: bool) -> list[float]:
    """Train all rounds and record the accuracy every fifth round.

    Args:
        prepared: The run, which provides data, model and settings.
        shuffled: Whether to shuffle the rows.

    Returns:
        The accuracies on the test images of all clients, in percent.
    """
    federation = prepared.federation
    ids = list(federation.client_infos)
    (arch,) = {card.arch for card in federation.client_infos.values()}
    view = federation.client_infos[ids[0]].preprocess
    train = {c: federation.data.columns(c, "train", view) for c in ids}
    test = federation.data.columns(ids[0], "common_test", view)
    draws = keyed_generator(federation.seed, "by hand")
    stream = {c: batches(train[c]["y"], draws, shuffled) for c in ids}
    module = arch.build()
    weights = federation.initial_tensors(arch)
    learned = [n for n in weights if n in arch.parameter_names]
    kept = {c: {n: t.clone() for n, t in weights.items() if n not in learned} for c in ids}
    shared = {n: weights[n].clone() for n in learned}
    accuracies = []
    for round_idx in range(prepared.config.rounds):
        cohort = [ids[i] for i in torch.randperm(len(ids), generator=draws)[:COHORT].tolist()]
        total = sum(len(train[c]["y"]) for c in cohort)
        mean = {n: torch.zeros_like(t) for n, t in shared.items()}
        for c in cohort:
            module.load_state_dict({**shared, **kept[c]})
            optimizer = torch.optim.SGD(module.train().parameters(), LR * LR_DECAY**round_idx)
            for _ in range(STEPS):
                rows = next(stream[c])
                optimizer.zero_grad()
                F.cross_entropy(module(train[c]["x"][rows]).logits, train[c]["y"][rows]).backward()
                optimizer.step()
            state = module.state_dict()
            kept[c] = {n: state[n].clone() for n in kept[c]}
            for n in learned:
                mean[n].add_(state[n], alpha=len(train[c]["y"]) / total)
        shared = mean
        if (round_idx + 1) % EVALUATE_EVERY == 0:
            correct = 0
            evaluated = 0
            for c in ids:
                module.load_state_dict({**shared, **kept[c]})
                mine = torch.isin(test["y"], train[c]["y"].unique())
                with torch.no_grad():
                    predicted = module.eval()(test["x"][mine]).logits.argmax(1)
                correct += int((predicted == test["y"][mine]).sum())
                evaluated += len(predicted)
            accuracies.append(100 * correct / evaluated)
    return accuracies


def mean_and_deviation(values: list[float]) -> str:
    """Format the mean and the standard deviation of a sample."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def main() -> None:
    """Train with and without shuffling for every seed, and print the scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of mnist.npz")
    parser.add_argument(
        "--seeds", type=seed_list, default=[0, 1, 2, 3], help="seeds, separated by commas (0,1,2,3)"
    )
    parser.add_argument("--alpha", default="0.1", help="α of the Dirichlet partition (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = options.seeds
    last: dict[str, list[float]] = {"Shuffled": [], "In order of class": []}
    best: dict[str, list[float]] = {order: [] for order in last}
    for seed in seeds:
        changes = [
            f"data.path={options.data / 'mnist.npz'}",
            f"data.partition.alpha={options.alpha}",
            f"seed={seed}",
        ]
        prepared = prepare(CONFIG, changes)
        for order, ends in last.items():
            scores = train_rounds(prepared, shuffled=order == "Shuffled")
            ends.append(scores[-1])
            best[order].append(statistics.mean(sorted(scores)[-5:]))
    rows = [
        [order, kind, *(f"{score:.2f}" for score in scores), mean_and_deviation(scores)]
        for kind, found in (("last", last), ("five best", best))
        for order, scores in found.items()
    ]
    for kind, found in (("last", last), ("five best", best)):
        differences = [a - b for a, b in zip(*found.values(), strict=True)]
        shown = (f"{difference:+.2f}" for difference in differences)
        rows.append(["Difference", kind, *shown, mean_and_deviation(differences)])
    header = ["Batches", "Scores", *(f"Seed {seed}" for seed in seeds), "Mean ± sd"]
    print(markdown_table(header, rows, ["left", "left", *["right"] * (len(header) - 2)]))


if __name__ == "__main__":
    main()
