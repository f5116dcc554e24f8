#!/usr/bin/env python3
"""Compare robust rules under attacks, with 20 clients on Fashion-MNIST over 10 rounds.

    python -m benchmarks attacks --data fashionmnist.npz [--out robustness.jsonl]
                                 [--only TEXT] [--most N] [--alpha 10]

Attacks on FedAvg change training rows and updates, and attacks on Hybrid change predictions and all
other uploads. A fifth of the clients is malicious, or two fifths for the strongest attacks. Every
run adds a line to `--out`, and recorded runs are not repeated. At the end, the command prints a
table of all lines. The label skew is small (Dirichlet 10), because rules that compare clients
reject clients that differ. Accuracy is the mean global test accuracy of the honest clients' models
after the last round.
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

ROUNDS = 10
CLIENTS = 20
PROXY = 400
ROWS = 4000
HONEST = "none"
ON_UPDATES = ("label_flip", "backdoor", "sign_flip", "gaussian", "little_is_enough")
ON_ROWS = ("confident_wrong",)
RULES = ("mean", "median", "trimmed_mean", "multi_krum", "norm_bound")
PREDICTIONS = ("mean", "median", "agreement")
# Strengths that have an effect. With the z of the paper (0.16) or z = 2, little_is_enough has no
# effect, and Gaussian noise of 10 times the update reduces accuracy by only 2 points.
STRENGTH = {"little_is_enough": 6.0, "gaussian": 100.0}
WORST = ("sign_flip", "gaussian")


@dataclass(frozen=True)
class Case:
    """Specification of a run.

    Attributes:
        method: Name of the method.
        attack: Name of the attack, or "none".
        rule: Aggregation rule for parameters.
        predictions: Aggregation rule for predictions.
        share: Fraction of malicious clients.
    """

    method: str
    attack: str
    rule: str = "mean"
    predictions: str = "mean"
    share: float = 0.2

    def __str__(self) -> str:
        return f"{self.method} {self.attack} {self.rule}/{self.predictions} {self.share:g}"


def cases() -> Iterator[Case]:
    """Yield the specifications of all 50 runs. Runs without attack apply to every share."""
    for attack in (HONEST, *ON_UPDATES):
        yield from (Case("fedavg", attack, rule) for rule in RULES)
    for attack in (HONEST, "sign_flip", "little_is_enough"):
        yield Case("fedavg", attack, "krum")
    for attack in (HONEST, *ON_ROWS):
        yield from (Case("hybrid", attack, "mean", predictions) for predictions in PREDICTIONS)
    for attack in (HONEST, "sign_flip"):
        yield Case("hybrid", attack, "median", "median")
    yield Case("hybrid", "sign_flip")
    for attack in WORST:
        yield from (
            Case("fedavg", attack, rule, share=0.4)
            for rule in ("mean", "median", "trimmed_mean", "multi_krum")
        )


def configuration(case: Case, alpha: float, seed: int) -> dict[str, Any]:
    """Return the configuration of a run.

    The robust rules are configured with the actual fraction of malicious clients.

    Args:
        case: The run.
        alpha: Concentration of the Dirichlet distribution.
        seed: Seed of the run.
    """
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
        "aggregation": {
            "rule": case.rule,
            "predictions": case.predictions,
            "malicious": case.share,
        },
        "attacks": None
        if case.attack == HONEST
        else {"name": case.attack, "share": case.share, "strength": STRENGTH.get(case.attack)},
        "runtime": {"executor": "batched", "threads": 1, "device": "cpu"},
    }


def carry_out(case: Case, dataset: Dataset, alpha: float, seed: int) -> dict[str, Any]:
    """Execute a run and return its line for the result file.

    The accuracy is None if the attack made the models non-finite.

    Args:
        case: The run.
        dataset: The data set.
        alpha: Concentration of the Dirichlet distribution.
        seed: Seed of the run.
    """
    started = time.perf_counter()
    rounds = prepare(configuration(case, alpha, seed), dataset=dataset).make_trainer()
    accuracy: float | None = None
    success: float | None = None
    try:
        for _ in range(ROUNDS):
            rounds.run_round()
        clients = rounds.evaluate().clients.values()
        scores = [client.scores["global"]["accuracy"] for client in clients]
        accuracy = None if None in scores else sum(map(float, filter(None, scores))) / len(scores)
        triggered = [client.triggered for client in clients if client.triggered is not None]
        success = sum(triggered) / len(triggered) if triggered else None
    except RunFailedError:
        # The attack made the models non-finite, which the table shows.
        pass
    finally:
        rounds.executor.close()
    line = {**asdict(case), "alpha": alpha, "seed": seed, "accuracy": accuracy, "success": success}
    return {**line, "seconds": round(time.perf_counter() - started, 1)}


def table(lines: list[dict[str, Any]]) -> str:
    """Format one Markdown table for each method and fraction of malicious clients.

    The rows are attacks and the columns are rules. The best rule of each row is bold.

    Args:
        lines: Lines of the result file.
    """
    parts = []
    for method in dict.fromkeys(line["method"] for line in lines):
        for share in sorted({line["share"] for line in lines if line["method"] == method}):
            parts.append(_table([x for x in lines if x["method"] == method], method, share))
    return "\n\n".join(parts)


def _table(lines: list[dict[str, Any]], method: str, share: float) -> str:
    by_attack = {(x["attack"], _rule(x)): x for x in lines if x["share"] == share}
    by_attack |= {(HONEST, _rule(x)): x for x in lines if x["attack"] == HONEST}
    attacks = [a for a in (HONEST, *ON_UPDATES, *ON_ROWS) if any(key[0] == a for key in by_attack)]
    rules = [
        r
        for r in dict.fromkeys(_rule(x) for x in lines)
        if any(key[1] == r and key[0] != HONEST for key in by_attack)
    ]
    rows = [
        f"| {method}, {share:.0%} malicious | " + " | ".join(rules) + " |",
        "| --- " * (len(rules) + 1) + "|",
    ]
    for attack in attacks:
        found = {rule: by_attack.get((attack, rule)) for rule in rules}
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
    """Execute missing runs and print the tables."""
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
        help="a line for each run (robustness.jsonl)",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="runs whose name contains the text, e.g. 'fedavg sign_flip'",
    )
    parser.add_argument(
        "--most", type=int, default=100, help="maximum number of runs to execute (100)"
    )
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
