"""Modules that combine a model and its preprocessing in a graph that torch can export.

An exported graph cannot raise errors. Instead, the graph returns NaN for rows with infinity or
unsupported missing values. It does not check the range of pixels and tokens, as `Run.predict` and
`score.py` do. A block is a modality of a multimodal example (see `hetero_fl.data.dataset.Block`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data.dataset import Categories, indicator_names, spans_of
from hetero_fl.data.preprocessing import Preprocess

Sizes = tuple[int | str, ...]
OUTPUTS = {"multiclass": "probabilities", "multilabel": "probabilities", "regression": "values"}
"""Name of the output for each kind of task."""
_MEANINGS = {
    "tokens": "word indices, 0 to {last_token}; 0 is padding on the left of shorter texts",
    "image": "pixels from 0 to 1 ({integers}), channels first{missing}",
    "series": "steps × columns, the newest step last, in the units of the data{missing}",
    "row": "one value per column, in the units of the data{encoded}{missing}",
}
_ENCODED = "; NAME=VALUE is 1 where column NAME has that value, else 0"


@dataclass(frozen=True)
class Input:
    """An input of an exported model.

    Args:
        name: Name of the input.
        kind: Kind of data: "image", "row", "series" or "tokens".
        shape: Shape without the batch dimension. A string is the name of a dynamic size.
        columns: Column names along the last axis. Empty if the names are unknown.
        allows_missing: Whether NaN represents a missing value. If False, NaN is invalid.
        tokens: Size of the vocabulary, or 0 for inputs other than tokens.
        categories: Text columns that are encoded as indicator columns, each with its values.
        pixel_range: Value of integer pixels that becomes 1. If None, 255.
    """

    name: str
    kind: Literal["image", "row", "series", "tokens"]
    shape: Sizes
    columns: tuple[str, ...] = ()
    allows_missing: bool = False
    tokens: int = 0
    categories: Categories = ()
    pixel_range: float | None = None

    @property
    def dtype(self) -> str:
        """Name of the data type, `int64` for tokens and `float32` otherwise."""
        return "int64" if self.kind == "tokens" else "float32"

    @property
    def meaning(self) -> str:
        """Description of the values, for model cards."""
        return _MEANINGS[self.kind].format(
            last_token=self.tokens - 1,
            integers=(
                "bytes divided by 255"
                if self.pixel_range is None
                else f"integers divided by {self.pixel_range:g}"
            ),
            encoded=_ENCODED if self.categories else "",
            missing="; NaN where a value is missing" if self.allows_missing else "",
        )

    def record(self) -> dict[str, Any]:
        """Convert the description to a dictionary for JSON, without empty optional entries."""
        optional = {
            "columns": list(self.columns),
            "categories": {column: list(values) for column, values in self.categories},
            "gaps": self.allows_missing,
            "tokens": self.tokens,
            "range": self.pixel_range,
        }
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": ["batch", *self.shape],
            "dtype": self.dtype,
            "meaning": self.meaning,
            **{key: value for key, value in optional.items() if value},
        }


def are_blocks_flattened(preprocess: Preprocess) -> bool:
    """Return whether the blocks of an example are flattened and concatenated into one row."""
    blocks = preprocess.blocks
    return bool(blocks) and (len(blocks) > 1 or preprocess.missing is not None)


def inputs_of(model: SavedModel) -> tuple[Input, ...]:
    """Describe the inputs of the exported graph.

    The graph has one input for each block of an example if the model's backbone receives the blocks
    as one flattened row (see `are_blocks_flattened`). Otherwise, it has a single input.

    Args:
        model: The saved model.
    """
    preprocess = Preprocess.of_model(model)
    input_shape = model.arch.input_shape
    allows_missing = preprocess.missing is not None
    if model.arch.vocabulary is not None:
        return (Input("tokens", "tokens", input_shape, tokens=model.arch.vocabulary),)
    if are_blocks_flattened(preprocess):
        return tuple(
            Input(
                block.name,
                "image" if block.image else "row",
                block.shape,
                allows_missing=allows_missing,
                pixel_range=preprocess.pixel_range if block.image else None,
            )
            for block in preprocess.blocks
        )
    if len(input_shape) == 3:
        return (_image_input(preprocess, input_shape),)
    if preprocess.blocks:
        return (Input(preprocess.blocks[0].name, "row", preprocess.blocks[0].shape),)
    names = tuple(preprocess.names(model.columns)) if model.columns else ()
    columns = (
        input_shape[0]
        if preprocess.raw is None
        else preprocess.select_columns(torch.empty(0, preprocess.raw[-1])).shape[-1]
    )
    kind: Literal["series", "row"] = "series" if len(input_shape) == 2 else "row"
    categories = tuple(
        pair for pair in model.categories if set(indicator_names(*pair)) <= set(names)
    )
    # Raw series are stored as steps x columns.
    shape = (*input_shape[:0:-1], columns)
    return (Input(kind, kind, shape, names, allows_missing, categories=categories),)


def _image_input(preprocess: Preprocess, input_shape: tuple[int, ...]) -> Input:
    name = preprocess.blocks[0].name if preprocess.blocks else "image"
    channels: Sizes = ("channels",) if preprocess.channels is not None else input_shape[:1]
    sides: Sizes = ("height", "width") if preprocess.resize is not None else input_shape[1:]
    return Input(name, "image", (*channels, *sides), pixel_range=preprocess.pixel_range)


def to_predict_inputs(model: SavedModel, arrays: tuple[Tensor, ...]) -> Any:
    """Convert inputs of the graph to an input of `Run.predict`.

    Args:
        model: The saved model.
        arrays: One tensor for each input of the graph, `[N, *shape]`.

    Returns:
        The blocks, keyed by name, if `are_blocks_flattened`. Otherwise, raw rows `[N, ...]` with
        NaN in columns that the model does not use.
    """
    preprocess = Preprocess.of_model(model)
    if are_blocks_flattened(preprocess):
        return {block.name: part for block, part in zip(preprocess.blocks, arrays, strict=True)}
    (x,) = arrays
    if preprocess.raw is None or preprocess.spans is None or preprocess.blocks:
        return x
    raw = x.new_full((*x.shape[:-1], preprocess.raw[-1]), torch.nan)
    raw[..., torch.cat([torch.arange(*span) for span in preprocess.spans])] = x
    return raw


def draw_inputs(model: SavedModel, size: int, draws: torch.Generator) -> tuple[Tensor, ...]:
    """Draw random examples for tracing and checking a graph.

    Table and series values have the scale of the client's data. If the model supports missing
    values, some values are missing at random. Dynamic image sizes depend on `size`.

    Args:
        model: The saved model.
        size: Number of examples.
        draws: Random generator.

    Returns:
        One tensor for each input of the graph, `[size, *shape]`.
    """
    preprocess = Preprocess.of_model(model)
    parts = tuple(_draw_input(spec, preprocess, size, draws) for spec in inputs_of(model))
    if not are_blocks_flattened(preprocess):
        return parts
    missing = torch.rand(size, len(parts), generator=draws) < 0.3
    masks = [missing[:, i].reshape(-1, *[1] * (part.ndim - 1)) for i, part in enumerate(parts)]
    if not preprocess.missing:
        return parts
    return tuple(part.masked_fill(m, torch.nan) for part, m in zip(parts, masks, strict=True))


def _draw_input(spec: Input, preprocess: Preprocess, size: int, draws: torch.Generator) -> Tensor:
    shape = _concrete_shape(spec, preprocess, size)
    if spec.kind == "tokens":
        return torch.randint(0, spec.tokens, (size, *shape), generator=draws)
    if spec.kind == "image":
        return torch.rand(size, *shape, generator=draws)
    x = torch.randn(size, *shape, generator=draws)
    has_scale = preprocess.mean is not None and preprocess.std is not None
    if has_scale and not are_blocks_flattened(preprocess):
        x = x * torch.tensor(preprocess.std) + torch.tensor(preprocess.mean)
    if spec.allows_missing:
        x = x.masked_fill(torch.rand(x.shape, generator=draws) < 0.2, torch.nan)
    return x


def _concrete_shape(spec: Input, preprocess: Preprocess, size: int) -> list[int]:
    """Return the shape of an input, in which dynamic sizes depend on the batch size."""
    side = preprocess.resize or 0
    channels = (1, 3 if preprocess.channels in (None, 1) else preprocess.channels)
    sizes = {
        "channels": channels[size % 2],
        "height": side if size == 1 else 2 * side - 1,
        "width": side if size == 1 else side + size,
    }
    return [sizes[s] if isinstance(s, str) else s for s in spec.shape]


class ExportedModel(nn.Module):
    """Module that maps raw inputs to the predictions of `Run.predict`.

    Args:
        model: The saved model.
        personal: Whether to include the client's label frequencies.

    Attributes:
        inputs: Descriptions of the inputs of `forward`.
        kind: Kind of task: "multiclass", "multilabel" or "regression".
    """

    offset: Tensor | None

    def __init__(self, model: SavedModel, personal: bool) -> None:
        super().__init__()
        self.inputs = inputs_of(model)
        self.kind = model.task.kind
        self.preprocessing = ExportedPreprocessing(model)
        self.model = model.module(personal).requires_grad_(False)
        self.register_buffer("offset", model.offset(personal))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute predictions for raw examples.

        Args:
            *inputs: One tensor for each input, `[N, *shape]`.

        Returns:
            Probabilities, or values for regression, `[N, outputs]`. Rows of invalid examples
            contain NaN.
        """
        invalid = self.preprocessing.invalid_rows(inputs)
        z = self.model(self.preprocessing(inputs))
        z = z if self.offset is None else z + self.offset
        predictions: Tensor = z
        if self.kind == "multilabel":
            predictions = z.sigmoid()
        elif self.kind == "multiclass":
            predictions = z.softmax(-1)
        return predictions.masked_fill(invalid.unsqueeze(1), torch.nan)


class ExportedPreprocessing(nn.Module):
    """Exportable version of `hetero_fl.data.Preprocess`.

    The module supports dynamic sizes and has no branches that depend on values.

    Args:
        model: The saved model.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, model: SavedModel) -> None:
        super().__init__()
        self.inputs = inputs_of(model)
        self.preprocess = Preprocess.of_model(model)
        is_image = len(model.arch.input_shape) == 3
        for name in ("mean", "std"):
            value = getattr(self.preprocess, name)
            numbers = None if value is None else torch.tensor(value)
            if numbers is not None and is_image and numbers.ndim:
                numbers = numbers[:, None, None]
            self.register_buffer(name, numbers)

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Convert raw inputs, one tensor `[N, *shape]` each, to the input of the model."""
        if self.inputs[0].kind == "tokens":
            return inputs[0]
        if are_blocks_flattened(self.preprocess):
            x = torch.cat([part.flatten(1) for part in inputs], dim=1)
        else:
            x = self._resize(inputs[0])
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        if self.preprocess.missing is not None:
            missing = x.isnan()
            marks = self._missing_marks(missing).to(x.dtype)
            x = torch.cat([x.masked_fill(missing, 0.0), marks], dim=-1)
        return x.transpose(1, 2) if x.ndim == 3 else x

    def invalid_rows(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return whether each row is an invalid example, bool `[N]`.

        Invalid are infinite and unsupported missing values, and images with other channels.
        """
        invalid = []
        for part, spec in zip(inputs, self.inputs, strict=True):
            values = part.float().flatten(1)
            found = values.isinf() if spec.allows_missing else values.isinf() | values.isnan()
            channels = self.preprocess.channels
            if spec.kind == "image" and channels is not None and channels > 1:
                count = _num_channels(part)
                found = found | ((count != 1) & (count != channels))
            invalid.append(found.any(1))
        return torch.stack(invalid).any(0)

    def _resize(self, x: Tensor) -> Tensor:
        side = self.preprocess.resize
        channels = self.preprocess.channels
        # An image that already has this size is unchanged.
        if side is not None:
            x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        if channels == 1:
            return x.mean(1, keepdim=True)
        # A gray image is repeated in each channel.
        return x if channels is None else x[:, torch.arange(channels) % _num_channels(x)]

    def _missing_marks(self, missing: Tensor) -> Tensor:
        if not self.preprocess.blocks:
            return missing
        spans = spans_of(self.preprocess.blocks)
        return torch.stack([missing[:, start:stop].all(1) for start, stop in spans], dim=1)


def _num_channels(x: Tensor) -> Tensor:
    """Return the number of channels as a tensor.

    Tracing would convert an integer to a constant.
    """
    return torch.ones_like(x[0, :, 0, 0], dtype=torch.int64).sum()
