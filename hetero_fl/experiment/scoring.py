"""Scoring the saved models of a run on any data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hetero_fl.config.source import SourceConfig
from hetero_fl.data import Preprocess, load_source, with_test
from hetero_fl.errors import UserError, nearest
from hetero_fl.metrics import score
from hetero_fl.reporting.run import Run

CACHE = Path("~/.cache/hetero_fl")


def evaluate(
    run: Run | str | Path, data: str, client: str | None = None, home: bool = False
) -> dict[str, dict[str, Any]]:
    """Metrics by model (client id, or "server") on the test split of a data set.

    `data`: a source's name, or a local file (`.npz` in the MedMNIST layout, a table, an image folder); `client`: that model
    only; `home`: read as on the client's own examples (with its label frequencies). Raises UserError if the set does not
    fit the models.
    """
    run = run if isinstance(run, Run) else Run(run)
    if client is not None and client not in run.models:
        raise UserError(f"--client: found '{client}'{nearest(client, run.models)}")
    dataset = with_test(load_source(_source(data), CACHE.expanduser(), "--data"))
    assert dataset.test is not None and dataset.test.y is not None
    results = {}
    for name, model in run.models.items():
        if client is not None and name != client:
            continue
        if (dataset.task.kind, dataset.task.outputs) != (model.task.kind, model.task.outputs):
            raise UserError(
                f"--data: {data} is {dataset.task.kind} with {dataset.task.outputs} outputs, "
                f"the models of {run.path} are {model.task.kind} with {model.task.outputs}"
            )
        view = Preprocess(**model.preprocess)
        found = view.shape(tuple(dataset.test.x.shape[1:]))
        if found != model.arch.input_shape:
            raise UserError(
                f"--data: examples of {data} are {found} to {name}, whose model takes {model.arch.input_shape}"
            )
        results[name] = score(model.task, model.logits(view(dataset.test.x), home), dataset.test.y)
    return results


def _source(data: str) -> SourceConfig:
    path = Path(data)
    if not path.exists():
        return SourceConfig(name=data)
    kind = "image_folder" if path.is_dir() else "npz" if path.suffix == ".npz" else "table"
    return SourceConfig(name=kind, path=data)
