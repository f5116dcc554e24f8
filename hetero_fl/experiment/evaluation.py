"""Scoring the saved models of a run on any data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetero_fl.config.data import SourceConfig
from hetero_fl.core.metrics import score
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, Preprocess, load_source, with_test
from hetero_fl.data.external import classes_from_labels, match_columns, source_with_task
from hetero_fl.data.preprocessing import usable_rows
from hetero_fl.data.registry import reads_key
from hetero_fl.experiment.onboarding.transfer import TransferSource
from hetero_fl.reporting.run import Run
from hetero_fl.utils.code_permission import CodePermission, find_references
from hetero_fl.utils.errors import UserError, suggest_file, suggest_or_list
from hetero_fl.utils.text import pluralize

CACHE = Path("~/.cache/hetero_fl")


def evaluate(
    run: Run | str | Path,
    data: str,
    client: str | None = None,
    personal: bool = False,
    label: str | None = None,
    allow_code: bool | CodePermission = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return metrics by model (client id, or "server") on a data set: on its test split, or on all of a local file without one.

    Named classes and targets are matched by name, unnamed ones by number.

    Args:
        run: A finished run.
        data: A source's name, or a local file (`.npz` in the MedMNIST layout, a table, an image folder).
        client: Only this client's model.
        personal: Read as on the client's own examples, with its label frequencies.
        label: A table's column of labels (several: comma between them); None: that of the run's configuration.
        allow_code: Whether code that the run's files name may run.
        say: Called with a note if rows of the set are also training rows of the run; None: the note is a `UserWarning`.
            There is none if the run's own data cannot be had.

    Raises:
        UserError: The set does not fit the models.
    """
    run = Run.open(run, allow_code)
    CodePermission.from_argument(allow_code).check_written(find_references({"--data": data}))
    if client is not None and client not in run.models:
        raise UserError(f"--client: found '{client}'{suggest_or_list(client, run.models)}")
    dataset = load_as(run, data, label)
    # the rows that a federation on it holds out, too
    named = dataset if Path(data).exists() else with_test(dataset)
    examples = named.test or named.train
    results = {}
    for name, model in run.models.items():
        if client is not None and name != client:
            continue
        if not are_comparable(dataset.task, model.task):
            raise UserError(
                f"--data: {data} is {dataset.task.kind} with {dataset.task.outputs} outputs, "
                f"the models of {run.path} are {model.task.kind} with {model.task.outputs}"
            )
        view = Preprocess(**model.preprocess)
        raw = tuple(examples.x.shape[1:])
        if view.raw not in (None, raw):
            raise UserError(
                f"--data: examples of {data} are {raw}, the model of {name} was trained on {view.raw}"
            )
        found = view.shape(raw)
        if found != model.arch.input_shape:
            raise UserError(
                f"--data: examples of {data} are {found} to {name}, whose model takes {model.arch.input_shape}"
            )
        words = dataset.vocabulary.size if dataset.vocabulary else None
        if words != model.arch.vocabulary:
            one, other = (
                "no tokens" if n is None else f"tokens of {n:,} kinds"
                for n in (words, model.arch.vocabulary)
            )
            raise UserError(
                f"--data: examples of {data} are {one}, the model of {name} takes {other}"
            )
        whole = (
            torch.ones(len(examples), dtype=torch.bool)
            if view.missing is not None
            else usable_rows(examples.x, view)
        )
        if not bool(whole.all()):
            row = int((~whole).to(torch.uint8).argmax())
            raise UserError(
                f"--data: {data}: row {row}: a value is missing that the model of {name} has to see"
            )
        y = renumber_targets(examples.labels, dataset.task, model.task, f"--data: {data}")
        results[name] = score(
            model.task, model.logits(view(examples.x), personal), y, examples.unit
        )
    rows = f"the {pluralize(len(examples), 'row')} of {data}"
    if run.directory.finished and (
        note := TransferSource(run).overlap(examples.x, rows, "the models")
    ):
        if say is None:
            warnings.warn(note, UserWarning, stacklevel=2)
        else:
            say(note)
    return results


def are_comparable(found: Task, known: Task) -> bool:
    """Whether targets of one task can be those of the other; unnamed labels may be those that classes are named after."""
    if found.kind == known.kind == "multiclass" and known.numbers and not found.names:
        return True
    return (found.kind, found.outputs) == (known.kind, known.outputs)


def renumber_targets(y: Tensor, given_task: Task, known: Task, where: str) -> Tensor:
    """Targets with the classes, or the columns, numbered as the model's are, where both are named; unnamed labels are found
    among those that the model's classes are named after, if they are named after integers."""
    if known.numbers and not given_task.names:
        return classes_from_labels(y, known, where)
    if not given_task.names or not known.names or given_task.names == known.names:
        return y
    for name in given_task.names:
        if name not in known.names:
            raise UserError(
                f"{where} has '{name}', which the models do not know{suggest_or_list(name, known.names)}"
            )
    for name in known.names:
        if name not in given_task.names:
            raise UserError(
                f"{where} lacks '{name}', which the models know{suggest_or_list(name, given_task.names)}"
            )
    if known.kind == "multiclass":
        return torch.tensor([known.names.index(name) for name in given_task.names])[y]
    return y[:, [given_task.names.index(name) for name in known.names]]


def load_as(run: Run, data: str, label: str | None) -> Dataset:
    """Load a data set; a local file is read as the run read its own.

    That is for the same task, without its columns of groups and patients, and images at the same
    size.

    Args:
        run: The finished run.
        data: A source's name, or a local file or folder.
        label: A table's column of labels; None: that of the run's configuration.

    Raises:
        UserError: If there is no such data set, or it cannot be read in this way.
    """
    path = Path(data)
    # no name of a source is written like a path
    if not path.exists() and ":" not in data and (path.suffix or len(path.parts) > 1):
        raise UserError(f"--data: {data}: no such file or folder{suggest_file(path)}")
    source = _source_as(run, data, label)
    views = [model.preprocess for model in run.models.values()]
    missing = any(view.get("missing") or view.get("spans") for view in views)
    try:
        return order_columns(load_source(source, CACHE.expanduser(), "--data", missing), run)
    except UserError as error:  # the key that is missing or too many is a flag here
        raise UserError(str(error).replace("--data.label", "--label", 1)) from None


def _source_as(run: Run, data: str, label: str | None) -> SourceConfig:
    """Return the source that reads a data set as the run read its own."""
    path = Path(data)
    known = run.directory.config().get("data") or {}
    name = known.get("name")
    if label is None and (data == name or (path.is_file() and path.suffix != ".npz")):
        label = known.get("label")
    # how series and texts are cut and numbered
    cut = {key: known.get(key) or {} for key in ("series", "text") if reads_key(name, key)}
    if data == name or ("text" in cut and reads_key(data, "text")):
        return SourceConfig.model_validate({"name": data, "label": label, **cut})
    if reads_key(name, "windows"):
        cut["windows"] = known.get("windows")
    if ("series" in cut or "windows" in cut) and path.is_file():
        file = {"name": name, "path": data, "label": label, "group": known.get("group")}
        return SourceConfig.model_validate({**file, **cut})
    if "text" in cut and path.exists() and path.suffix != ".npz":
        return SourceConfig.model_validate({"name": "text", "path": data, "text": cut["text"]})
    if not path.exists():
        return SourceConfig(name=data, label=label)
    if path.is_dir():
        return SourceConfig(name="image_folder", path=data, label=label, size=known.get("size"))
    if path.suffix == ".npz":
        return SourceConfig(name="npz", path=data, label=label)
    model = next(iter(run.models.values()))
    table = SourceConfig(name="table", path=data, label=label)
    table = source_with_task(table, model.task, categories=model.categories)
    columns = _columns(path)
    own = {key: known[key] for key in ("group", "patient") if known.get(key) in columns}
    return table.model_copy(update=own)


def order_columns(dataset: Dataset, run: Run) -> Dataset:
    """The set with the columns, by name, in the order that the run's models know; what none of them has to see may be missing."""
    models = list(run.models.values())
    known = next((model.columns for model in models if model.columns), ())
    categories = next((model.categories for model in models if model.columns), ())
    if not known or not dataset.columns or dataset.columns == known:
        return dataset
    needed: set[str] = set()
    for model in models:
        view = Preprocess(**model.preprocess)
        if view.missing is None:
            needed.update(view.names(known))
    like = replace(dataset, name=f"of {run.path}", columns=known, categories=categories)
    found = dataset.columns
    parts: dict[str, Any] = {}
    for split, examples in dataset.splits().items():
        x, _ = match_columns(examples.x, found, like, f"--data: {dataset.name}", needed)
        parts[split] = replace(examples, x=x)
    return replace(dataset, columns=known, categories=categories, **parts)


def _columns(path: Path) -> list[str]:
    from hetero_fl.data.sources.table_files import read_frame  # loads pandas

    try:
        return list(map(str, read_frame(path).columns))
    except UserError as error:
        raise UserError(f"--data.{error}") from None
