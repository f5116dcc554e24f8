"""What is learned: the kind of target, how many outputs a model needs, what they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hetero_fl.utils.text import pluralize

MANY = 20  # classes
MOST_NAMED = 6  # outputs that a line lists by name


@dataclass(frozen=True)
class Task:
    """A learning task that a whole federation has in common.

    Targets `y` are int64 `[N]` of class numbers (multiclass), floats `[N, outputs]` of 0 and 1 (multilabel), or floats
    `[N, outputs]` (regression). `unit` is what figures of a regression are counted in, if that has a name: `vehicles`.
    """

    kind: Literal["multiclass", "multilabel", "regression"]
    outputs: int
    names: tuple[str, ...] = ()
    unit: str = ""
    rare: int | None = None
    """Of two classes the one that less than a tenth of all rows have: which models rank highest is then what counts."""

    def describe(self) -> str:
        """Return what is learned, such as `2 classes: no, yes`."""
        if self.kind == "regression":
            text = pluralize(self.outputs, "number")
        else:
            labels = ("class", "classes") if self.kind == "multiclass" else ("label", "labels")
            text = f"{self.outputs} {labels[self.outputs != 1]}"
        if not self.names or len(self.names) > MOST_NAMED:
            return text
        return f"{text}: {', '.join(self.names)}"

    @property
    def output_names(self) -> tuple[str, ...]:
        """A name for each output."""
        return self.names or tuple(str(i) for i in range(self.outputs))

    @property
    def numbers(self) -> tuple[int, ...]:
        """Labels that the classes are named after, if these are other integers than the class numbers; else nothing."""
        whole = self.kind == "multiclass" and all(
            name.isascii() and name.removeprefix("-").isdigit() for name in self.names
        )
        found = tuple(map(int, self.names)) if whole else ()
        return () if found == tuple(range(len(found))) else found

    @property
    def has_many_classes(self) -> bool:
        """Whether there are so many classes that a figure for each says little, and the first few guesses matter."""
        return self.kind == "multiclass" and self.outputs >= MANY
