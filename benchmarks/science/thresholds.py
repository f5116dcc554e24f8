#!/usr/bin/env python3
"""Measure how much of the effect of the components better thresholds have without them.

    python -m benchmarks thresholds [--federation digits] [--seeds 630,631]

Repeats runs of the benchmark (docs/benchmark) without components. Then a scale and one offset per
class are fitted to the logits of each model, with labeled validation rows: bias-corrected
temperature scaling (Alexandari et al., ICML 2020), with classes weighted equally. The offsets move
the thresholds between classes. The columns are the balanced accuracy of the runs, with these
offsets, and of the archived runs with all components, each in percent on the global test, mean and
standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import hetero_fl
from benchmarks.common import add_quick, seed_list
from hetero_fl.experiment.benchmark.results import BenchmarkResults
from hetero_fl.experiment.configuration import load_config
from hetero_fl.reporting.comparison.report import comparison_row
from hetero_fl.reporting.formatting import algorithm_name
from hetero_fl.reporting.rendering import markdown_table

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("fedmd", "feddf", "ds_fl", "hybrid")
METRIC = "global_last_balanced_accuracy"
SERIAL = "runtime.executor=serial"
"""Starting workers takes longer than a run of the digits, and results are the same."""


def balanced_accuracy(logits: Tensor, y: Tensor) -> float:
    """Return the mean recall over the classes of `y`.

    Args:
        logits: Logits, shape `[N, C]`.
        y: Class numbers, shape `[N]`.
    """
    correct = (logits.argmax(-1) == y).double()
    return statistics.fmean(correct[y == c].mean().item() for c in y.unique())


def with_fitted_offsets(logits: Tensor, y: Tensor, test: Tensor) -> Tensor:
    """Fit a scale and an offset per class, and return the corrected logits of the test rows.

    Args:
        logits: Logits of the validation rows, shape `[N, C]`.
        y: Class numbers of the validation rows, shape `[N]`.
        test: Logits of the test rows, shape `[M, C]`.

    Returns:
        Logits, shape `[M, C]`. Offsets of classes that `y` lacks are fitted as well, so validation
        rows should contain all classes.
    """
    logits, test = logits.double(), test.double()
    log_scale = torch.zeros((), dtype=torch.double, requires_grad=True)
    offsets = torch.zeros(logits.shape[1], dtype=torch.double, requires_grad=True)
    counts = torch.bincount(y, minlength=logits.shape[1]).clamp_min(1)
    optimizer = torch.optim.LBFGS([log_scale, offsets], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(log_scale.exp() * logits + offsets, y, 1 / counts.double())
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type, no-untyped-call, unused-ignore]
    return (log_scale.exp() * test + offsets).detach()


def predict_global_sets(
    config: Path, overrides: list[str]
) -> tuple[list[dict[str, tuple[Tensor, Tensor]]], float]:
    """Train a run and predict the global sets with each client's saved model.

    Args:
        config: Configuration file.
        overrides: Changes to the configuration.

    Returns:
        For each client, logits `[N, C]` and class numbers `[N]`, keyed by "common_validation" and
        "common_test"; and the balanced accuracy on the global test that the run reports.
    """
    data = hetero_fl.prepare(load_config(config, overrides)).federation.data
    predictions = []
    with tempfile.TemporaryDirectory() as folder:
        run = hetero_fl.run(config, out=Path(folder) / "run", overrides=overrides)
        for client, model in run.load_models().items():
            if client not in data.client_ids:
                continue
            found = {}
            for name in ("common_validation", "common_test"):
                rows = data.columns(client, name, data.preprocess(client))
                found[name] = model.logits(rows["x"]), torch.as_tensor(rows["y"])
            predictions.append(found)
        return predictions, float(comparison_row(run.summary)[METRIC])


def scores_of_run(config: Path, overrides: list[str]) -> tuple[float, float]:
    """Train a run and return its balanced accuracy without and with fitted offsets.

    Args:
        config: Configuration file.
        overrides: Changes to the configuration.

    Returns:
        The means over clients on the global test.
    """
    predictions, reported = predict_global_sets(config, overrides)
    plain, corrected = [], []
    for found in predictions:
        logits, y = found["common_test"]
        plain.append(balanced_accuracy(logits, y))
        fitted = with_fitted_offsets(*found["common_validation"], logits)
        corrected.append(balanced_accuracy(fitted, y))
    if abs(statistics.fmean(plain) - reported) > 1e-4:
        raise RuntimeError(f"balanced accuracy {statistics.fmean(plain)}, in the run {reported}")
    return statistics.fmean(plain), statistics.fmean(corrected)


def cell(scores: Sequence[float]) -> str:
    """Format the mean and the standard deviation of scores in percent."""
    deviation = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{100 * statistics.fmean(scores):.1f}{deviation}"


def row_of(
    results: BenchmarkResults, name: str, method: str, seeds: list[int], extra: list[str]
) -> list[str]:
    """Repeat the runs of a method without components and return the cells of its row.

    Args:
        results: The archived results.
        name: Name of the federation.
        method: Name of the method.
        seeds: Seeds of the runs.
        extra: Further changes to the configuration.
    """
    config = results.benchmark.federations[name].config
    scores = results.scores[name]
    found = [
        scores_of_run(config, [*results.run_overrides(name, (method, "none"), seed), *extra])
        for seed in seeds
    ]
    with_components = scores.by_seed((method, "all"), METRIC)
    plain, corrected = zip(*found, strict=True)
    return [cell(plain), cell(corrected), cell([with_components[seed] for seed in seeds])]


def main() -> None:
    """Print a table with a row for each method."""
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
    seeds = options.seeds or results.benchmark.protocol.seeds
    methods, extra = METHODS, [SERIAL]
    if options.quick:
        methods, seeds, extra = METHODS[:1], seeds[:1], [SERIAL, "rounds=1"]
    titles = ["Method", "No components", "Offsets fitted with labels", "Components"]
    rows = [
        [algorithm_name(method), *row_of(results, options.federation, method, seeds, extra)]
        for method in methods
    ]
    print(markdown_table(titles, rows, ["left", "right", "right", "right"]))


if __name__ == "__main__":
    main()
