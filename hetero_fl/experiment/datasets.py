"""The data sets of a federation that is created from objects."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset
from hetero_fl.data.client_sources import OWN_DATA
from hetero_fl.data.dataset import Examples
from hetero_fl.data.external import match_to_common
from hetero_fl.data.registry import load_source
from hetero_fl.data.sources.objects import is_frame, is_source, to_dataset, to_examples, to_pair
from hetero_fl.experiment.client import Client
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.objects import OBJECT_PREFIX, name_object
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.text import format_list


class FederationDatasets:
    """The data sets of a federation, which are converted together.

    All data sets have the same number of classes, because a client's examples may lack some
    classes.

    Args:
        clients: The clients.
        sets: The arguments `data`, `test`, `validation` and `proxy` of the federation that are not
            None, keyed by name.
        label: Column of the labels in data frames.
        patient: Column of the patients in data frames, or the patient of each row of `data`.
        num_classes: Number of classes. If None, the classes are numbered from 0 to the largest
            integer label in all data sets.

    Attributes:
        datasets: The data sets, keyed by the name that error messages use for them.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        sets: Mapping[str, Any],
        label: str | None,
        num_classes: int | None,
        patient: Any = None,
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
        if label is not None and not any(_column(data, label) for data, _ in given.values()):
            raise UserError(f"label: no data frame or Hugging Face Dataset has a column '{label}'")
        self._patients = _patients(clients, sets, patient)
        pairs = {place: (to_pair(data, place), column) for place, (data, column) in given.items()}
        self._categories = _shared_categories(
            {**pairs, "proxy": (sets.get("proxy"), _column(sets.get("proxy"), label))},
            {place: own for place, own in self._patients.items() if isinstance(own, str)},
        )
        options = _label_options({p: data for p, (data, _) in pairs.items()}, num_classes)
        self.datasets = {
            place: to_dataset(
                data, place, column, self._categories, self._patients.get(place), **options
            )
            for place, (data, column) in pairs.items()
        }
        if self._named and ("test" in sets or "validation" in sets):
            root = Path(DataConfig().root).expanduser()
            self.datasets["data"] = load_source(SourceConfig.model_validate(self._named), root)
        _share_classes(self.datasets, num_classes)
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
            self.datasets["proxy"] = to_examples(
                proxy,
                "proxy",
                _column(proxy, label),
                self._categories,
                self._patients.get("proxy"),
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
    """Return `label` if the data has a column of this name, else None."""
    columns = getattr(data, "column_names", getattr(data, "columns", ()))
    return label if label in list(columns) else None


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
            raise UserError(
                f"patient: no data frame or Hugging Face Dataset has a column '{patient}'"
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
    from hetero_fl.data.sources.table_files import categories_of_frames

    return categories_of_frames(frames)


def _label_options(parts: Mapping[str, Any], num_classes: int | None) -> dict[str, Any]:
    """Return the argument `num_classes` for `to_dataset`.

    Args:
        parts: The data, keyed by the name that error messages use.
        num_classes: Number of classes. If None, the number is the largest class number in `parts`
            plus 1.

    Returns:
        A dictionary with the key `num_classes`. It is empty if `num_classes` is None and not all
        labels are class numbers.

    Raises:
        UserError: If a class number is negative, or if some labels are text and others numbers.
    """
    if num_classes is not None:
        return {"num_classes": num_classes}
    _check_kinds(parts)
    largest = []
    for place, data in parts.items():
        if not isinstance(data, tuple | list) or len(data) != 2:
            return {}
        y = np.asarray(data[1])
        if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or not len(y):
            return {}
        if y.min() < 0:
            raise UserError(
                f"{place}: y: expected class numbers from 0, got {y.min()}; renumber the classes, "
                "or pass floats for a regression"
            )
        largest.append(int(y.max()))
    return {"num_classes": max(largest) + 1} if largest else {}


def _check_kinds(parts: Mapping[str, Any]) -> None:
    """Raise UserError if the labels of some pairs (x, y) are text and others are numbers."""
    kinds = {
        place: np.asarray(data[1]).dtype.kind in "OSU"
        for place, data in parts.items()
        if isinstance(data, tuple | list) and len(data) == 2
    }
    text = [place for place, is_text in kinds.items() if is_text]
    numeric = [place for place, is_text in kinds.items() if not is_text]
    if text and numeric:
        raise UserError(f"{numeric[0]}: y: expected text as in {text[0]}, got numbers")


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


def _share_classes(datasets: dict[str, Dataset], num_classes: int | None) -> None:
    """Give all data sets of a classification the same classes, in place.

    The classes are numbers if a data set has no class names. Data sets without rows of a class may
    lack its name or number.

    Args:
        datasets: The data sets, keyed by the name that error messages use for them.
        num_classes: Number of classes, or None.

    Raises:
        UserError: If some labels are class names and others numbers.
    """
    kinds = {dataset.task.kind for dataset in datasets.values()}
    if kinds != {"multiclass"}:
        return
    unnamed = [place for place, dataset in datasets.items() if not dataset.task.names]
    if not unnamed and num_classes is None:
        return
    for place, dataset in datasets.items():
        names = dataset.task.names
        if names and not all(name.isdigit() for name in names):
            other = f"class numbers as in {unnamed[0]}" if unnamed else "class numbers"
            raise UserError(f"{place}: y: expected {other}, got {format_list(names)}")
        if names:
            numbers_of = torch.tensor([int(name) for name in names])
            datasets[place] = _renumbered(dataset, numbers_of)
    largest = max(
        int(examples.labels.max())
        for each in datasets.values()
        for examples in each.splits().values()
        if len(examples)
    )
    outputs = max(each.task.outputs for each in datasets.values())
    outputs = num_classes or max(outputs, largest + 1)
    if largest >= outputs:
        raise UserError(f"num_classes: must be > {largest}, the largest label, got {num_classes}")
    for place, dataset in datasets.items():
        datasets[place] = replace(dataset, task=Task("multiclass", outputs))


def _renumbered(dataset: Dataset, numbers_of: Tensor) -> Dataset:
    """Return a data set whose class names are numbers, with these numbers as labels."""
    parts = {
        name: replace(examples, y=numbers_of[examples.labels])
        for name, examples in dataset.splits().items()
    }
    outputs = int(numbers_of.max()) + 1
    return replace(
        dataset,
        task=Task("multiclass", outputs),
        train=parts["train"],
        validation=parts.get("validation"),
        test=parts.get("test"),
    )


def _common_set(datasets: Mapping[str, Dataset]) -> Dataset:
    """Combine the rows to divide and the global test and validation sets into one data set."""
    main = datasets.get("data")
    if main is None:
        # All clients have data of their own, so there are no training rows to divide.
        given = datasets["test"]
        main = replace(given, name=OWN_DATA, train=given.train.select_rows(torch.arange(0)))
    common = replace(main, task=_common_task(main.task, datasets))
    common = replace(common, train=match_to_common(main, common, "data"))
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


def _common_task(task: Task, datasets: Mapping[str, Dataset]) -> Task:
    """Return the task with the class names of all data sets, or unchanged if one has no names."""
    tasks = [dataset.task for place, dataset in datasets.items() if place != "proxy"]
    if not all(each.kind == "multiclass" and each.names for each in tasks):
        return task
    names = {name for each in tasks for name in each.names}
    if names == set(task.names):
        return task
    return Task("multiclass", len(names), tuple(natural_order(names)))
