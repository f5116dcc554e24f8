#!/usr/bin/env python3
"""Repeat FedProto's published setting with a training loop in plain PyTorch.

    python -m benchmarks fedproto_setting --data DIR [--rounds 100]

DIR contains `mnist.npz`. As in the authors' code, the classes of the clients are sampled with seed
1234. For each class, a client has a block of 99 or 100 consecutive training rows and a block of
test images that no other client has. Initial weights differ between clients, batches have exactly
four rows, prototypes are computed during training with dropout, and the global prototypes are means
of the clients' means. Local trains alone in the same loop.

The table contains the mean and standard deviation of the clients' accuracies in percent.
Predictions are made by the head or by the nearest prototype of the client's classes. The last
column is counted as in the authors' code, in which counters are not reset between clients and
evaluations. Test images are from the MNIST test set, as in the authors' code, or from the training
set.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.reporting.rendering import markdown_table
from model_zoo import create_model

CLIENTS = 20
BATCH = 4
LR = 0.01
MOMENTUM = 0.5
BLOCK = 110
SEED = 1234
CLASSES = 10
FEATURES = 50
HEAD = "By the head"
PROTOTYPES = "By prototypes"
RUNNING = "As the authors' code counts"
METHODS = {"FedProto": 1.0, "Local": 0.0}
"""Weight λ of the prototype loss, keyed by name of the method."""
TESTS = {
    "40": ("test", 0, 40),
    "15": ("test", 0, 15),
    "40, of the training set": ("train", CLIENTS * BLOCK, 40),
}
"""Split, first row of each class, and number of images per class and client, keyed by title."""


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


def clients_of(data: dict[str, np.ndarray]) -> list[Client]:
    """Create the clients, with classes and numbers of rows sampled as in the authors' code."""
    numbers = np.random.RandomState(SEED)
    names = random.Random(SEED)
    # 3 classes with a deviation of up to 2, at least two.
    classes = numbers.randint(2, 6, CLIENTS)
    shots = numbers.randint(99, 101, CLIENTS)
    rows = {
        part: [np.flatnonzero(data[f"{part}_labels"] == c) for c in range(CLASSES)]
        for part in ("train", "test")
    }

    def taken(part: str, mine: list[int], begin: int, count: int) -> tuple[Tensor, Tensor]:
        chosen = np.concatenate([rows[part][c][begin : begin + count] for c in mine])
        x = (torch.from_numpy(data[f"{part}_images"][chosen])[:, None] / 255 - 0.1307) / 0.3081
        return x, torch.from_numpy(data[f"{part}_labels"][chosen]).long()

    found = []
    for i in range(CLIENTS):
        mine = sorted(names.sample(range(CLASSES), int(classes[i])))
        model = create_model("fedproto_cnn", CLASSES, 1, 28)
        tests = {
            name: taken(part, mine, skip + i * n, n) for name, (part, skip, n) in TESTS.items()
        }
        found.append(Client(*taken("train", mine, i * BLOCK, int(shots[i])), tests, model))
    return found


def train(
    client: Client, weight: float, prototypes: Tensor, known: Tensor
) -> tuple[Tensor, Tensor]:
    """Train a client for the local epoch of one round.

    Args:
        client: The client.
        weight: Weight λ of the prototype loss. If 0, the client trains alone.
        prototypes: Global prototypes, `[C, d]`.
        known: Whether there is a prototype of each class, bool `[C]`.

    Returns:
        The sum of the features of each class, `[C, d]`, and the number of rows of each class,
        `[C]`.
    """
    optimizer = torch.optim.SGD(client.model.train().parameters(), LR, MOMENTUM)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for rows in torch.randperm(len(client.y)).split(BATCH):
        if len(rows) < BATCH:
            continue
        y = client.y[rows]
        optimizer.zero_grad()
        out = client.model(client.x[rows])
        loss = F.cross_entropy(out.logits, y)
        if weight:
            target = torch.where(known[y][:, None], prototypes[y], out.features.detach())
            loss = loss + weight * F.mse_loss(out.features, target)
        loss.backward()
        optimizer.step()
        features.append(out.features.detach())
        labels.append(y)
    one_hot = F.one_hot(torch.cat(labels), CLASSES).float()
    return one_hot.T @ torch.cat(features), one_hot.sum(0)


def train_rounds(clients: list[Client], weight: float, rounds: int) -> Tensor:
    """Train all rounds and return the last prototypes."""
    prototypes = torch.zeros(CLASSES, FEATURES)
    known = torch.zeros(CLASSES, dtype=torch.bool)
    for _ in range(rounds):
        trained = [train(client, weight, prototypes, known) for client in clients]
        sums, counts = (torch.stack(each) for each in zip(*trained, strict=True))
        means = sums / counts.clamp(min=1)[..., None]
        clients_with = (counts > 0).sum(0)
        known = clients_with > 0
        # The global prototypes are means of the clients' means.
        prototypes = means.sum(0) / clients_with.clamp(min=1)[:, None]
    return prototypes


def evaluate(clients: list[Client], prototypes: Tensor | None, tests: str) -> dict[str, np.ndarray]:
    """Evaluate all clients.

    Args:
        clients: The clients.
        prototypes: Global prototypes, `[C, d]`. If None, only the heads are evaluated.
        tests: Name of the test images in `TESTS`.

    Returns:
        The accuracies of the clients in percent, keyed by kind of prediction.
    """
    correct: list[list[int]] = []
    total: list[int] = []
    with torch.no_grad():
        for client in clients:
            x, y = client.tests[tests]
            output = client.model.eval()(x)
            predicted = {HEAD: output.logits.argmax(1)}
            if prototypes is not None:
                own = torch.isin(torch.arange(CLASSES), client.y)
                distances = torch.cdist(output.features, prototypes)
                predicted[PROTOTYPES] = distances.where(own, torch.inf).argmin(1)
            correct.append([int((classes == y).sum()) for classes in predicted.values()])
            total.append(len(y))
    accuracies = 100 * np.array(correct) / np.array(total)[:, None]
    # The running sums of the correct predictions after each client, of both kinds together.
    counted = np.cumsum(correct).reshape(accuracies.shape)[:, -1]
    running = 100 * counted / np.cumsum(np.array(total) * len(predicted))
    return {**dict(zip(predicted, accuracies.T, strict=True)), RUNNING: running}


def main() -> None:
    """Train and evaluate both methods, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of mnist.npz")
    parser.add_argument("--rounds", type=int, default=100, help="number of rounds (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with np.load(options.data / "mnist.npz") as file:
        data = {name: file[name].squeeze() for name in file}
    columns = [HEAD, PROTOTYPES, RUNNING]
    rows = []
    for method, weight in METHODS.items():
        torch.manual_seed(SEED)
        clients = clients_of(data)
        prototypes = train_rounds(clients, weight, options.rounds)
        for tests in TESTS:
            found = evaluate(clients, prototypes if weight else None, tests)
            cells = [
                f"{found[name].mean():.2f} ± {found[name].std():.2f}" if name in found else ""
                for name in columns
            ]
            rows.append([method, tests, *cells])
    header = ["Method", "Test images per class", *columns]
    print(markdown_table(header, rows, ["left", "left", *["right"] * len(columns)]))


if __name__ == "__main__":
    main()
