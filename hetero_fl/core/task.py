"""The learning task: the kind of target and the number and names of outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import pluralize

# Minimum number of classes for which tables show top-3 accuracy instead of metrics per class.
MANY_CLASSES = 20
# Maximum number of output names that `Task.describe` lists.
MAX_LISTED_NAMES = 6
# Maximum number of characters of a class name that is an integer.
MAX_DIGITS = 18


def is_integer(name: str) -> bool:
    """Return whether a class name is an integer of 64 bits, which at most 18 digits always are."""
    return name.isascii() and name.removeprefix("-").isdigit() and len(name) <= MAX_DIGITS


@dataclass(frozen=True)
class Task:
    """The learning task of a federation.

    Targets are class indices `[N]` (int64) for multiclass, 0 or 1 `[N, outputs]` (floating point)
    for multilabel, and numbers `[N, outputs]` for regression.

    Args:
        kind: Kind of the task.
        outputs: Number of outputs of a model.
        names: Names of the outputs. Empty if the outputs have no names.
        unit: Unit of the targets in a regression, such as `vehicles`. Default: no unit.
        rare: Index of the class to which fewer than a tenth of the training rows belong, in a
            binary task. None if there is no such class. The average precision of a rare class is
            more informative than accuracy.
        is_ranking: Whether the classes are items to recommend, so that the rank of the true class
            matters, for example the next movie of a user.
        is_numbered: Whether labels are class numbers from 0, although the classes have names.

    Example:
        >>> from hetero_fl.core.task import Task
        >>> task = Task("multiclass", 2, names=("no", "yes"))
        >>> task.describe()
        '2 classes: no, yes'
    """

    kind: Literal["multiclass", "multilabel", "regression"]
    outputs: int
    names: tuple[str, ...] = ()
    unit: str = ""
    rare: int | None = None
    is_ranking: bool = False
    is_numbered: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        """Check that each output has a name of its own, which files can contain."""
        if self.names and (len(self.names) != self.outputs or len(set(self.names)) < self.outputs):
            raise UserError(
                f"names: expected {self.outputs} different names of outputs, got {self.names}"
            )
        for name in self.names:
            try:
                name.encode()
            except UnicodeEncodeError:
                raise UserError(f"class {name!r}: not encoded in UTF-8; rename it") from None

    def describe(self) -> str:
        """Return a short description, such as `2 classes: no, yes`."""
        if self.kind == "regression":
            text = pluralize(self.outputs, "number")
        else:
            labels = ("class", "classes") if self.kind == "multiclass" else ("label", "labels")
            text = f"{self.outputs} {labels[self.outputs != 1]}"
        if not self.names or len(self.names) > MAX_LISTED_NAMES:
            return text
        return f"{text}: {', '.join(self.names)}"

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, or the indices of the outputs as text if there are no names."""
        return self.names or tuple(str(i) for i in range(self.outputs))

    @property
    def numbers(self) -> tuple[int, ...]:
        """Integer labels of the classes.

        The tuple is empty if class names are not integers or equal the class indices.
        """
        are_integers = self.kind == "multiclass" and all(map(is_integer, self.names))
        labels = tuple(map(int, self.names)) if are_integers else ()
        return () if labels == tuple(range(len(labels))) else labels

    @property
    def has_many_classes(self) -> bool:
        """Whether there are too many classes for metrics per class to be informative."""
        return self.kind == "multiclass" and self.outputs >= MANY_CLASSES
