"""Directories of private runs do not contain label counts of clients."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hetero_fl import run
from hetero_fl.core.objectives import log_prior
from hetero_fl.experiment import prepare
from hetero_fl.reporting.formatting import task_of
from hetero_fl.reporting.plots.clients import plot_labels
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.report import report_facts
from tests.support.federations import config

RECORD = {"noise_multiplier": 1.0, "delta": 1e-4, "accountant": "rdp"}
CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-4}
ADJUSTED = {"name": "fedavg", "logit_adjustment": True}
ENCODINGS = ("<i4", "<i8", "<f4", "<f8")


def source_of(algorithm: dict[str, Any], privacy: dict[str, Any] | None) -> dict[str, Any]:
    return config(models="cnn_gn_small", algorithm=algorithm, privacy=privacy)


def label_counts(source: dict[str, Any]) -> dict[str, list[int]]:
    """Return the true label counts of every client's training, validation and test rows."""
    data, found = prepare(source).data, {}
    for client in data.client_ids:
        for split in ("train", "validation", "test"):
            y = data.columns(client, split, data.preprocess(client))["y"]
            found[f"{client}: {split}"] = torch.bincount(y, minlength=10).tolist()
    return found


def vectors(value: Any) -> Iterator[list[float]]:
    """Yield all lists of numbers in a JSON document, with rows and row sums of matrices."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from vectors(inner)
        yield from vectors(list(value.values()))
    elif isinstance(value, list):
        if value and all(isinstance(v, int | float) for v in value):
            yield [float(v) for v in value]
        for inner in value:
            if not isinstance(inner, int | float):
                yield from vectors(inner)
        if value and all(
            isinstance(v, list) and all(isinstance(n, int | float) for n in v) for v in value
        ):
            yield [float(sum(row)) for row in value]


def documents(path: Path) -> list[Any]:
    """Yield the JSON documents of a file: itself, its lines, or the metadata of a model."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return [json.loads((file.metadata() or {})["hetero_fl"])]
    if path.suffix == ".json":
        return [json.loads(path.read_text())]
    return (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.suffix == ".jsonl"
        else []
    )


def disclosed(folder: Path, counts: dict[str, list[int]]) -> set[str]:
    """Return the files of a run that contain label counts or frequencies in any encoding."""
    found = set()
    task = prepare(source_of(ADJUSTED, None)).federation.task
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        known = [vector for document in documents(path) for vector in vectors(document)]
        for numbers in counts.values():
            prior = log_prior(task, torch.tensor(numbers)).numpy()
            text = re.compile(
                rb"(?<![\d.])" + rb"(\.0)?[\s,;]+".join(b"%d" % n for n in numbers) + rb"(?![\d])"
            )
            encoded = [np.array(numbers).astype(kind).tobytes() for kind in ENCODINGS]
            encoded += [prior.astype(kind).tobytes() for kind in ENCODINGS[2:]]
            written = any(
                v == numbers or np.allclose(v, prior, atol=1e-6)
                for v in known
                if len(v) == len(numbers)
            )
            if written or text.search(content) or any(e in content for e in encoded):
                found.add(str(path.relative_to(folder)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "privacy"),
    [
        ({"name": "fedavg"}, RECORD),
        ({"name": "hybrid"}, RECORD),
        (ADJUSTED, CLIENT),
        (ADJUSTED, {**CLIENT, "unit": "local"}),
    ],
)
def test_private_run_directory_contains_no_label_counts(
    tmp_path: Path, algorithm: dict[str, Any], privacy: dict[str, Any]
) -> None:
    source = source_of(algorithm, privacy)

    finished = run({**source, "output": {}}, out=tmp_path / "run")

    assert disclosed(finished.path, label_counts(source)) == set()
    assert all(client["n_train"] > 0 for client in finished.summary["clients"])
    report = (finished.path / "report.html").read_text()
    assert "label counts" in report.lower() and "Labels of each client" not in report


@pytest.mark.slow
def test_public_run_directory_shows_label_counts(tmp_path: Path) -> None:
    source = source_of(ADJUSTED, None)

    finished = run(source, out=tmp_path / "run")

    models = {
        f"models/{folder}{client['id']}.safetensors"
        for client in finished.summary["clients"]
        for folder in ("", "best_personal/", "best_global/")
    }
    assert disclosed(finished.path, label_counts(source)) == {"details.json", *models}


def test_plots_of_a_private_run_show_rows_and_the_global_test(tmp_path: Path) -> None:
    finished = run(source_of({"name": "fedavg"}, RECORD), out=tmp_path / "run")
    summary, details = finished.summary, finished.directory.details()

    shown = plot_labels(summary, details).axes[0].get_yticklabels()

    assert [text.get_text() for text in shown] == ["train", "validation", "test"]
    picture = {"data": "", "width": 100}
    caption = render(
        "report_pictures.html", **report_facts(summary, details), pictures={"labels": picture}
    )
    assert "<b>Rows of each client.</b>" in caption and "Label counts are not shown" in caption
    assert {test for found in details["confusion"].values() for test in found} == {"global"}


@pytest.mark.slow
def test_private_run_shows_no_true_values_of_a_forecast(tmp_path: Path) -> None:
    config_file = Path(__file__).parents[2] / "configs" / "traffic_hetero.yaml"
    quick = [
        "rounds=1",
        "clients.defaults.steps=2",
        "data.test_limit=150",
        "data.proxy.size=60",
        "runtime.threads=1",
    ]
    private = [
        "privacy={noise_multiplier: 1.0, accountant: rdp}",
        "algorithm.name=fedmd",
        "output.plots=false",
    ]

    finished = run(config_file, overrides=[*quick, *private], out=tmp_path / "run")

    assert finished.directory.details()["forecast"] == {}


def test_task_of_a_private_run_needs_no_confusion_matrix() -> None:
    summary = {"personal": {"last": {"auroc": 0.5, "accuracy": 0.5}}}
    details = {"kind": "multilabel", "confusion": {"site_1": {}}, "labels": ["a", "b"]}

    assert task_of(summary, details).kind == "multilabel"
