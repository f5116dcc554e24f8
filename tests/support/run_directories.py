"""Synthetic run directories: learning curves, skewed labels and missing values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hetero_fl.core.metrics import summarize_clients
from hetero_fl.federation.store import read_checkpoint
from hetero_fl.reporting.report import write_report
from hetero_fl.reporting.run_directory import RunDirectory

Kind = Literal["binary", "multiclass", "multilabel", "regression"]
MODELS = ("cnn_bn_small", "cnn_bn_small", "resnet18", "resnet18", "cnn_bn_medium", "cnn_bn_medium")
GROUPS = ("small", "small", "large", "large", "shared", "shared")


@dataclass(frozen=True)
class Case:
    """Properties of a synthetic run."""

    clients: int = 6
    rounds: int = 12
    kind: Kind = "binary"
    classes: int = 2
    server: bool = True
    proxy: int = 500
    every: int = 1
    exchange: bool = True
    algorithm: str = "hybrid"
    simulated: bool = False
    failures: bool = False
    home: bool = True
    common: bool = True


def _scores(
    case: Case, level: float, rng: np.random.Generator, home: bool
) -> dict[str, float | None]:
    level = float(np.clip(level + rng.normal(0, 0.015), 0.02, 0.995))
    if case.kind == "regression":
        error = 8 * (1 - level) + 1.5
        return {"mae": error, "rmse": 1.3 * error, "r2": 1 - (1.3 * error / 9) ** 2}
    missing = home and case.kind == "multiclass" and rng.random() < 0.6
    return {
        "accuracy": min(0.99, level + (0.04 if home else 0.01)),
        "balanced_accuracy": level,
        "macro_f1": level - 0.01,
        "auroc": None if missing else 0.5 + 0.5 * level**0.7,
        "average_precision": 0.45 + 0.53 * level,
        "loss": 1.6 * (1 - level) + 0.08,
    }


def _matrix(counts: np.ndarray, recall: float, rng: np.random.Generator) -> list[list[int]]:
    classes = len(counts)
    rows = []
    for c, n in enumerate(counts):
        wrong = np.full(classes, (1 - recall) / max(classes - 1, 1))
        wrong[c] = recall
        rows.append(rng.multinomial(int(n), wrong / wrong.sum()).tolist())
    return rows


def _calibration(overconfident: float, rng: np.random.Generator) -> dict[str, Any]:
    bins = 15
    middle = (np.arange(bins) + 0.5) / bins
    count = np.where(middle < 0.5, 0, (600 * middle**6).astype(int))
    accuracy = np.clip(middle - overconfident * (middle - 0.4) + rng.normal(0, 0.03, bins), 0, 1)
    gap = np.abs(accuracy - middle)
    return {
        "ece": float((gap * count).sum() / count.sum()),
        "confidence": [float(m) if n else None for m, n in zip(middle, count, strict=True)],
        "accuracy": [float(a) if n else None for a, n in zip(accuracy, count, strict=True)],
        "count": count.tolist(),
    }


def write_run(path: Path, case: Case, seed: int = 0) -> RunDirectory:
    """Write all files that reporting reads."""
    rng = np.random.default_rng(seed)
    ids = [
        f"hospital_{i + 1}" if case.clients <= 12 else f"clinic_{i + 1:03d}"
        for i in range(case.clients)
    ]
    skill = dict(zip(ids, rng.normal(0, 0.05, case.clients), strict=True))
    algorithm = {"name": case.algorithm, "temperature": 2.0}
    run = RunDirectory.create(
        path,
        config={
            "name": "medical_hetero",
            "seed": 0,
            "rounds": case.rounds,
            "data": {
                "name": "chest_xray",
                "partition": {"kind": "dirichlet", "alpha": 0.5},
                "proxy": {"size": case.proxy},
            },
            "clients": {
                "count": case.clients,
                "per_round": None,
                "groups": [{"name": "hospital", "count": case.clients}],
            },
            "algorithm": algorithm,
            "evaluation": {"every": case.every},
        },
        environment={
            "python": "3.11.9",
            "torch": "2.5.1",
            "cpu": "a processor",
            "threads": 2,
            "device": "cpu",
        }
        | {"choices": ["serial executor: auto"], "packages": {"torch": "2.5.1", "timm": "1.0.9"}},
    )
    per_round = case.exchange * 40_000 * case.clients
    evaluations = []
    for r in range(1, case.rounds + 1):
        record: dict[str, Any] = {
            "round": r,
            "cohort": ids,
            "failed": {ids[1]: "loss or parameters of 'model' are not finite"}
            if case.failures and r == 2
            else {},
            "train_loss": {i: float(0.7 / r**0.5 + rng.normal(0, 0.02)) for i in ids},
            "up_bytes": per_round,
            "down_bytes": 2 * per_round,
            "seconds": {"training": 2.1, "evaluation": 0.4},
        }
        if r % case.every == 0 or r == case.rounds:
            reach = 1 - np.exp(-r / (0.35 * case.rounds))
            home = {i: _scores(case, 0.72 + 0.2 * reach + skill[i], rng, True) for i in ids}
            common = {i: _scores(case, 0.52 + 0.33 * reach + skill[i] / 2, rng, False) for i in ids}
            server = _scores(case, 0.55 + 0.33 * reach, rng, False) if case.server else None
            record |= {
                "personal": summarize_clients(home) if case.home else None,
                "global": summarize_clients(common) if case.common else None,
                "server": server,
                "validation": {
                    "personal": summarize_clients(
                        {i: _scores(case, 0.72 + 0.2 * reach, rng, True) for i in ids}
                    ),
                    "global": summarize_clients(
                        {i: _scores(case, 0.52 + 0.33 * reach, rng, False) for i in ids}
                    ),
                    "server": server,
                },
                "clients": {
                    i: {
                        "personal": home[i] if case.home else None,
                        "global": common[i] if case.common else None,
                    }
                    for i in ids
                },
            }
            evaluations.append(record)
        run.append_metrics(record)
    last = evaluations[-1]
    counts = np.zeros((case.clients, 0), int)
    if case.kind != "regression":
        share = rng.dirichlet(
            np.full(case.clients, 0.5 if case.classes < 20 else 0.3), case.classes
        ).T
        counts = (share * 180 * case.clients / case.classes).astype(int) + (case.classes < 5)
    rows = {
        i: dict(
            zip(
                ("train", "validation", "test"),
                (int(n * 0.6), int(n * 0.15), int(n * 0.25)),
                strict=True,
            )
        )
        for i, n in zip(
            ids, counts.sum(1) if counts.size else rng.integers(60, 500, case.clients), strict=True
        )
    }

    def reading(name: str) -> dict[str, Any] | None:
        if last[name] is None:
            return None
        chosen = evaluations[max(0, len(evaluations) - 3)]
        return {
            "last": last[name],
            "best_by_validation": {"round": chosen["round"], **chosen[name]},
        }

    run.write_json(
        "summary.json",
        {
            "name": "medical_hetero",
            "algorithm": case.algorithm,
            "seed": 0,
            "rounds_completed": case.rounds,
            "data": {
                "name": "chest_xray",
                "simulated": case.simulated,
                "n_train": int(sum(r["train"] for r in rows.values())),
                "n_proxy": case.proxy,
                "n_test": 624,
            },
            **{name: reading(name) for name in ("personal", "global", "server")},
            "clients": [
                {
                    "id": i,
                    "model": MODELS[k % 6],
                    "parameters": (24_018, 24_018, 11_169_218)[k % 3],
                    "n_train": rows[i]["train"],
                }
                | last["clients"][i]
                for k, i in enumerate(ids)
            ],
            "communication": {
                "up_bytes": per_round * case.rounds,
                "down_bytes": 2 * per_round * case.rounds,
            },
            "seconds": {
                "total": 2.7 * case.rounds,
                "training": 2.1 * case.rounds,
                "evaluation": 0.4 * case.rounds,
            },
            "privacy": None,
        },
    )
    _write_details(run, case, ids, counts, rows, skill, rng)
    return run


def _write_details(
    run: RunDirectory,
    case: Case,
    ids: list[str],
    counts: np.ndarray,
    rows: dict[str, dict[str, int]],
    skill: dict[str, float],
    rng: np.random.Generator,
) -> None:
    fashion = [
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ]
    labels = {2: ["normal", "pneumonia"], 10: fashion}.get(
        case.classes, [f"class {c}" for c in range(case.classes)]
    )
    tested = np.array([234, 390]) if case.classes == 2 else np.full(case.classes, 60)

    def matrix(found: np.ndarray, recall: float) -> Any:
        if case.kind == "multilabel":
            return [_matrix(np.array([600 - n, n]), recall, rng) for n in found]
        return _matrix(found, recall, rng)

    def read(make: Any) -> dict[str, Any]:
        if case.kind == "regression":
            return {i: {} for i in ids}
        readings = [
            name for name, there in (("personal", case.home), ("global", case.common)) if there
        ]
        return {
            i: {reading: make(k, i, reading) for reading in readings} for k, i in enumerate(ids)
        }

    run.write_json(
        "details.json",
        {
            "labels": labels if case.kind != "regression" else ["load"],
            "label_counts": {
                i: c.tolist() if c.size else [rows[i]["train"]]
                for i, c in zip(ids, counts, strict=True)
            },
            "proxy": case.proxy,
            "rows": rows,
            "clients": {
                i: {
                    "model": MODELS[k % 6],
                    "group": GROUPS[k % 6],
                    "shares": (["parameters", "predictions"], ["backbone", "predictions"])[
                        k % 6 > 3
                    ],
                    "preprocess": ("as it is", "normalized", "32×32 RGB")[k % 3],
                    "settings": {"optimizer": {"lr": 0.0005}, "epochs": 2} if k == 1 else {},
                    "scanner": ("", "contrast 0.7, blur 0.6", "noise 0.05")[k % 3],
                }
                for k, i in enumerate(ids)
            },
            "confusion": read(
                lambda k, i, r: (
                    matrix(counts[k] * 0.25, 0.9)
                    if r == "personal"
                    else matrix(tested, 0.82 + skill[i])
                )
            ),
            "calibration": read(
                lambda k, i, r: _calibration(0.1 if r == "personal" else 0.35, rng)
            ),
            "evaluated_when": "after aggregation, as deployed with the next broadcast",
            "about": "PneumoniaMNIST, CC BY 4.0",
            "notes": [
                "FedMD uses KL with T = 2 here.",
                "One client <b>hospital_2</b> has its own learning rate.",
            ],
        },
    )


def report_page(run: Path) -> str:
    """Write the report of a run directory and return the page."""
    return write_report(run).read_text(encoding="utf-8")


def files_of_newest(folder: Path) -> list[Path]:
    """Return the files that only the newest checkpoint has: its name, head, tree and states."""
    *_, previous, newest = sorted(folder.glob("*.ckpt"))
    head = newest.read_text()
    shared = read_checkpoint(previous)[1].names()
    names = {head, *read_checkpoint(newest)[1].names()} - shared
    return [newest, *(folder / "blobs" / name[:2] / name for name in sorted(names))]
