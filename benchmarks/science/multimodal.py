#!/usr/bin/env python3
"""Compare single modalities, both modalities and federations for each kind of hospital.

    python -m benchmarks multimodal [--seeds 0,1,2] [--out runs/multimodal] [key=value …]

The benchmark runs `configs/medical_multimodal.yaml` for each row of the table and each seed, one
run at a time. After each run, it updates `multimodal.md` and `multimodal.png` in `--out`. Finished
runs are not repeated. All rows train with logit adjustment, so they differ only in the modalities
that clients use and in what clients share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import hetero_fl
from benchmarks.common import seed_list
from hetero_fl.config.data import SourceConfig
from hetero_fl.core.metrics import score
from hetero_fl.data import Dataset, load_source
from hetero_fl.data.inference import preprocess_inputs
from hetero_fl.reporting.formatting import MISSING
from hetero_fl.reporting.rendering import markdown_table
from hetero_fl.reporting.run import Run

ROOT = Path(__file__).resolve().parents[2]
ALONE = ["algorithm.name=local", "algorithm.logit_adjustment=true"]
ROWS = {
    "images only": [*ALONE, "clients.groups.0.preprocess={columns: [image], missing: null}"],
    "genes only": [*ALONE, "clients.groups.0.preprocess={columns: [genes]}"],
    "both, without federation": ALONE,
    "both, FedAvg of the image backbone": [
        "algorithm.name=fedavg",
        "algorithm.logit_adjustment=true",
    ],
    "both, and distillation on public images (Hybrid)": ["algorithm.name=hybrid"],
}
KINDS = {
    "university": "universities (both)",
    "clinic": "clinics (images)",
    "institute": "institutes (genes)",
}
# Combinations of row and kind of hospital in which the modalities of the hospital do not change.
SAME = {("images only", "institute"), ("genes only", "clinic")}
METRICS = {"auroc": "AUROC", "balanced_accuracy": "balanced accuracy"}
# Means over the hospitals for each seed, keyed by kind of hospital and score.
Figures = dict[str, dict[str, list[float]]]


def run_of(row: str, seed: int, out: Path, changes: list[str]) -> Run:
    """Return the run of a row with a seed, which is executed unless it has finished."""
    path = out / f"{''.join(c if c.isalnum() else '_' for c in row)}-seed{seed}"
    if not (path / "summary.json").exists():
        quick = [
            "runtime.executor=serial",
            "runtime.threads=1",
            "output.plots=false",
            "output.report=false",
        ]
        overrides = [*ROWS[row], f"seed={seed}", "evaluation.every=15", *quick, *changes]
        return hetero_fl.run(
            ROOT / "configs" / "medical_multimodal.yaml",
            overrides=overrides,
            out=path,
            resume=path.exists(),
        )
    return Run(path)


def figures(run: Run, dataset: Dataset) -> dict[str, dict[str, float]]:
    """Compute the mean scores of each kind of hospital.

    The scores are those on the global test, on the local tests, and, for models with both
    modalities, on the global test with images only.

    Args:
        run: A finished run.
        dataset: The data set with both modalities.

    Returns:
        The scores, keyed by kind of hospital and by name.
    """
    found: dict[str, dict[str, list[float]]] = {}
    assert dataset.test is not None and dataset.test.y is not None
    image = dataset.test.x[:, :784].reshape(-1, 1, 28, 28)
    for client in run.summary["clients"]:
        mine = found.setdefault(client["id"].split("_")[0], {})
        for reading in ("global", "personal"):
            for metric in METRICS:
                if client[reading][metric] is not None:
                    mine.setdefault(f"{reading} {metric}", []).append(client[reading][metric])
        model = run.models[client["id"]]
        if len(model.preprocess["blocks"]) == 2:
            single = score(
                model.task, model.logits(preprocess_inputs(model, {"image": image})), dataset.test.y
            )
            mine.setdefault("image auroc", []).append(float(single["auroc"] or 0))
    return {
        kind: {name: statistics.fmean(values) for name, values in each.items()}
        for kind, each in found.items()
    }


def cell(values: list[float]) -> str:
    """Format the mean and standard deviation over the seeds in percent."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):.1f} ± {100 * spread:.1f}"


def table(found: dict[str, Figures], metric: str) -> str:
    """Format a Markdown table of one metric, as global test / local test.

    Args:
        found: Scores, keyed by row.
        metric: Name of the metric.
    """
    header = [METRICS[metric], *KINDS.values()]
    if metric == "auroc":
        header.append("universities, images only")
    lines = []
    for row, kinds in found.items():
        cells = [row]
        for kind in KINDS:
            scores = kinds.get(kind, {})
            is_reported = (row, kind) not in SAME and f"global {metric}" in scores
            cells.append(
                f"{cell(scores[f'global {metric}'])} / {cell(scores[f'personal {metric}'])}"
                if is_reported
                else MISSING
            )
        if metric == "auroc":
            values = kinds.get("university", {}).get("image auroc")
            cells.append(cell(values) if values else MISSING)
        lines.append(cells)
    return markdown_table(header, lines, ("left", *["right"] * (len(header) - 1)))


def gains(found: dict[str, Figures]) -> str:
    """Format the gains of federations over local training with both modalities for each seed."""
    base = found.get("both, without federation", {})
    lines = []
    for row, kinds in found.items():
        if not base or "only" in row or "without" in row:
            continue
        for kind, words in KINDS.items():
            lines.append([row, words, *(by_seed(base[kind], kinds[kind], m) for m in METRICS)])
    header = ["Gain by seed", "hospitals", *METRICS.values()]
    return markdown_table(header, lines, ("left", "left", "right", "right"))


def by_seed(before: dict[str, list[float]], after: dict[str, list[float]], metric: str) -> str:
    """Format the differences of a score on the global test for each seed, in points."""
    pairs = zip(before[f"global {metric}"], after[f"global {metric}"], strict=False)
    return ", ".join(f"{100 * (b - a):+.1f}".replace("-", "−") for a, b in pairs)


def draw(found: dict[str, Figures], path: Path) -> None:
    """Plot the global test AUROC for each kind of hospital, as the mean and for each seed.

    Args:
        found: Scores, keyed by row.
        path: The image file to write.
    """
    from hetero_fl.reporting.plots import style

    with style.plot_style():
        figure = style.figure(4.2)
        axes = figure.subplots()
        height = 0.75 / len(found)
        for i, (row, kinds) in enumerate(found.items()):
            label: str | None = row
            for j, kind in enumerate(KINDS):
                values = kinds.get(kind, {}).get("global auroc")
                if values is None or (row, kind) in SAME:
                    continue
                place = j + (i - (len(found) - 1) / 2) * height
                color = style.CATEGORIES[i]
                axes.plot(statistics.fmean(values), place, "o", color=color, ms=7, label=label)
                axes.plot(
                    values, [place] * len(values), "o", color=color, ms=3.5, alpha=0.5, zorder=1
                )
                label = None
        for line in range(1, len(KINDS)):
            axes.axhline(line - 0.5, color=style.LIGHT, linewidth=0.8)
        axes.set_yticks(range(len(KINDS)), list(KINDS.values()))
        axes.set_ylim(len(KINDS) - 0.5, -0.5)
        axes.set_xlabel("global test AUROC, mean over hospitals (small: each seed)")
        figure.legend(loc="outside lower center", ncols=2)
        path.write_bytes(style.to_png(figure))


def main() -> None:
    """Execute missing runs, and write the tables and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=seed_list, default=[0, 1, 2], help="seeds, separated by commas (0,1,2)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/multimodal"))
    parser.add_argument("changes", nargs="*", help="key=value for every run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    dataset = load_source(SourceConfig(name="xray_genes"), Path(), missing=True)
    raw: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in args.seeds:
        for row in ROWS:
            raw.setdefault(row, {})[seed] = figures(
                run_of(row, seed, args.out, args.changes), dataset
            )
            found = {r: _by_kind(list(seeds.values())) for r, seeds in raw.items()}
            tables = [*(table(found, metric) for metric in METRICS), gains(found)]
            (args.out / "multimodal.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
            (args.out / "multimodal.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
            draw(found, args.out / "multimodal.png")
            print(f"seed {seed}: {row}", file=sys.stderr)
    print((args.out / "multimodal.md").read_text(encoding="utf-8"))


def _by_kind(seeds: list[dict[str, dict[str, float]]]) -> Figures:
    return {
        kind: {name: [s[kind][name] for s in seeds if name in s[kind]] for name in seeds[0][kind]}
        for kind in seeds[0]
    }


if __name__ == "__main__":
    main()
