"""Columns of a data set of `datasets`: their kinds, and which are inputs, labels and groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hetero_fl.config.data import ColumnsConfig, SourceConfig
from hetero_fl.utils.errors import UserError, check_names, suggest_or_list
from hetero_fl.utils.text import format_list

IMAGE_NAMES = ("image", "img")
"""Names of the image column to use if there are several image columns."""
FEATURE_KINDS = {
    "Image": "image",
    "ClassLabel": "class",
    **dict.fromkeys(("Array2D", "Array3D", "Array4D", "Array5D"), "array"),
}
"""Kinds of features, keyed by the name of the class in `datasets`."""
VALUE_KINDS = {
    "string": ("string", "large_string"),
    "number": ("int", "uint", "float", "bool"),
    "date": ("timestamp", "date", "time"),
}
"""Prefixes of the dtypes of columns with one value per row, keyed by their kind."""


def feature_kind(feature: Any) -> str:
    """Return the kind of a feature of `datasets`.

    Returns:
        "image", "class", "classes" (lists of classes), "array" (lists of numbers), "string",
        "number", "date" or "other".
    """
    title = type(feature).__name__
    if title in FEATURE_KINDS:
        return FEATURE_KINDS[title]
    inner = list_item(feature)
    if inner is not None:
        kind = feature_kind(inner)
        return {"number": "array", "array": "array", "class": "classes"}.get(kind, "other")
    dtype = str(feature.dtype) if title == "Value" else ""
    for kind, prefixes in VALUE_KINDS.items():
        if dtype.startswith(prefixes):
            return kind
    return "other"


def array_depth(feature: Any) -> int:
    """Return the number of dimensions of an array feature."""
    title = type(feature).__name__
    if title.startswith("Array"):
        return len(feature.shape)
    inner = list_item(feature)
    return 0 if inner is None else 1 + array_depth(inner)


def list_item(feature: Any) -> Any:
    """Return the feature of the items of a list, or None if the feature is not a list."""
    if isinstance(feature, list):
        return feature[0]
    if type(feature).__name__ in ("List", "LargeList", "Sequence"):
        return feature.feature
    return None


@dataclass(frozen=True)
class HubColumns:
    """The columns of a data set by their use.

    Attributes:
        inputs: Columns of the inputs.
        labels: Columns of the labels. Empty if there are no labels.
        group: Column of the groups, or None.
        patient: Column of the patients, or None.
    """

    inputs: tuple[str, ...]
    labels: tuple[str, ...]
    group: str | None
    patient: str | None

    @property
    def named(self) -> set[str | None]:
        """Columns with a use. None stands for a use without a column."""
        return {*self.inputs, *self.labels, self.group, self.patient}

    def describe_targets(self) -> list[str]:
        """Return remarks on the columns of labels, groups and patients."""
        named = {"label": format_list(self.labels), "group": self.group, "patient": self.patient}
        return [f"{key} {column}" for key, column in named.items() if column]


def find_columns(train: Any, where: str, config: SourceConfig, labeled: bool) -> HubColumns:
    """Find the columns by the configuration and by their names and types.

    Args:
        train: Training rows.
        where: Name of the data in error messages.
        config: Source configuration.
        labeled: Whether there must be labels.

    Raises:
        UserError: If a column does not exist or is ambiguous.
    """
    names = list(train.column_names)
    given = config.columns or ColumnsConfig()
    found: dict[str, str | None] = {}
    for key in ("label", "group", "patient"):
        own = getattr(given, key)
        common = getattr(config, key)
        if own is not None and common not in (None, own):
            raise UserError(f"{where}: columns.{key}: '{own}' differs from {key} '{common}'")
        found[key] = own if own is not None else common
    label = found["label"]
    labels = _default_label(train.features) if label is None else (label,)
    if label is not None and label not in names:
        labels = tuple(part.strip() for part in label.split(","))
    if not labels and labeled:
        raise UserError(
            f"{where}: label: missing; name the column of the labels{suggest_or_list('', names)}"
        )
    inputs = (given.input,) if isinstance(given.input, str) else given.input or ()
    used = {
        "label": labels,
        **{key: (found[key],) for key in ("group", "patient") if found[key]},
        "input": inputs,
    }
    for key, listed in used.items():
        check_names(listed, names, f"{where}: {key}: column", " not found")
        for name, count in Counter(listed).items():
            if count > 1:
                raise UserError(f"{where}: {key}: column '{name}' occurs {count} times")
    if overlap := set(inputs) & set(labels):
        raise UserError(f"{where}: columns.input: '{overlap.pop()}' is the label; remove it")
    others = [n for n in names if n not in (*labels, found["group"], found["patient"])]
    inputs = inputs or _default_inputs(train.features, others, where, config.text is not None)
    return HubColumns(inputs, labels if labeled else (), found["group"], found["patient"])


def _default_label(features: Mapping[str, Any]) -> tuple[str, ...]:
    classes = [name for name, feature in features.items() if feature_kind(feature) == "class"]
    if len(classes) == 1:
        return (classes[0],)
    return ("label",) if "label" in features else ()


def _default_inputs(
    features: Mapping[str, Any], names: Sequence[str], where: str, wants_text: bool
) -> tuple[str, ...]:
    kinds = {name: feature_kind(features[name]) for name in names}
    images = [name for name, kind in kinds.items() if kind == "image"]
    images = [name for name in IMAGE_NAMES if name in images][:1] or images
    texts = [name for name, kind in kinds.items() if kind == "string"]
    if "text" in texts:
        texts = ["text"]
    elif not wants_text:
        texts = []
    arrays = [
        name for name, kind in kinds.items() if kind == "array" and array_depth(features[name]) > 1
    ]
    for found in (texts, images, arrays) if wants_text else (images, texts, arrays):
        if len(found) > 1:
            raise UserError(
                f"{where}: columns.input: missing; choose from {format_list(found, quote=True)}"
            )
        if found:
            return (found[0],)
    if wants_text or not names:
        noun = "text column" if wants_text else "column other than the label"
        raise UserError(f"{where}: columns.input: no {noun} among {format_list(features)}")
    return tuple(names)


def input_kind(
    features: Mapping[str, Any], inputs: Sequence[str], where: str, config: SourceConfig
) -> str:
    """Return the kind of the input: "image", "text", "array" or "table".

    A single column of strings is text, unless it is to be encoded as a category.

    Args:
        features: Features of all columns.
        inputs: Columns of the inputs.
        where: Name of the data in error messages.
        config: Source configuration.

    Raises:
        UserError: If a key of the configuration does not apply to this kind.
    """
    kind = _input_kind(features, inputs, config.categories is not None)
    for key, allowed in {"text": "text", "size": "image", "categories": "table"}.items():
        if getattr(config, key) is not None and kind != allowed:
            other = ", or set columns.input" if key == "text" else ""
            raise UserError(
                f"{where}: {key}: does not apply to {kind} input "
                f"{format_list(inputs, quote=True)}; remove it{other}"
            )
    return kind


def _input_kind(features: Mapping[str, Any], inputs: Sequence[str], is_encoded: bool) -> str:
    kind = feature_kind(features[inputs[0]])
    if len(inputs) > 1:
        return "table"
    if kind == "array":
        return "array" if array_depth(features[inputs[0]]) > 1 else "table"
    if kind == "string" and not is_encoded:
        return "text"
    return "image" if kind == "image" else "table"
