#!/usr/bin/env python3
"""Explain the FedProto row of its published table: vary the setting of the authors' code.

    python -m benchmarks fedproto_setting --data DIR [--only TEXT] [--rounds 100]

DIR contains `mnist.npz`. As in the authors' code, the classes of clients are drawn with seed 1234.
For each class, a client has a block of consecutive training rows (99 or 100) and a block of test
images that no other client has. Initial weights differ between clients, batches have exactly four
rows, prototypes are computed during training with dropout, and the global prototypes are means of
the clients' means. The output is the mean ± deviation over clients, in percent, of the predictions
by the head, by the nearest prototype of the client's classes, and as the authors' code counts them
(its counters are not reset between clients and evaluations). Test images come from MNIST's test
set, as in the authors' code, or from its training set.
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
    """The setting of the authors' code and its variations."""

    weight: float = 1.0  # λ; 0: each client alone
    equal: bool = False  # clients start from equal weights
    after: bool = False  # prototypes after training, in evaluation mode, by rows
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
TESTS = {  # part, first row of a class, images of a class for each client
    "40 of the test set": ("test", 0, 40),
    "15 of the test set": ("test", 0, 15),
    "40 of the training set": ("train", CLIENTS * BLOCK, 40),
}


@dataclass(frozen=True)
class Client:
    """A client: rows, model, and test images by the names of `TESTS`."""

    x: Tensor
    y: Tensor
    tests: dict[str, tuple[Tensor, Tensor]]
    model: torch.nn.Module


def clients_of(data: dict[str, np.ndarray], setting: Setting) -> list[Client]:
    """Draw classes and numbers of rows as the authors' code does."""
    numbers, names = np.random.RandomState(SEED), random.Random(SEED)
    classes = numbers.randint(2, 6, CLIENTS)  # 3 give or take 2, two at least
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
    """Train an epoch; return sums of features by class `[C, d]` and counts `[C]`."""
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
        if not setting.after:  # a mean of the clients' means
            sums, counts = sums / counts.clamp(min=1)[..., None], (counts > 0).to(counts.dtype)
        known = counts.sum(0) > 0
        prototypes = sums.sum(0) / counts.sum(0).clamp(min=1)[:, None]
    return prototypes


def readings(clients: list[Client], prototypes: Tensor | None, tests: str) -> dict[str, np.ndarray]:
    """Return the accuracies of the clients in percent for each kind of prediction."""
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
    """Measure all selected cases."""
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
