#!/usr/bin/env python3
"""Liars and rules: 20 clients of one architecture on Fashion-MNIST, 10 rounds, attack × rule.

    python -m benchmarks attacks --data fashionmnist.npz [--out robustness.jsonl] [--only TEXT] [--most N] [--alpha 10]

FedAvg under attacks on rows of data and on updates, Hybrid under attacks on predictions and on all that it sends; a fifth of the
clients lie, and two fifths under the worst attacks. Every run leaves a line in --out and is not carried out again; the table of
all lines there is printed at the end. Skew is mild (Dirichlet 10): rules that compare clients take those that differ for liars.
Accuracy is that of the honest clients' models on the common test set after the last round.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import Dataset, load_source
from hetero_fl.experiment import prepare
from hetero_fl.utils.errors import RunFailedError

ROUNDS, CLIENTS, PROXY, ROWS = 10, 20, 400, 4000
HONEST = "none"
ON_UPDATES = (
    "label_flip",
    "backdoor",
    "sign_flip",
    "scaled",
    "gaussian",
    "little_is_enough",
    "inner_product",
)
ON_ROWS = ("flipped", "confident_wrong", "targeted", "collusion")
RULES = ("mean", "median", "trimmed_mean", "multi_krum", "norm_bound")
FEWER = ("krum", "bulyan", "fltrust")
PREDICTIONS = ("mean", "median", "spectral", "down_weight", "agreement")
# Chosen for their effect: of little_is_enough the z that theory lets pass (0.16), and 2, do not hurt; noise of 10 times
# the update costs 2 points.
STRENGTH = {"little_is_enough": 6.0, "gaussian": 100.0}
WORST = ("sign_flip", "gaussian", "inner_product")


@dataclass(frozen=True)
class Case:
    """A run: who lies how, and what is done about it."""

    method: str
    attack: str
    rule: str = "mean"
    predictions: str = "mean"
    share: float = 0.2

    def __str__(self) -> str:
        return f"{self.method} {self.attack} {self.rule}/{self.predictions} {self.share:g}"


def cases() -> Iterator[Case]:
    """All runs, 99 of them; those without attack stand for every share."""
    for attack in (HONEST, *ON_UPDATES):
        yield from (Case("fedavg", attack, rule) for rule in RULES)
    for attack in (HONEST, "sign_flip", "little_is_enough", "inner_product"):
        yield from (Case("fedavg", attack, rule) for rule in FEWER)
    for attack in (HONEST, *ON_ROWS):
        yield from (Case("hybrid", attack, "mean", predictions) for predictions in PREDICTIONS)
    for attack in (HONEST, "sign_flip"):
        yield Case("hybrid", attack, "median", "median")
        yield Case("hybrid", attack, "multi_krum", "spectral")
    yield Case("hybrid", "sign_flip")
    for attack in WORST:
        yield from (
            Case("fedavg", attack, rule, share=0.4)
            for rule in ("mean", "median", "trimmed_mean", "multi_krum")
        )
    yield from (
        Case("hybrid", "collusion", "mean", predictions, 0.4) for predictions in PREDICTIONS
    )


def configuration(case: Case, alpha: float, seed: int) -> dict[str, Any]:
    """The run's, with as many liars expected as there are."""
    return {
        "rounds": ROUNDS,
        "seed": seed,
        "data": {
            "train_limit": ROWS + PROXY,
            "test_limit": 2000,
            "validation": 1e-9,  # one row
            "partition": {"kind": "dirichlet", "alpha": alpha, "min_size": 50},
            "proxy": {"size": PROXY},
            "split": {"validation": 0.0, "test": 0.05},
        },
        "clients": {
            "count": CLIENTS,
            "defaults": {
                "model": "fedgen_cnn",
                "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
                "epochs": 2,
                "batch_size": 20,
                "preprocess": {"normalize": {"mean": 0.286, "std": 0.353}},
            },
        },
        "algorithm": {"name": case.method},
        "aggregation": {"rule": case.rule, "predictions": case.predictions, "liars": case.share},
        "attacks": None
        if case.attack == HONEST
        else {"name": case.attack, "share": case.share, "strength": STRENGTH.get(case.attack)},
        "runtime": {"executor": "batched", "threads": 1, "device": "cpu"},
    }


def carry_out(case: Case, dataset: Dataset, alpha: float, seed: int) -> dict[str, Any]:
    """The run's line."""
    begun = time.perf_counter()
    rounds = prepare(configuration(case, alpha, seed), dataset=dataset).make_trainer()
    accuracy: float | None = None
    success: float | None = None
    try:
        for _ in range(ROUNDS):
            rounds.run_round()
        read = rounds.evaluate().clients.values()
        found = [reading.scores["global"]["accuracy"] for reading in read]
        accuracy = None if None in found else sum(map(float, filter(None, found))) / len(found)
        stamped = [reading.triggered for reading in read if reading.triggered is not None]
        success = sum(stamped) / len(stamped) if stamped else None
    except RunFailedError:
        pass  # nothing finite was left: as bad as an attack can get
    finally:
        rounds.executor.close()
    line = {**asdict(case), "alpha": alpha, "seed": seed, "accuracy": accuracy, "success": success}
    return {**line, "seconds": round(time.perf_counter() - begun, 1)}


# The table -------------------------------------------------------------------------------------------------------
def table(lines: list[dict[str, Any]]) -> str:
    """A table for each method and share: rows are attacks, columns rules, the best of an attack in bold."""
    parts = []
    for method in dict.fromkeys(line["method"] for line in lines):
        for share in sorted({line["share"] for line in lines if line["method"] == method}):
            parts.append(_table([x for x in lines if x["method"] == method], method, share))
    return "\n\n".join(parts)


def _table(lines: list[dict[str, Any]], method: str, share: float) -> str:
    there = {(x["attack"], _rule(x)): x for x in lines if x["share"] == share}
    there |= {(HONEST, _rule(x)): x for x in lines if x["attack"] == HONEST}
    attacks = [a for a in (HONEST, *ON_UPDATES, *ON_ROWS) if any(key[0] == a for key in there)]
    rules = [
        r
        for r in dict.fromkeys(_rule(x) for x in lines)
        if any(key[1] == r and key[0] != HONEST for key in there)
    ]
    rows = [
        f"| {method}, {share:.0%} liars | " + " | ".join(rules) + " |",
        "| --- " * (len(rules) + 1) + "|",
    ]
    for attack in attacks:
        found = {rule: there.get((attack, rule)) for rule in rules}
        best = max((x["accuracy"] or 0.0 for x in found.values() if x), default=0.0)
        rows.append(
            f"| {attack} | " + " | ".join(_cell(found[rule], best) for rule in rules) + " |"
        )
    return "\n".join(rows)


def _rule(line: dict[str, Any]) -> str:
    if line["method"] == "fedavg":
        return str(line["rule"])
    return (
        str(line["predictions"])
        if line["rule"] == "mean"
        else f"{line['rule']} and {line['predictions']}"
    )


def _cell(line: dict[str, Any] | None, best: float) -> str:
    if line is None:
        return ""
    accuracy = line["accuracy"]
    text = "not finite" if accuracy is None else f"{100 * accuracy:.1f}"
    text = f"**{text}**" if accuracy is not None and accuracy >= best else text
    return text if line["success"] is None else f"{text} ({100 * line['success']:.0f}% of triggers)"


def main() -> None:
    """Carry out what is not there, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="Fashion-MNIST as .npz (train_images, …)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("robustness.jsonl"),
        help="a line per run (robustness.jsonl)",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="runs whose name contains it, e.g. 'fedavg sign_flip'",
    )
    parser.add_argument("--most", type=int, default=100, help="runs to carry out at most (100)")
    parser.add_argument("--alpha", type=float, default=10.0, help="label skew, Dirichlet (10)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    lines = [
        x
        for x in map(json.loads, known)
        if (x["alpha"], x["seed"]) == (options.alpha, options.seed)
    ]
    done = {Case(**{k: x[k] for k in Case.__dataclass_fields__}) for x in lines}
    left = [case for case in cases() if case not in done and options.only in str(case)][
        : options.most
    ]
    dataset = (
        load_source(SourceConfig(name="npz", path=str(options.data)), Path()) if left else None
    )
    for case in left:
        assert dataset is not None
        lines.append(carry_out(case, dataset, options.alpha, options.seed))
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(
            f"{case}: {lines[-1]['accuracy']}, {lines[-1]['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    print(table(lines))


if __name__ == "__main__":
    main()
