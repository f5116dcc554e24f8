"""Inputs of a partition function: strata, labels and the other columns of the rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import PartitionConfig
from hetero_fl.core.stored_rows import require_tensor
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Examples, PatientTerm
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


class PartitionColumns(Mapping[str, np.ndarray]):
    """Read-only columns of the rows to partition, by name.

    The columns are, in this order:

    - the columns of `Examples.metadata`, such as labels, groups, texts and dates of a table;
    - the features of a table, which are numbers;
    - `label`, `group`, `patient`, `time` and `unit`, if the examples have them and no column above
      has this name. Classes, groups and patients with names are text.

    Args:
        examples: Examples that contain the rows.
        rows: Indices of the rows, int64 `[M]`.
        features: Names of the columns of `examples.x`. If empty, there are no such columns.
        classes: Names of the classes. If empty, labels are numbers.

    Example:
        >>> import torch
        >>> from hetero_fl.data import Examples
        >>> from hetero_fl.data.partition import PartitionColumns
        >>> examples = Examples(torch.tensor([[30.0], [40.0], [50.0]]), torch.tensor([0, 1, 1]))
        >>> columns = PartitionColumns(examples, torch.tensor([0, 2]), ("age",), ("ill", "well"))
        >>> list(columns)
        ['age', 'label']
        >>> columns["age"].tolist(), columns["label"].tolist()
        ([30.0, 50.0], ['ill', 'well'])
    """

    def __init__(
        self,
        examples: Examples,
        rows: Tensor,
        features: tuple[str, ...] = (),
        classes: tuple[str, ...] = (),
    ) -> None:
        self._examples = examples
        self._rows = rows
        self._features = features if examples.x.ndim == 2 else ()
        self._classes = classes
        names = [*examples.metadata, *self._features, *_available_fields(examples)]
        self._names = tuple(dict.fromkeys(names))

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(f"no column '{name}'{suggest_or_list(name, self._names)}")
        values = self._read(name)
        values.flags.writeable = False
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def patient_term(self) -> PatientTerm:
        """The term for a patient of the rows in messages."""
        return self._examples.patient_term

    def select_rows(self, rows: Tensor) -> PartitionColumns:
        """Return the columns of some of the rows, given by their indices (int64 `[M]`)."""
        return PartitionColumns(self._examples, self._rows[rows], self._features, self._classes)

    def _read(self, name: str) -> np.ndarray:
        """Return a copy of a column."""
        examples = self._examples
        if name in examples.metadata:
            return examples.metadata[name][self._rows.numpy()]
        if name in self._features:
            x = require_tensor(examples.x, "a table")
            return x[self._rows, self._features.index(name)].numpy()
        if name == "label":
            labels = examples.labels[self._rows]
            labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
            return _named(labels, self._classes if labels.ndim == 1 else ())
        values: Tensor = getattr(examples, name)[self._rows]
        return _named(values, getattr(examples, f"{name}_names", ()))


def _available_fields(examples: Examples) -> list[str]:
    """Return the names of the fields of examples that can be used as columns."""
    columns = {"label": examples.y}
    columns |= {name: getattr(examples, name) for name in ("group", "patient", "time", "unit")}
    return [name for name, column in columns.items() if column is not None]


def _named(values: Tensor, names: tuple[str, ...]) -> np.ndarray:
    """Replace indices by names, or return the indices as an array if there are no names."""
    if not names or values.is_floating_point():
        return values.numpy().copy()
    return np.array(names, dtype=object)[values.numpy()]


@dataclass(frozen=True)
class PartitionContext:
    """The inputs of a partition function.

    If the data identifies patients, all kinds except `natural` partition patients instead of rows.
    An entry of `strata` is then the most common stratum of the rows of a patient, and the entries
    of `labels` and `columns` are those of the first row of the patient in this stratum.

    Attributes:
        strata: Stratum of each row, int64 `[N]` (see `row_strata`).
        group: Group of each row, int64 `[N]`. If None, the data has no groups.
        config: Partition settings.
        share: Share of the rows per client, float64 `[K]`, proportional to the client sizes and
            summing to one.
        seed: Seed of the run.
        min_rows: Minimum number of rows per client.
        labels: Targets as defined by `Task`, `[N]` or `[N, L]`.
        columns: Columns of the data set by name, read-only arrays `[N]` (see `PartitionColumns`).
        clients: Client ids, in the order of the result.
        task: Learning task.
        notes: List to which a partition function may append remarks for the log.
        unit: What is partitioned, "row", "patient" or another term for patients.

    Example:
        >>> import torch
        >>> from hetero_fl.data import register_partition
        >>> @register_partition("sorted_by_label")
        ... def sorted_by_label(context):
        ...     order = torch.argsort(context.labels, stable=True)
        ...     return list(order.tensor_split(len(context.clients)))
    """

    strata: Tensor
    group: Tensor | None
    config: PartitionConfig
    share: np.ndarray
    seed: int
    min_rows: int
    labels: Tensor
    columns: PartitionColumns
    clients: tuple[str, ...]
    task: Task
    notes: list[str] = field(default_factory=list)
    unit: str = "row"

    @property
    def alpha(self) -> float:
        """Concentration parameter of the Dirichlet distribution."""
        # The configuration fills in a default for all kinds that use it.
        assert self.config.alpha is not None
        return self.config.alpha

    @property
    def num_rows(self) -> int:
        """Number of rows to partition."""
        return len(self.strata)

    def rng(self, *use: str | int) -> np.random.Generator:
        """Return a NumPy generator that is seeded with the seed of the run and with `use`."""
        return keyed_numpy_generator("data", self.seed, "partition", *use)

    def shuffled(self, rows: Tensor, *use: str | int) -> Tensor:
        """Return the rows in a random order that depends on the seed of the run and on `use`."""
        generator = keyed_generator("data", self.seed, "partition", *use)
        return rows[torch.randperm(len(rows), generator=generator)]


class Partitioner(ABC):
    """Base class of partitions that are classes.

    The arguments of the constructor are keys of `data.partition`.

    Example:
        >>> import numpy as np
        >>> from hetero_fl.data import Partitioner
        >>> class ByColumn(Partitioner):
        ...     def __init__(self, column):
        ...         self.column = column
        ...
        ...     def partition(self, context):
        ...         order = np.argsort(context.columns[self.column], kind="stable")
        ...         return np.array_split(order, len(context.clients))
    """

    @abstractmethod
    def partition(self, context: PartitionContext) -> Sequence[Any]:
        """Return the row indices of each client, in the order of `context.clients`."""
