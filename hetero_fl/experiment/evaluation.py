"""Evaluation of the saved models of a run on any data set."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetero_fl.config.data import SHARED_KEYS, SourceConfig
from hetero_fl.core.images import check_pixels
from hetero_fl.core.metrics import score
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import ColumnLayout, Dataset, Preprocess, load_source, with_test
from hetero_fl.data.external import (
    ROLE_KEYS,
    VALUE_KEYS,
    inherit_keys,
    source_with_task,
)
from hetero_fl.data.inference import logits_of_rows
from hetero_fl.data.labels import renumber_targets
from hetero_fl.data.preprocessing import usable_rows
from hetero_fl.data.registry import (
    has_documented_classes,
    reads_key,
    reads_own_npz,
    value_for_file,
)
from hetero_fl.data.sources.images import is_grouped
from hetero_fl.data.sources.npz_files import has_images
from hetero_fl.data.sources.objects import has_columns, to_dataset
from hetero_fl.experiment.client import column_name
from hetero_fl.experiment.preparation import note_on_training_rows, prepare_again
from hetero_fl.reporting.run import Run
from hetero_fl.utils.code_permission import AllowCode, check_code, code_of_caller, find_references
from hetero_fl.utils.errors import ArgumentError, UserError, printable, suggest_file
from hetero_fl.utils.text import pluralize

CACHE = Path("~/.cache/hetero_fl")
"""Folder for downloads, the default of `data.root`."""


def evaluate(
    run: Run | str | Path,
    data: Any,
    client: str | None = None,
    personal: bool = False,
    label: str | int | None = None,
    *,
    allow_code: AllowCode = False,
    log: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Compute the metrics of a finished run's models on a data set.

    The models are evaluated on the test split, or on all rows of a local file without a test split.
    Classes and targets are matched by name, and numbers are names of classes, too.

    Args:
        run: A finished run or its directory.
        data: Name of a data source; path of a local file or image folder; or examples of any type
            that `Client.data` accepts, such as a pair (x, y) of arrays. A file is a table, or a
            `.npz` file in the MedMNIST layout.
        client: Client id or "server". If None, all models are evaluated.
        personal: Whether each model predicts with the label frequencies of its client, as on the
            client's own examples.
        label: Label column of a table, or several columns separated by commas. If None, the label
            column that the configuration of the run names is used.
        allow_code: Whether code that the files of the run refer to may be executed.
        log: Function that is called with a warning if rows of the data set were training rows of
            the run. If None, a `UserWarning` is issued. Rows are compared only if the run has
            finished and its data is available.

    Returns:
        The metrics of each model, keyed by client id or "server".

    Raises:
        UserError: If the data set does not exist or does not fit the models, or if `client` has no
            model.

    Example:
        >>> from tempfile import mkdtemp
        >>> import hetero_fl
        >>> config = {"data": {"name": "digits"}, "algorithm": {"name": "fedavg"}, "rounds": 1}
        >>> overrides = ["clients.count=2", "output.plots=false", "output.report=false"]
        >>> run = hetero_fl.run(config, out=mkdtemp(), overrides=overrides)
        >>> scores = hetero_fl.evaluate(run, "digits", client="server")
        >>> sorted(scores["server"])[:3]
        ['accuracy', 'auroc', 'average_precision']
    """
    run = Run.open(run, allow_code)
    models = run.load_models(client)
    dataset = load_for_models(run, data, column_name(label), models, allow_code)
    title = str(data) if isinstance(data, str | Path) else dataset.name
    # A named source without a test split is split as in a federation. The name of the run's source
    # takes precedence over a file, as in `load_for_models`.
    configured = run.directory.config().get("data") or {}
    is_named = isinstance(data, str) and (data == configured.get("name") or not Path(data).exists())
    dataset_with_test = with_test(dataset) if is_named else dataset
    examples = dataset_with_test.test or dataset_with_test.train
    is_range_chosen = configured.get("range") is not None
    results = {}
    for name, model in models.items():
        y = targets_of_models(run, examples.labels, dataset, model.task, title)
        check_fits(name, model, dataset, title)
        preprocess = Preprocess.of_model(model)
        unusable = ~usable_rows(examples.x, preprocess)
        if preprocess.missing is None and bool(unusable.any()):
            place = examples.locate(int(unusable.to(torch.uint8).argmax()), "the data")
            raise ArgumentError(
                f"data: {title}: {place} has no value that the model of {name} needs"
            )
        check_pixels(
            examples.x, preprocess.pixel_range, f"data: {title}", complete=not is_range_chosen
        )
        logits = logits_of_rows(model, examples.x, personal)
        results[name] = score(model.task, logits, y, examples.unit, excluded=examples.excluded)
    for note in _notes_on_rows(run, examples.x, title):
        if log is None:
            warnings.warn(printable(note), UserWarning, stacklevel=2)
        else:
            log(note)
    return results


def _notes_on_rows(run: Run, x: Tensor, title: str) -> list[str]:
    """Return a note if rows were training rows of a finished run whose data is available."""
    if not run.directory.finished:
        return []
    try:
        prepared = prepare_again(run)
    except UserError:
        return []
    return note_on_training_rows(prepared, x, f"the {pluralize(len(x), 'row')} of {title}")


def targets_of_models(run: Run, y: Tensor, dataset: Dataset, known: Task, title: str) -> Tensor:
    """Convert targets of a data set to those of the models of a run.

    Args:
        run: The finished run.
        y: Targets.
        dataset: The data set.
        known: Task of the models.
        title: Name of the data set in messages.

    Raises:
        ArgumentError: If the targets do not match those of the models.
    """
    source = (run.directory.config().get("data") or {}).get("name")
    numbered = has_documented_classes(source, known)
    with data_argument():
        return renumber_targets(y, dataset.task, known, f"data: {title}", numbered=numbered)


def check_fits(name: str, model: SavedModel, dataset: Dataset, title: str) -> None:
    """Check that examples of a data set have the shape that a model requires.

    Args:
        name: Client id or "server".
        model: The model.
        dataset: The data set.
        title: Name of the data set in messages.

    Raises:
        ArgumentError: If the shapes or vocabularies differ.
    """
    preprocess = Preprocess.of_model(model)
    raw_shape = tuple(dataset.train.x.shape[1:])
    if preprocess.raw not in (None, raw_shape):
        raise ArgumentError(
            f"data: {title} has examples of shape {raw_shape}, "
            f"but the model of {name} was trained on {preprocess.raw}"
        )
    input_shape = preprocess.shape(raw_shape)
    if input_shape != model.arch.input_shape:
        raise ArgumentError(
            f"data: {title} has examples of shape {input_shape} after preprocessing, "
            f"but the model of {name} expects {model.arch.input_shape}"
        )
    tokens = dataset.vocabulary.size if dataset.vocabulary else 0
    if tokens != (model.arch.vocabulary or 0):
        raise ArgumentError(
            f"data: {title} has a vocabulary of {tokens:,} tokens, "
            f"but the model of {name} expects {model.arch.vocabulary or 0:,}"
        )


def load_for_models(
    run: Run,
    data: Any,
    label: str | None,
    models: Mapping[str, SavedModel],
    allow_code: AllowCode,
) -> Dataset:
    """Load a data set for the models of a run, with columns in the order of the run's.

    A local file is read with the settings of the run's data, such as the task, the image size, and
    the group and patient columns.

    Args:
        run: The finished run.
        data: Name of a data source, path of a local file or folder, or examples of any type that
            `Client.data` accepts.
        label: Label column of a table. If None, the label column of the run is used.
        models: The models that are applied to the data set, keyed by client id or "server".
        allow_code: Whether code that the name of the source refers to may be executed.

    Raises:
        UserError: If the data set does not exist, cannot be read with these settings, or does not
            have the columns of the run.
    """
    if not isinstance(data, str | Path):
        if label is None and has_columns(data):
            label = (run.directory.config().get("data") or {}).get("label")
        kind = next(iter(models.values())).task.kind
        return order_columns(to_dataset(data, "data", label, task=kind), models)
    name = str(data)
    path = Path(name)
    check_code(find_references({"--data": name}), "", code_of_caller(allow_code))
    # A missing file is reported here, unless the argument can be the name of a source.
    if not path.exists() and ":" not in name and (path.suffix or len(path.parts) > 1):
        raise ArgumentError(f"data: file or folder '{name}' not found{suggest_file(path)}")
    source = _source_as(run, name, label, models)
    preprocesses = [model.preprocess for model in models.values()]
    missing = any(p.get("missing") or p.get("spans") for p in preprocesses)
    with data_argument():
        return order_columns(load_source(source, CACHE.expanduser(), "data", missing), models)


@contextmanager
def data_argument() -> Iterator[None]:
    """Convert errors that name configuration keys to errors that name arguments.

    In error messages, the keys `data.name` and `data.path` become the argument `data`, and
    `data.label` becomes `label`. Advice to set keys is dropped. Other errors are raised unchanged.
    """
    try:
        yield
    except UserError as error:
        message = re.sub(r"^data\.(name|path)\b", "data", str(error))
        if not message.startswith("data"):
            raise
        message = re.sub(r"(;|, or) (set|remove)\b[^;]*\b(data|clients)\.[a-z].*$", "", message)
        raise ArgumentError(re.sub(r"^data\.label\b", "label", message)) from None


def _source_as(
    run: Run, data: str, label: str | None, models: Mapping[str, SavedModel]
) -> SourceConfig:
    """Return the source section for a data set, with the settings of the run's data."""
    path = Path(data)
    known = run.directory.config().get("data") or {}
    main = SourceConfig.model_validate(
        {key: value for key, value in known.items() if key in SourceConfig.model_fields}
    )
    if label is None and (data == main.name or (path.is_file() and path.suffix.lower() != ".npz")):
        label = main.label
    source = SourceConfig(name=data, label=label)
    is_own = SourceConfig.takes_arguments(data)
    if data == main.name and reads_key(data, "columns") and not is_own:
        return inherit_keys(source, main, ("columns", *ROLE_KEYS))
    if data == main.name:
        # The same rows: settings that select rows apply, too.
        same: dict[str, Any] = {
            key: value_for_file(source, key, getattr(main, key)) for key in VALUE_KEYS
        }
        if is_own:
            same |= {"path": main.path, "arguments": main.arguments}
        return source.model_copy(update=same)
    shared = [key for key in SHARED_KEYS if reads_key(main.name, key) and reads_key(data, key)]
    if shared or not path.exists():
        return inherit_keys(source, main)
    return _file_source(source, main, next(iter(models.values())))


def _file_source(source: SourceConfig, main: SourceConfig, model: SavedModel) -> SourceConfig:
    """Return the source section for a local file or folder.

    Args:
        source: Path of the file, as the name of the source, and the label column.
        main: Source of the run.
        model: A model of the run, whose task and text columns a table has.
    """
    path = Path(source.name)
    file = source.model_copy(update={"path": source.name})
    is_npz = path.suffix.lower() == ".npz"
    if path.is_file() and (reads_key(main.name, "series") or reads_key(main.name, "windows")):
        kept = {"series": value_for_file(file, "series", main.series), "group": main.group}
        return inherit_keys(file.model_copy(update={"name": main.name, **kept}), main)
    for kind in SHARED_KEYS:
        has_arrays = is_npz and reads_own_npz(kind) and not has_images(path)
        if reads_key(main.name, kind) and (has_arrays or not is_npz):
            return inherit_keys(SourceConfig(name=kind, path=source.name), main)
    if (path / "train_images.npy").is_file() or is_npz:
        stream = main.stream if path.is_dir() else None
        return file.model_copy(update={"name": "npz", "task": model.task.kind, "stream": stream})
    if path.is_dir():
        # Folders of sites may contain the folders of the classes.
        group = (main.group or "site") if is_grouped(path, model.task.output_names) else None
        kept = {key: getattr(main, key) for key in ("size", "follow_links", "stream")}
        return file.model_copy(update={"name": "image_folder", "group": group, **kept})
    table = file.model_copy(update={"name": "table"})
    table = source_with_task(table, model.task, model.categories, main=main)
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.columns import read_frame

    try:
        columns = list(map(str, read_frame(path, read=table.read).columns))
    except UserError as error:
        raise ArgumentError(f"data.{error}") from None
    copied = {key: getattr(main, key) for key in ("group", "patient")}
    return table.model_copy(update={k: name for k, name in copied.items() if name in columns})


def order_columns(dataset: Dataset, models: Mapping[str, SavedModel]) -> Dataset:
    """Reorder the columns of a data set to match the models of a run.

    Columns are matched by name. Columns that no model needs may be missing. If the data set or the
    models have no column names, the data set is returned unchanged.

    Args:
        dataset: The data set.
        models: The models that are applied to the data set, keyed by client id or "server".

    Raises:
        UserError: If a column that a model needs is missing.
    """
    known = next((model.columns for model in models.values() if model.columns), ())
    categories = next((model.categories for model in models.values() if model.columns), ())
    if not known or not dataset.columns or dataset.columns == known:
        return dataset
    needed: set[str] = set()
    for model in models.values():
        preprocess = Preprocess.of_model(model)
        if preprocess.missing is None:
            needed.update(preprocess.names(known))
    layout = ColumnLayout(known, categories=categories)
    parts: dict[str, Any] = {}
    for split, examples in dataset.splits().items():
        x = layout.match(
            examples.x,
            dataset.layout,
            f"data: {dataset.name}",
            needed=needed,
            owner="the run's data",
            may_have_more=True,
        )
        parts[split] = replace(examples, x=x)
    return replace(dataset, columns=known, categories=categories, **parts)
