#!/usr/bin/env python3
"""Explain the published FedProto score by varying the settings of the authors' code.

    python -m benchmarks fedproto_setting --data DIR [--only TEXT] [--rounds 100]

DIR contains `mnist.npz`. As in the authors' code, the classes of the clients are sampled with seed
1234. For each class, a client has a block of 99 or 100 consecutive training rows and a block of
test images that no other client has. Initial weights differ between clients, batches have exactly
four rows, prototypes are computed during training with dropout, and the global prototypes are means
of the clients' means. The output is the mean and standard deviation of the clients' accuracies in
percent. Predictions are made by the head or by the nearest prototype of the client's classes. The
last accuracy is counted as in the authors' code, in which counters are not reset between clients
and evaluations. Test images are from the MNIST test set, as in the authors' code, or from the
training set.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model_zoo import create_model

CLIENTS, BATCH, LR, MOMENTUM, BLOCK, SEED = 20, 4, 0.01, 0.5, 110, 1234


@dataclass(frozen=True)
class Setting:
    """Settings of training, whose defaults are those of the authors' code.

    Attributes:
        weight: Weight λ of the prototype loss. If 0, clients train alone.
        equal: Whether all clients start from the same weights.
        after: Whether prototypes are computed after training in evaluation mode, and weighted by
            the number of rows.
        momentum: Momentum of SGD.
        epochs: Number of local epochs.
    """

    weight: float = 1.0
    equal: bool = False
    after: bool = False
    momentum: float = MOMENTUM
    epochs: int = 1


AUTHORS = Setting()
CASES = {
    "FedProto": AUTHORS,
    "Local": replace(AUTHORS, weight=0.0),
    "FedProto, equal initial weights": replace(AUTHORS, equal=True),
    "FedProto, prototypes after training": replace(AUTHORS, after=True),
    "FedProto, no momentum": replace(AUTHORS, momentum=0.0),
}
# Split, first row of each class, and number of images per class and client.
TESTS = {
    "40 of the test set": ("test", 0, 40),
    "15 of the test set": ("test", 0, 15),
    "40 of the training set": ("train", CLIENTS * BLOCK, 40),
}


@dataclass(frozen=True)
class Client:
    """A client.

    Attributes:
        x: Training images, `[N, 1, 28, 28]`.
        y: Labels, `[N]`.
        tests: Test images and labels, keyed by the names in `TESTS`.
        model: The client's model.
    """

    x: Tensor
    y: Tensor
    tests: dict[str, tuple[Tensor, Tensor]]
    model: torch.nn.Module


def clients_of(data: dict[str, np.ndarray], setting: Setting) -> list[Client]:
    """Create the clients, with classes and numbers of rows sampled as in the authors' code."""
    numbers, names = np.random.RandomState(SEED), random.Random(SEED)
    # 3 classes with a deviation of up to 2, at least two.
    classes = numbers.randint(2, 6, CLIENTS)
    shots = numbers.randint(99, 101, CLIENTS)
    rows = {
        part: [np.flatnonzero(data[f"{part}_labels"] == c) for c in range(10)]
        for part in ("train", "test")
    }

    def taken(part: str, mine: list[int], begin: int, count: int) -> tuple[Tensor, Tensor]:
        chosen = np.concatenate([rows[part][c][begin : begin + count] for c in mine])
        x = (torch.from_numpy(data[f"{part}_images"][chosen])[:, None] / 255 - 0.1307) / 0.3081
        return x, torch.from_numpy(data[f"{part}_labels"][chosen]).long()

    found, first = [], create_model("fedproto_cnn", 10, 1, 28).state_dict()
    for i in range(CLIENTS):
        mine = sorted(names.sample(range(10), int(classes[i])))
        model = create_model("fedproto_cnn", 10, 1, 28)
        if setting.equal:
            model.load_state_dict(first)
        tests = {
            name: taken(part, mine, skip + i * n, n) for name, (part, skip, n) in TESTS.items()
        }
        found.append(Client(*taken("train", mine, i * BLOCK, int(shots[i])), tests, model))
    return found


def train(
    client: Client, setting: Setting, prototypes: Tensor, known: Tensor
) -> tuple[Tensor, Tensor]:
    """Train a client for the local epochs of one round.

    Args:
        client: The client.
        setting: Settings of training.
        prototypes: Global prototypes, `[C, d]`.
        known: Whether there is a prototype of each class, bool `[C]`.

    Returns:
        The sum of the features of each class, `[C, d]`, and the number of rows of each class,
        `[C]`.
    """
    optimizer = torch.optim.SGD(client.model.train().parameters(), LR, setting.momentum)
    seen, labels = [], []
    for rows in [
        r
        for _ in range(setting.epochs)
        for r in torch.randperm(len(client.y)).split(BATCH)
        if len(r) == BATCH
    ]:
        y = client.y[rows]
        optimizer.zero_grad()
        out = client.model(client.x[rows])
        loss = F.cross_entropy(out.logits, y)
        if setting.weight:
            target = torch.where(known[y][:, None], prototypes[y], out.features.detach())
            loss = loss + setting.weight * F.mse_loss(out.features, target)
        loss.backward()
        optimizer.step()
        seen.append(out.features.detach())
        labels.append(y)
    features, y = torch.cat(seen), torch.cat(labels)
    if setting.after:
        with torch.no_grad():
            features, y = client.model.eval()(client.x).features, client.y
    one_hot = F.one_hot(y, 10).to(features.dtype)
    return one_hot.T @ features, one_hot.sum(0)


def course(clients: list[Client], setting: Setting, rounds: int) -> Tensor:
    """Train all rounds and return the last prototypes."""
    prototypes, known = torch.zeros(10, 50), torch.zeros(10, dtype=torch.bool)
    for _ in range(rounds):
        parts = [train(client, setting, prototypes, known) for client in clients]
        sums, counts = torch.stack([s for s, _ in parts]), torch.stack([n for _, n in parts])
        if not setting.after:
            # The global prototypes are means of the clients' means.
            sums, counts = sums / counts.clamp(min=1)[..., None], (counts > 0).to(counts.dtype)
        known = counts.sum(0) > 0
        prototypes = sums.sum(0) / counts.sum(0).clamp(min=1)[:, None]
    return prototypes


def readings(clients: list[Client], prototypes: Tensor | None, tests: str) -> dict[str, np.ndarray]:
    """Evaluate all clients.

    Args:
        clients: The clients.
        prototypes: Global prototypes, `[C, d]`. If None, only the heads are evaluated.
        tests: Name of the test images in `TESTS`.

    Returns:
        The accuracies of the clients in percent, keyed by kind of prediction.
    """
    right: list[list[int]] = []
    total: list[int] = []
    with torch.no_grad():
        for client in clients:
            x, y = client.tests[tests]
            out = client.model.eval()(x)
            taken = {"head": out.logits.argmax(1)}
            if prototypes is not None:
                mine = torch.isin(torch.arange(10), client.y)
                distance = torch.cdist(out.features, prototypes).where(
                    mine, torch.tensor(torch.inf)
                )
                taken["own prototypes"] = distance.argmin(1)
            right.append([int((t == y).sum()) for t in taken.values()])
            total.append(len(y))
    single = 100 * np.array(right) / np.array(total)[:, None]
    counted = np.cumsum(right).reshape(len(clients), -1)[:, -1] / np.cumsum(
        np.array(total) * len(taken)
    )
    return {**dict(zip(taken, single.T, strict=True)), "authors' count": 100 * counted}


def main() -> None:
    """Train and evaluate all selected cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of mnist.npz")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases whose name contains the text"
    )
    parser.add_argument("--rounds", type=int, default=100, help="100")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with np.load(options.data / "mnist.npz") as file:
        data = {name: file[name].squeeze() for name in file}
    for name, setting in CASES.items():
        if options.only not in name:
            continue
        torch.manual_seed(SEED)
        clients = clients_of(data, setting)
        prototypes = course(clients, setting, options.rounds)
        for tests in TESTS:
            read = readings(clients, prototypes if setting.weight else None, tests)
            text = ", ".join(f"{what} {a.mean():.2f} ± {a.std():.2f}" for what, a in read.items())
            print(f"{name}; {tests}: {text}", flush=True)


if __name__ == "__main__":
    main()
