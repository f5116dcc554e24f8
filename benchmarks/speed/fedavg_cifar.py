#!/usr/bin/env python3
"""Compare FedAvg on CIFAR-10 with a bare loop, for 50 clients with a small CNN.

    python -m benchmarks fedavg_cifar [--data cifar10.npz]

Each client takes 5 steps with batches of 10. A round without evaluation consists of broadcast,
training and aggregation. The bare loop, in plain PyTorch, uses the same batches and the fused
optimizer, averages weights one client at a time, and does not encode messages. Targets of the time
ratios: 1.05 with `serial` and 0.8 with `auto`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.common import TrainerRun, agree, arguments, images, in_turns, parsed, print_ratios
from hetero_fl.experiment import PreparedRun, prepare
from hetero_fl.utils.seeding import keyed_generator

BATCH, STEPS, LR = 10, 5, 0.05
TARGETS = {"serial": 1.05, "auto": 0.8, "two workers": None}


def configuration(clients: int) -> dict[str, object]:
    """Return a configuration in which each client has as many rows as needed for its steps."""
    return {
        "rounds": 500,
        "data": {
            "train_limit": clients * BATCH * STEPS + 1,
            "test_limit": 200,
            "split": {"validation": 0.0, "test": 0.0},
            "validation": 1e-9,  # one row
        },
        "clients": {
            "count": clients,
            "defaults": {
                "model": "fedavg_cnn",
                "optimizer": {"name": "sgd", "lr": LR},
                "batch_size": BATCH,
                "steps": STEPS,
            },
        },
        "algorithm": {"name": "fedavg"},
    }


class Bare:
    """FedAvg in plain PyTorch.

    Args:
        prepared: The run, which provides data, model and initial weights.
    """

    def __init__(self, prepared: PreparedRun) -> None:
        federation = prepared.federation
        (arch,) = {card.arch for card in federation.client_infos.values()}
        self.rows = {
            c: federation.data.columns(c, "train", card.preprocess)
            for c, card in federation.client_infos.items()
        }
        self.module = arch.build()
        self.weights = {n: t.clone() for n, t in federation.initial_tensors(arch).items()}
        self.losses: list[list[float]] = []
        self.seed, self.done = federation.seed, 0

    def round(self) -> None:
        """Train all clients one after the other and average their weights."""
        module, criterion = self.module.train(), F.cross_entropy
        total = sum(len(rows["y"]) for rows in self.rows.values())
        mean = {n: torch.zeros_like(t) for n, t in self.weights.items()}
        losses = []
        for client_id, rows in self.rows.items():
            module.load_state_dict(self.weights)
            optimizer = torch.optim.SGD(module.parameters(), LR, fused=True)
            order = torch.randperm(
                len(rows["y"]),
                generator=keyed_generator(self.seed, self.done, client_id, "train", 0, 0),
            )
            loss_sum = torch.zeros(())
            for batch in order[: BATCH * STEPS].split(BATCH):
                optimizer.zero_grad()
                loss = criterion(module(rows["x"][batch]).logits, rows["y"][batch])
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach()
            with torch.no_grad():
                for name, tensor in module.state_dict().items():
                    mean[name].add_(tensor, alpha=len(rows["y"]) / total)
            losses.append(float(loss_sum) / STEPS)
        self.losses.append(losses)
        self.weights, self.done = mean, self.done + 1


def main() -> None:
    """Measure all executors and print the ratios."""
    options = parsed(arguments(__doc__, data=True))
    clients = 4 if options.quick else 50
    prepared = prepare(
        configuration(clients), dataset=images(options.data, clients * BATCH * STEPS * 2)
    )
    bare = Bare(prepared)
    ours = {
        "serial": TrainerRun(prepared, executor="serial", threads=options.threads),
        "auto": TrainerRun(prepared, executor="auto"),
        "two workers": TrainerRun(prepared, executor="processes", workers=2),
    }
    try:
        seconds = in_turns(
            {"bare loop": bare.round, **{n: run.round for n, run in ours.items()}}, options.pairs
        )
    finally:
        for run in ours.values():
            run.rounds.executor.close()
    print_ratios(
        f"FedAvg, {clients} clients x {STEPS} steps of {BATCH}, a round",
        seconds,
        "bare loop",
        TARGETS,
    )
    for name, run in ours.items():
        agree(name, run.losses, bare.losses)


if __name__ == "__main__":
    main()
