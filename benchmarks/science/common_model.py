#!/usr/bin/env python3
"""Compare FML's common model with the clients' own models on the global test.

    python -m benchmarks common_model [--federation digits] [--seeds 630,631]

FML trains a small common model next to each client's model, and the global test evaluates the
common model. The rows are FML as archived, the clients' own models of the same runs, FedAvg with
the common model at all clients (learning rate and epochs of FML, and the logit-adjusted loss), and
Hybrid as archived. FML and Hybrid have all their components. The table contains the balanced
accuracy in percent, mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

import hetero_fl
from benchmarks.common import add_quick, seed_list
from benchmarks.science.thresholds import (
    METRIC,
    ROOT,
    SERIAL,
    balanced_accuracy,
    cell,
    predict_global_sets,
)
from hetero_fl.experiment.benchmark.results import BenchmarkResults
from hetero_fl.experiment.configuration import load_config
from hetero_fl.reporting.comparison.report import comparison_row
from hetero_fl.reporting.rendering import markdown_table

FML = "fml", "all"
ALGORITHM = "algorithm."
"""Beginning of the overrides of FML that FedAvg does not have."""


def own_models(config: Path, overrides: list[str]) -> float:
    """Train a run and return the balanced accuracy of the clients' own models.

    Args:
        config: Configuration file.
        overrides: Changes to the configuration.

    Returns:
        The mean over clients on the global test.
    """
    predictions, _ = predict_global_sets(config, overrides)
    return statistics.fmean(balanced_accuracy(*found["common_test"]) for found in predictions)


def fedavg_with_common_model(config: Path, overrides: list[str]) -> float:
    """Train FedAvg with FML's common model at all clients and return its balanced accuracy.

    Args:
        config: Configuration file.
        overrides: Changes to the configuration of the FML run.

    Returns:
        The mean over clients on the global test.
    """
    mentee = hetero_fl.prepare(load_config(config, overrides)).method.mentee
    groups = load_config(config).clients.groups
    kept = [each for each in overrides if not each.startswith(ALGORITHM)]
    models = [f"clients.groups.{place}.model={mentee.name}" for place in range(len(groups))]
    method = [f"{ALGORITHM}name=fedavg", f"{ALGORITHM}logit_adjustment=true"]
    with tempfile.TemporaryDirectory() as folder:
        run = hetero_fl.run(config, out=Path(folder) / "run", overrides=[*kept, *models, *method])
        return float(comparison_row(run.summary)[METRIC])


def main() -> None:
    """Print a table with four rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--federation", default="digits", help="name in configs/benchmark (digits)")
    parser.add_argument(
        "--seeds", type=seed_list, help="seeds of the archived runs, separated by commas (all)"
    )
    add_quick(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = BenchmarkResults(ROOT / "configs" / "benchmark", ROOT / "docs" / "benchmark")
    name = options.federation
    seeds = options.seeds or results.benchmark.protocol.seeds
    extra = [SERIAL]
    if options.quick:
        seeds = seeds[:1]
        extra = [SERIAL, "rounds=1"]
    config = results.benchmark.federations[name].config
    runs = [[*results.run_overrides(name, FML, seed), *extra] for seed in seeds]
    archived = {
        method: results.scores[name].by_seed((method, "all"), METRIC)
        for method in ("fml", "hybrid")
    }
    rows = [
        ["FML, common model", cell([archived["fml"][seed] for seed in seeds])],
        ["FML, own models", cell([own_models(config, run) for run in runs])],
        [
            "FedAvg, common model at all clients",
            cell([fedavg_with_common_model(config, run) for run in runs]),
        ],
        ["Hybrid, own models", cell([archived["hybrid"][seed] for seed in seeds])],
    ]
    print(markdown_table(["Method and model", "Balanced accuracy"], rows, ["left", "right"]))


if __name__ == "__main__":
    main()
