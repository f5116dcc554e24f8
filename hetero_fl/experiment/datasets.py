"""The data sets of a federation that is created from objects."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hetero_fl.core.task import Task
from hetero_fl.data import Dataset
from hetero_fl.data.client_sources import OWN_DATA
from hetero_fl.data.external import match_to_common
from hetero_fl.data.labels import (
    ALL_LABELS,
    check_num_classes,
    common_classes,
    numbered_task,
    read_labels,
    with_task,
)
from hetero_fl.data.registry import load_section
from hetero_fl.data.sources.objects import is_frame, is_source, to_dataset, to_pair
from hetero_fl.experiment.client import Client
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.objects import OBJECT_PREFIX, name_object


@dataclass(frozen=True)
class _Part:
    """Data of a client or of the federation, and the columns of its labels and patients.

    Attributes:
        data: The data, as the program passes it.
        label: Column of the labels.
        patient: Column of the patients, or the patient of each row.
    """

    data: Any
    label: str | None = None
    patient: Any = None


class FederationDatasets:
    """The data sets of a federation, which are converted together.

    All data sets have the same classes, because a client's examples may lack some classes.

    Args:
        clients: The clients.
        sets: The arguments `data`, `test`, `validation` and `proxy` of the federation that are not
            None, keyed by name.
        label: Column of the labels in data frames.
        patient: Column of the patients in data frames, or the patient of each row of `data`.
        num_classes: Number of classes of labels that are class numbers from 0. If None, the classes
            are the distinct labels of all data sets.
        task: Kind of the task, or the task. If None, the labels determine the task.

    Attributes:
        datasets: The data sets, keyed by the name that error messages use for them.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        sets: Mapping[str, Any],
        label: str | None,
        *,
        patient: Any = None,
        task: Task | str | None = None,
        num_classes: int | None = None,
    ) -> None:
        for client in clients:
            _check_client(client, sets)
        if "validation" in sets and "test" not in sets and "data" not in sets:
            raise UserError("validation: requires a global test set; pass test=...")
        self._named = plain_source(sets.get("data"))
        self._client_sources = {
            str(client.data["name"]) for client in clients if is_source(client.data)
        }
        parts = _parts(clients, sets, label, patient)
        categories = _shared_categories(parts)
        proxy = parts.pop("proxy", None)
        self.datasets = _read_parts(parts, categories, task, num_classes)
        if self._named and ("test" in sets or "validation" in sets):
            self.datasets["data"] = load_section(self._named)
        _share_task(self.datasets, task, num_classes)
        for client in clients:
            own = {
                name: self.datasets.pop(_place(client, name))
                for name in client.parts()
                if name != "data"
            }
            if own:
                main = self.datasets[_place(client)]
                self.datasets[_place(client)] = _with_splits(
                    main, own, f"clients: '{client.name}': "
                )
        self._proxy_size = None
        if proxy is not None and isinstance(proxy.data, numbers.Integral):
            self._proxy_size = _check_proxy_size(proxy.data, sets)
        elif proxy is not None:
            self.datasets["proxy"] = to_dataset(
                proxy.data, "proxy", proxy.label, categories, proxy.patient, labeled=False
            )
        splits = ["validation", "test"]
        given = {name: self.datasets[name] for name in splits if name in self.datasets}
        if "data" in self.datasets or "test" in given:
            main = self.datasets["data"] if "data" in self.datasets else _no_rows(given["test"])
            self.datasets["common"] = _with_splits(main, given)

    def config(self) -> dict[str, Any]:
        """Return the section `data` of the configuration."""
        section: dict[str, Any] = dict(self._named or {"name": OBJECT_PREFIX})
        if not self._named and not self.datasets and len(self._client_sources) == 1:
            # The global sets are held out of the files of the clients.
            section = {"name": next(iter(self._client_sources))}
        if "common" in self.datasets:
            section = self._source("common")
            common = self.datasets["common"]
            if common.validation is None and not len(common.train):
                section["validation"] = 0.0
        if self._proxy_size is not None:
            section["proxy"] = {"size": self._proxy_size}
        elif "proxy" in self.datasets:
            section["proxy"] = {"source": self._source("proxy")}
        return section

    def client_config(self, client: Client) -> dict[str, Any]:
        """Return the key `data` of a client's section, or nothing for a client without own data."""
        if client.data is None:
            return {}
        if is_source(client.data):
            return {"data": dict(client.data)}
        return {"data": self._source(_place(client))}

    def _source(self, place: str) -> dict[str, Any]:
        """Return a data set as a source of the configuration."""
        title = place.removeprefix("clients: ").replace("'", "")
        return {"name": name_object(title, self.datasets[place])}


def _place(client: Client, part: str = "data") -> str:
    return f"clients: '{client.name}': {part}"


def _check_client(client: Client, sets: Mapping[str, Any]) -> None:
    """Raise UserError if the federation cannot use the data of a client."""
    if client.data is None and "data" not in sets:
        raise UserError(
            f"{_place(client)}: missing; pass data to the client, or data=... to divide to the "
            "federation"
        )
    own = [part for part in client.parts() if part != "data"]
    if own and (client.data is None or is_source(client.data)):
        raise UserError(
            f"{_place(client, own[0])}: requires data=... as arrays, a data frame or a data set"
        )
    if isinstance(client.data, Dataset):
        own += [part for part in client.data.splits() if part != "train"]
    if own and "test" not in sets and "data" not in sets:
        raise UserError(
            f"{_place(client, own[0])}: requires a global test set; pass Federation(test=...)"
        )


def _check_proxy_size(size: Any, sets: Mapping[str, Any]) -> int:
    """Return the number of rows to hold out as a proxy set, which must be possible."""
    if isinstance(size, bool) or size < 1:
        raise UserError(f"proxy: expected examples, or a number of rows >= 1, got {size}")
    if "test" in sets and "data" not in sets:
        raise UserError(
            f"proxy: {size} rows cannot be held out of the clients' data if `test` is given; pass "
            "public examples"
        )
    return int(size)


def _parts(
    clients: Sequence[Client], sets: Mapping[str, Any], label: str | None, patient: Any
) -> dict[str, _Part]:
    """Return all data except sources, keyed by the name that error messages use for it.

    A column of the federation, or of a client, applies to all its data frames that have the column.

    Raises:
        UserError: If a column or the patients apply to no data.
    """
    parts: dict[str, _Part] = {}
    for client in clients:
        for name, data in client.parts().items():
            if name == "data" and is_source(data):
                continue
            is_used = name == "data" or _has_column(data, client.patient)
            parts[_place(client, name)] = _Part(
                data, client.label, client.patient if is_used else None
            )
    for name, data in sets.items():
        if name != "data" or not plain_source(data):
            parts[name] = _Part(data)
    _use_column(parts, "label", label)
    if patient is None or isinstance(patient, str):
        _use_column(parts, "patient", patient)
    elif "data" not in parts:
        raise UserError(
            "patient: has one entry for each row of data=..., which is not given as arrays or a "
            "data set; pass Client(patient=...) for the rows of a client"
        )
    else:
        parts["data"] = replace(parts["data"], patient=patient)
    # The items of a torch data set are read once.
    return {
        place: part if place == "proxy" else replace(part, data=to_pair(part.data, place))
        for place, part in parts.items()
    }


def _use_column(parts: dict[str, _Part], key: str, column: str | None) -> None:
    """Set the column of labels or patients of all data that has the column, in place."""
    if column is None:
        return
    users = {
        place: part
        for place, part in parts.items()
        if getattr(part, key) is None and _has_column(part.data, column)
    }
    own = [getattr(part, key) for part in parts.values()]
    if not users and not any(isinstance(value, str) and value == column for value in own):
        known = {name for part in parts.values() for name in _column_names(part.data)}
        raise UserError(
            f"{key}: no data frame or Hugging Face Dataset without a {key} of its own has a column "
            f"'{column}'{suggest_or_list(column, known)}"
        )
    for place, part in users.items():
        parts[place] = replace(part, **{key: column})


def _has_column(data: Any, column: Any) -> bool:
    """Return whether the data has a column of this name, or all columns that it names."""
    if not isinstance(column, str):
        return False
    names = set(_column_names(data))
    return column in names or {part.strip() for part in column.split(",")} <= names


def _column_names(data: Any) -> list[str]:
    columns = data.columns if is_frame(data) else getattr(data, "column_names", None) or ()
    return list(map(str, columns))


def _shared_categories(parts: Mapping[str, _Part]) -> dict[str, tuple[str, ...]] | None:
    """Return the values of the text columns of all data frames, or None if there are no frames.

    Columns of patients are left out.
    """
    frames = {}
    for place, part in parts.items():
        if is_frame(part.data):
            is_column = isinstance(part.patient, str)
            owners = [c for c in part.data.columns if is_column and str(c) == part.patient]
            frames[place] = (part.data.drop(columns=owners), part.label)
    if not frames:
        return None
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.frames import categories_of_frames

    return categories_of_frames(frames)


def _read_parts(
    parts: Mapping[str, _Part],
    categories: Mapping[str, tuple[str, ...]] | None,
    task: Task | str | None,
    num_classes: int | None,
) -> dict[str, Dataset]:
    """Convert the data, whose labels determine the task together.

    Args:
        parts: The data, keyed by the name that error messages use for it.
        categories: Text columns to one-hot encode, with their values.
        task: Kind of the task, or the task.
        num_classes: Number of classes, or None.

    Raises:
        UserError: If the data is invalid, or labels do not match each other or the task.
    """
    if isinstance(task, Task):
        check_num_classes(task, num_classes)
    kind = task.kind if isinstance(task, Task) else task
    labels: dict[str, Any] = {}
    for place, part in parts.items():
        labels |= _labels(part, place, kind)
    found: Task | str | None = kind
    targets: dict[str, Any] = {}
    notes: list[str] = []
    if labels:
        found, targets, notes = read_labels(labels, ALL_LABELS, task=kind, num_classes=num_classes)
    # Notes that do not name their data are given once.
    pending = [] if isinstance(task, Task) else notes
    known: set[str] = set()
    datasets = {}
    for place, part in parts.items():
        data = part.data
        if is_frame(data) and part.label is None:
            choices = suggest_or_list("", _column_names(data))
            raise UserError(f"{place}: label: missing; pass Federation(label=...){choices}")
        is_pair = isinstance(data, tuple | list)
        if is_pair:
            data = (data[0], targets[f"{place}: y"])
        dataset = to_dataset(data, place, part.label, categories, part.patient, task=found)
        if is_pair and isinstance(found, Task):
            # The targets are class numbers, but the labels need not be.
            dataset = replace(dataset, task=found)
        remarks = [note for note in (*pending, *dataset.notes) if note not in known]
        datasets[place] = replace(dataset, notes=tuple(remarks))
        known.update(remarks)
        pending = []
    return datasets


def _labels(part: _Part, place: str, kind: str | None) -> dict[str, Any]:
    """Return the labels of a pair or a data frame, keyed by their place.

    The result is empty for other data, and for a data frame without the column of the labels, which
    `to_dataset` reports.
    """
    if isinstance(part.data, tuple | list):
        return {f"{place}: y": part.data[1]}
    if not is_frame(part.data) or part.label is None:
        return {}
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.columns import normalize_frame
    from hetero_fl.data.sources.tables.frames import label_columns, label_values

    table = normalize_frame(part.data, place)
    columns = label_columns(table.columns, part.label)
    if not set(columns) <= set(table.columns) or not len(table):
        return {}
    return {f"{place}: column '{part.label}'": label_values(table[columns], place, kind)}


def plain_source(data: Any) -> dict[str, Any] | None:
    """Return the configuration section of a data source.

    Args:
        data: The name of a source, a dictionary with the keys of a source, or other data.

    Returns:
        The section, or None if `data` is neither a name nor a dictionary.
    """
    if isinstance(data, str):
        return {"name": data}
    return dict(data) if is_source(data) else None


def _share_task(
    datasets: dict[str, Dataset], task: Task | str | None, num_classes: int | None
) -> None:
    """Give all data sets the given task, or the same classes, in place.

    Args:
        datasets: The data sets, keyed by the name that error messages use for them.
        task: The task or its kind.
        num_classes: Number of classes, or None.

    Raises:
        UserError: If a data set has another kind of task, a class or an output is unknown, or some
            labels are class names and others numbers.
    """
    kind = "multiclass" if num_classes is not None else getattr(task, "kind", task)
    if kind is not None and not datasets:
        raise UserError("task, num_classes: apply to data in memory, not to sources; remove them")
    tasks = {place: dataset.task for place, dataset in datasets.items()}
    for place, own in tasks.items():
        if kind not in (None, own.kind):
            raise UserError(f"{place}: expected a {kind} task, got {own.kind}")
    if isinstance(task, Task):
        known = numbered_task(task, tasks.values())
        owner = "task"
    elif {each.kind for each in tasks.values()} != {"multiclass"}:
        return
    elif num_classes is not None:
        known = Task("multiclass", num_classes)
        owner = f"num_classes={num_classes}"
    else:
        known = common_classes(tasks)
        owner = "the federation"
    for place, dataset in datasets.items():
        datasets[place] = with_task(dataset, known, place, owner)


def _no_rows(dataset: Dataset) -> Dataset:
    """Return a data set without training rows, for clients that all have data of their own."""
    return replace(dataset, name=OWN_DATA, train=dataset.train.select_rows(torch.arange(0)))


def _with_splits(main: Dataset, given: Mapping[str, Dataset], where: str = "") -> Dataset:
    """Return a data set with other validation or test examples.

    Args:
        main: The data set.
        given: Data sets with the classes and columns of `main`, keyed by the split that they
            replace. A data set that has this split is used only with the rows of the split.
        where: Start of the names of these data sets in messages.

    Raises:
        UserError: If the examples do not match those of `main`.
    """
    shape = tuple(main.train.x.shape[1:])
    changed: dict[str, Any] = {}
    for split, dataset in given.items():
        own = replace(dataset, train=dataset.splits().get(split, dataset.train))
        examples = match_to_common(own, main, f"{where}{split}")
        found = tuple(examples.x.shape[1:])
        if found != shape:
            raise UserError(
                f"{where}{split}: expected examples of shape {shape} as in the training data, got "
                f"{found}"
            )
        changed[split] = examples
    return replace(main, **changed)
