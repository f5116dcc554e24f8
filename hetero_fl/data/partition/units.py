"""The units that a partition assigns to clients: rows or, if patients are known, patients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Examples
from hetero_fl.utils.errors import suggest_or_list
from hetero_fl.utils.seeding import keyed_generator, keyed_numpy_generator


def row_strata(y: Tensor, task: Task) -> Tensor:
    """Return the stratum of each row, which partitions use as the label of the row.

    For multiclass tasks, the stratum is the class. For multilabel tasks, the stratum is one plus
    the index of the rarest positive label, or 0 if no label is positive. For regression tasks, the
    stratum is the decile of the first target.

    Args:
        y: Targets as defined by `Task`.
        task: Learning task.

    Returns:
        Strata, int64 `[N]`.

    Example:
        >>> import torch
        >>> from hetero_fl.core.task import Task
        >>> from hetero_fl.data import row_strata
        >>> y = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
        >>> row_strata(y, Task("multilabel", 2))
        tensor([1, 2, 0])
    """
    if task.kind == "multiclass":
        return y
    if task.kind == "multilabel":
        # Rarest label first: argmax returns the first positive one.
        order = y.sum(0).argsort(stable=True)
        first = (y[:, order] > 0).to(torch.uint8).argmax(1)
        return torch.where((y > 0).any(1), order[first] + 1, 0)
    inner = torch.linspace(0, 1, 11, dtype=torch.float64)[1:-1]
    target = y[:, 0].double().contiguous()
    edges = torch.from_numpy(np.quantile(target.numpy(), inner.numpy()))
    return torch.searchsorted(edges, target, right=True)


class NamedColumns(dict[str, np.ndarray]):
    """Columns by name, of which an unknown name is corrected."""

    def __missing__(self, name: str) -> np.ndarray:
        raise KeyError(f"no column '{name}'{suggest_or_list(name, self)}")


def named_columns(
    examples: Examples,
    rows: Tensor,
    features: tuple[str, ...] = (),
    classes: tuple[str, ...] = (),
) -> NamedColumns:
    """Return copies of the columns of some rows, by name.

    The columns are, in this order, those of `Examples.metadata`, the features of a table, and
    `label`, `group`, `patient`, `time` and `unit`, if the examples have them. The first column of a
    name is used. Classes, groups and patients with names are text.

    Args:
        examples: Examples that contain the rows.
        rows: Indices of the rows, int64 `[M]`.
        features: Names of the columns of `examples.x`. If empty, there are no such columns.
        classes: Names of the classes. If empty, labels are numbers.
    """
    index = rows.numpy()
    found = NamedColumns({name: values[index] for name, values in examples.metadata.items()})
    if features and examples.x.ndim == 2:
        x = examples.x[rows]
        for name, column in zip(features, x.numpy().T, strict=True):
            found.setdefault(name, column)
    labels = examples.y
    if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    fields = {
        "label": (labels, classes),
        "group": (examples.group, examples.group_names),
        "patient": (examples.patient, examples.patient_names),
        "time": (examples.time, ()),
        "unit": (examples.unit, ()),
    }
    for name, (column, names) in fields.items():
        if column is not None:
            found.setdefault(name, _named(column[rows], names))
    return found


def _named(values: Tensor, names: tuple[str, ...]) -> np.ndarray:
    """Replace indices by names, or return the indices as an array if there are no names."""
    if not names or values.is_floating_point():
        return values.numpy()
    return np.array(names, dtype=object)[values.numpy()]


@dataclass(frozen=True)
class Units:
    """The units that a partition assigns: rows, or patients whose rows stay together.

    The stratum of a patient is the most common stratum of its rows. Labels and columns are those of
    its first row in this stratum.

    Attributes:
        strata: Stratum of each unit, int64 `[N]` (see `row_strata`).
        labels: Targets as defined by `Task`, `[N]` or `[N, L]`.
        clients: Client ids, in the order of the result.
        share: Share of the units per client, float64 `[K]`, proportional to the client sizes and
            summing to one.
        min_size: Minimum number of units per client.
        task: Learning task.
        seed: Seed of the run.
        group: Group of each row, int64 `[N]`. If None, there are no groups.
        columns: Columns of the data set by name, arrays `[N]` (see `named_columns`).
        noun: What a unit is, "row", "patient" or another term for patients.
        notes: List to which a partition may append remarks for the log.

    Example:
        >>> import torch
        >>> from hetero_fl.data import register_partition
        >>> @register_partition("sorted_by_label")
        ... def sorted_by_label(units):
        ...     order = torch.argsort(units.labels, stable=True)
        ...     return list(order.tensor_split(len(units.clients)))
    """

    strata: Tensor
    labels: Tensor
    clients: tuple[str, ...]
    share: np.ndarray
    min_size: int
    task: Task
    seed: int
    group: Tensor | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    noun: str = "row"
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.strata)

    def rng(self, *use: str | int) -> np.random.Generator:
        """Return a NumPy generator that is seeded with the seed of the run and with `use`."""
        return keyed_numpy_generator("data", self.seed, "partition", *use)

    def shuffled(self, units: Tensor, *use: str | int) -> Tensor:
        """Return units in a random order that depends on the seed of the run and on `use`."""
        generator = keyed_generator("data", self.seed, "partition", *use)
        return units[torch.randperm(len(units), generator=generator)]

    def merge_patients(self, patient: Tensor, noun: str, min_size: int) -> Units:
        """Return the patients of these rows as units.

        Args:
            patient: Patient of each row, int64 `[N]`, with all values from 0 to P - 1.
            noun: Term for a patient.
            min_size: Minimum number of patients per client.
        """
        strata = most_common_stratum(self.strata, patient)
        rows = torch.nonzero(self.strata == strata[patient]).squeeze(1)
        first = rows[torch.from_numpy(np.unique(patient[rows].numpy(), return_index=True)[1])]
        columns = {name: values[first.numpy()] for name, values in self.columns.items()}
        return replace(
            self,
            strata=strata,
            labels=self.labels[first],
            min_size=min_size,
            group=None,
            columns=NamedColumns(columns),
            noun=noun,
        )


def most_common_stratum(strata: Tensor, patient: Tensor) -> Tensor:
    """Return the most common stratum of the rows of each patient, of several the lowest.

    Args:
        strata: Stratum of each row, int64 `[N]`, starting at 0.
        patient: Patient of each row, int64 `[N]`, with all values from 0 to P - 1.

    Returns:
        Strata, int64 `[P]`.
    """
    num_strata = int(strata.max()) + 1
    pairs, rows = (patient * num_strata + strata).unique(return_counts=True)
    patient_of_pair = pairs // num_strata
    order = np.lexsort((pairs % num_strata, -rows, patient_of_pair))
    first = np.unique(patient_of_pair[order], return_index=True)[1]
    return pairs[order[first]] % num_strata
