"""The data sets of a federation that is created from objects."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset
from hetero_fl.data.client_sources import OWN_DATA
from hetero_fl.data.dataset import Examples
from hetero_fl.data.external import match_to_common
from hetero_fl.data.labels import (
    ALL_LABELS,
    check_num_classes,
    common_classes,
    numbered_task,
    read_labels,
    with_task,
)
from hetero_fl.data.registry import load_source
from hetero_fl.data.sources.objects import is_frame, is_source, to_dataset, to_pair
from hetero_fl.experiment.client import Client
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.objects import OBJECT_PREFIX, name_object


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
        self._named = _plain_source(sets.get("data"))
        self._client_sources = {
            str(client.data["name"]) for client in clients if is_source(client.data)
        }
        given = {
            _place(client, part): (data, client.label or _column(data, label))
            for client in clients
            for part, data in client.parts().items()
            if not is_source(data)
        }
        given |= {
            name: (data, _column(data, label))
            for name, data in sets.items()
            if name != "proxy" and not (name == "data" and self._named)
        }
        users = [data for c in clients if c.label is None for data in c.parts().values()]
        users += sets.values()
        if label is not None and not any(_column(data, label) for data in users):
            raise UserError(
                "label: no data frame or Hugging Face Dataset without a label of its own has a "
                f"column '{label}'{_suggest_column(label, users)}"
            )
        self._patients = _patients(clients, sets, patient)
        pairs = {place: (to_pair(data, place), column) for place, (data, column) in given.items()}
        owners = {place: own for place, own in self._patients.items() if isinstance(own, str)}
        self._categories = _shared_categories(
            {**pairs, "proxy": (sets.get("proxy"), _column(sets.get("proxy"), label))},
            owners,
        )
        read, found, notes = _read_common_labels(pairs, task, num_classes)
        self.datasets = {
            place: to_dataset(
                data,
                place,
                pairs[place][1],
                self._categories,
                self._patients.get(place),
                task=found,
            )
            for place, data in read.items()
        }
        for place, data in read.items():
            if isinstance(data, tuple) and isinstance(found, Task):
                # The targets are class numbers, but the labels need not be.
                self.datasets[place] = replace(self.datasets[place], task=found)
        _drop_repeated_notes(self.datasets)
        if self._named and ("test" in sets or "validation" in sets):
            root = Path(DataConfig().root).expanduser()
            self.datasets["data"] = load_source(SourceConfig.model_validate(self._named), root)
        _check_kinds(self.datasets, task, num_classes)
        _share_task(self.datasets, task, num_classes)
        if notes:
            first = next(iter(self.datasets))
            with_notes = (*notes, *self.datasets[first].notes)
            self.datasets[first] = replace(self.datasets[first], notes=with_notes)
        for client in clients:
            self._add_own_sets(client)
        self._proxy_size = self._add_proxy(sets, label)
        if "data" in self.datasets or "test" in self.datasets:
            self.datasets["common"] = _common_set(self.datasets)

    def _add_proxy(self, sets: Mapping[str, Any], label: str | None) -> int | None:
        """Add the proxy set, or return its size if its rows are to be held out."""
        proxy = sets.get("proxy")
        if proxy is None:
            return None
        if not isinstance(proxy, numbers.Integral):
            self.datasets["proxy"] = to_dataset(
                proxy,
                "proxy",
                _column(proxy, label),
                self._categories,
                self._patients.get("proxy"),
                labeled=False,
            )
            return None
        if isinstance(proxy, bool) or proxy < 1:
            raise UserError(f"proxy: expected examples, or a number of rows >= 1, got {proxy}")
        if "test" in sets and "data" not in sets:
            raise UserError(
                f"proxy: {proxy} rows cannot be held out of the clients' data if `test` is given; "
                "pass public examples"
            )
        return int(proxy)

    def _add_own_sets(self, client: Client) -> None:
        """Move the validation and test examples of a client into the client's data set."""
        for part in ("validation", "test"):
            own = self.datasets.pop(_place(client, part), None)
            if own is None:
                continue
            dataset = self.datasets[_place(client)]
            examples = _matched(own, dataset, _place(client, part))
            dataset = _with_split(dataset, part, examples)
            self.datasets[_place(client)] = dataset

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


def _drop_repeated_notes(datasets: dict[str, Dataset]) -> None:
    """Keep the first of equal notes in place. Notes that do not name their data may be equal."""
    said: set[str] = set()
    for place, dataset in datasets.items():
        kept = tuple(note for note in dataset.notes if note not in said)
        said.update(kept)
        datasets[place] = replace(dataset, notes=kept)


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


def _column(data: Any, label: str | None) -> str | None:
    """Return `label` if the data has a column of this name, or all columns that it names."""
    names = set(_column_names(data))
    parts = {part.strip() for part in (label or "").split(",")}
    return label if label in names or parts <= names else None


def _column_names(data: Any) -> list[str]:
    columns = data.columns if is_frame(data) else getattr(data, "column_names", None) or ()
    return list(map(str, columns))


def _suggest_column(name: str, sets: Iterable[Any]) -> str:
    """Return the end of a message: the column that is similar to a name, or all columns."""
    return suggest_or_list(name, {column for data in sets for column in _column_names(data)})


def _patients(clients: Sequence[Client], sets: Mapping[str, Any], patient: Any) -> dict[str, Any]:
    """Return the argument `patient` of `to_dataset`, keyed by the name of the data in messages.

    A column of the federation, or of a client, applies to all its data frames that have the column.

    Raises:
        UserError: If the patients apply to no data.
    """
    found: dict[str, Any] = {}
    for client in clients:
        for part, data in client.parts().items():
            if part == "data" and client.patient is not None:
                found[_place(client)] = client.patient
                continue
            own = patient if client.patient is None else client.patient
            if isinstance(own, str) and _column(data, own):
                found[_place(client, part)] = own
    if isinstance(patient, str):
        found |= {name: patient for name, data in sets.items() if _column(data, patient)}
        if patient not in found.values():
            given = [*sets.values(), *(data for c in clients for data in c.parts().values())]
            raise UserError(
                f"patient: no data frame or Hugging Face Dataset has a column '{patient}'"
                f"{_suggest_column(patient, given)}"
            )
    elif patient is not None:
        if "data" not in sets or is_source(sets["data"]) or isinstance(sets["data"], str):
            raise UserError(
                "patient: has one entry for each row of data=..., which is not given as arrays or "
                "a data set; pass Client(patient=...) for the rows of a client"
            )
        found["data"] = patient
    return found


def _shared_categories(
    parts: Mapping[str, tuple[Any, str | None]], owners: Mapping[str, str]
) -> dict[str, tuple[str, ...]] | None:
    """Return the values of the text columns of all data frames, or None if there are no frames.

    Columns of patients, which are the values of `owners`, are left out.
    """
    frames = {
        place: (data.drop(columns=[c for c in data.columns if str(c) == owners.get(place)]), label)
        for place, (data, label) in parts.items()
        if is_frame(data)
    }
    if not frames:
        return None
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.frames import categories_of_frames

    return categories_of_frames(frames)


def _read_common_labels(
    parts: Mapping[str, tuple[Any, str | None]],
    task: Task | str | None,
    num_classes: int | None,
) -> tuple[dict[str, Any], Task | str | None, list[str]]:
    """Read the labels of all pairs and data frames, which determine the task together.

    Args:
        parts: The data and its label column, keyed by the name that error messages use.
        task: Kind of the task, or the task.
        num_classes: Number of classes, or None.

    Returns:
        The data, in which pairs have targets of the task; the task, or its kind if there are no
        such labels; and notes.

    Raises:
        UserError: If labels do not match each other or the task.
    """
    if isinstance(task, Task):
        check_num_classes(task, num_classes)
    kind = task.kind if isinstance(task, Task) else task
    labels: dict[str, Any] = {}
    for place, (data, column) in parts.items():
        if is_frame(data):
            labels |= _frame_labels(data, column, place, kind)
        elif isinstance(data, tuple | list):
            labels[f"{place}: y"] = data[1]
    read = {place: data for place, (data, _) in parts.items()}
    if not labels:
        return read, kind, []
    found, targets, notes = read_labels(labels, ALL_LABELS, task=kind, num_classes=num_classes)
    for place, data in read.items():
        if isinstance(data, tuple | list):
            read[place] = (data[0], targets[f"{place}: y"])
    return read, found, [] if isinstance(task, Task) else notes


def _frame_labels(frame: Any, column: str | None, place: str, kind: str | None) -> dict[str, Any]:
    """Return the labels of a data frame, or nothing if `to_dataset` reports a missing column."""
    # Imported here because loading pandas is slow.
    from hetero_fl.data.sources.tables.columns import normalize_frame
    from hetero_fl.data.sources.tables.frames import label_columns, label_values

    table = normalize_frame(frame, place)
    columns = [] if column is None else label_columns(table.columns, column)
    if not columns or not set(columns) <= set(table.columns) or not len(table):
        return {}
    return {f"{place}: column '{column}'": label_values(table[columns], place, kind)}


def _plain_source(data: Any) -> dict[str, Any] | None:
    """Return the configuration section of a data source.

    Args:
        data: The name of a source, a dictionary with the keys of a source, or other data.

    Returns:
        The section, or None if `data` is neither a name nor a dictionary.
    """
    if isinstance(data, str):
        return {"name": data}
    return dict(data) if is_source(data) else None


def _check_kinds(
    datasets: Mapping[str, Dataset], task: Task | str | None, num_classes: int | None
) -> None:
    """Raise UserError if the given task or number of classes does not apply to all data sets."""
    kind = "multiclass" if num_classes is not None else getattr(task, "kind", task)
    if kind is not None and not datasets:
        raise UserError("task, num_classes: apply to data in memory, not to sources; remove them")
    for place, dataset in datasets.items():
        if kind not in (None, dataset.task.kind):
            raise UserError(f"{place}: expected a {kind} task, got {dataset.task.kind}")


def _share_task(
    datasets: dict[str, Dataset], task: Task | str | None, num_classes: int | None
) -> None:
    """Give all data sets the given task, or the same classes, in place.

    Args:
        datasets: The data sets, keyed by the name that error messages use for them.
        task: The task or its kind.
        num_classes: Number of classes, or None.

    Raises:
        UserError: If a class or an output is unknown, or if some labels are class names and others
            numbers.
    """
    tasks = {place: dataset.task for place, dataset in datasets.items()}
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


def _common_set(datasets: Mapping[str, Dataset]) -> Dataset:
    """Combine the rows to divide and the global test and validation sets into one data set."""
    main = datasets.get("data")
    if main is None:
        # All clients have data of their own, so there are no training rows to divide.
        given = datasets["test"]
        main = replace(given, name=OWN_DATA, train=given.train.select_rows(torch.arange(0)))
    common = main
    for part in ("validation", "test"):
        if part in datasets:
            # A data set with a test split is evaluated on this split.
            own = datasets[part].splits().get(part, datasets[part].train)
            examples = _matched(replace(datasets[part], train=own), common, part)
            common = _with_split(common, part, examples)
    return common


def _matched(own: Dataset, dataset: Dataset, place: str) -> Examples:
    """Return the examples with the classes and columns of another data set of the same shape."""
    examples = match_to_common(own, dataset, place)
    shape = tuple(dataset.train.x.shape[1:])
    if tuple(examples.x.shape[1:]) != shape:
        raise UserError(
            f"{place}: expected examples of shape {shape} as in the training data, got "
            f"{tuple(examples.x.shape[1:])}"
        )
    return examples


def _with_split(dataset: Dataset, part: str, examples: Examples) -> Dataset:
    """Return the data set with other validation or test examples."""
    if part == "validation":
        return replace(dataset, validation=examples)
    return replace(dataset, test=examples)
