"""The data sets of a federation that is created from objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hetero_fl.core.task import Task
from hetero_fl.data import Dataset
from hetero_fl.data.client_files import OWN_DATA
from hetero_fl.data.dataset import Examples
from hetero_fl.data.external import match_to_common
from hetero_fl.data.sources.objects import is_source, to_dataset, to_examples, to_pair
from hetero_fl.experiment.client import Client
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.objects import OBJECT_PREFIX, name_object
from hetero_fl.utils.ordering import natural_order


class FederationDatasets:
    """The data sets of a federation, which are converted together.

    All data sets have the same number of classes, because a client's examples may lack some
    classes.

    Args:
        clients: The clients.
        sets: The arguments `data`, `test`, `validation` and `proxy` of the federation that are not
            None, keyed by name.
        label: Column of the labels in data frames.
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
    ) -> None:
        labeled = {
            _place(client, part): (data, client.label or _column(data, label))
            for client in clients
            for part, data in client.parts().items()
            if not is_source(data)
        }
        for client in clients:
            if client.data is None and "data" not in sets:
                raise UserError(
                    f"{_place(client)}: missing; pass data to the client, or data=... to divide to "
                    "the federation"
                )
            _check_own_sets(client, has_test="test" in sets or "data" in sets)
        self._named = _plain_source(sets.get("data"))
        labeled |= {
            name: (sets[name], _column(sets[name], label))
            for name in ("data", "test", "validation")
            if name in sets and not (name == "data" and self._named)
        }
        labeled = {
            place: (to_pair(data, place), column) for place, (data, column) in labeled.items()
        }
        options = _label_options({p: data for p, (data, _) in labeled.items()}, num_classes)
        self.datasets = {
            place: to_dataset(data, place, column, **options)
            for place, (data, column) in labeled.items()
        }
        for client in clients:
            self._add_own_sets(client)
        proxy = sets.get("proxy")
        if isinstance(proxy, int) and proxy < 1:
            raise UserError(f"proxy: expected examples, or a number of rows >= 1, got {proxy}")
        self._proxy_size = proxy if isinstance(proxy, int) else None
        if self._proxy_size is not None and "test" in sets and "data" not in sets:
            raise UserError(
                f"proxy: {proxy} rows cannot be held out of the clients' data if `test` is given; "
                "pass public examples"
            )
        if proxy is not None and self._proxy_size is None:
            self.datasets["proxy"] = to_examples(proxy, "proxy", _column(proxy, label))
        if "data" in self.datasets or "test" in self.datasets:
            self.datasets["common"] = _common_set(self.datasets)

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


def _check_own_sets(client: Client, has_test: bool) -> None:
    """Raise UserError if the federation cannot use the client's validation or test examples."""
    for part in client.parts():
        if part == "data":
            continue
        if client.data is None or is_source(client.data):
            raise UserError(
                f"{_place(client, part)}: requires data=... as arrays, a data frame or a data set"
            )
        if not has_test:
            raise UserError(
                f"{_place(client, part)}: requires a global test set; pass Federation(test=...)"
            )


def _column(data: Any, label: str | None) -> str | None:
    """Return `label` if the data has a column of this name, else None."""
    columns = getattr(data, "column_names", getattr(data, "columns", ()))
    return label if label in list(columns) else None


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
    numbers = [place for place, is_text in kinds.items() if not is_text]
    if text and numbers:
        raise UserError(f"{numbers[0]}: y: expected text as in {text[0]}, got numbers")


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


def _common_set(datasets: Mapping[str, Dataset]) -> Dataset:
    """Combine the rows to divide and the global test and validation sets into one data set."""
    main = datasets.get("data")
    if main is None:
        # All clients have data of their own, so there are no training rows to divide.
        given = datasets["test"]
        main = replace(given, name=OWN_DATA, train=given.train.select_rows(torch.arange(0)))
    task = _common_task(main.task, datasets)
    common = replace(main, task=task)
    common = replace(common, train=match_to_common(main, common, "data"))
    for part in ("validation", "test"):
        if part in datasets:
            examples = _matched(datasets[part], common, part)
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
