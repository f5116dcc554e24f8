"""Modules that combine a model and its preprocessing in a graph that torch can export.

An exported graph cannot raise errors. Instead, the graph returns NaN for rows with infinity or
unsupported missing values. It does not check the range of pixels and tokens, as `Run.predict` and
`score.py` do. A block is a modality of a multimodal example (see `hetero_fl.data.dataset.Block`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data.dataset import indicator_names, spans_of
from hetero_fl.data.preprocessing import Preprocess

Json = dict[str, Any]
Sizes = tuple[int | str, ...]
OUTPUTS = {"multiclass": "probabilities", "multilabel": "probabilities", "regression": "values"}
"""Name of the output for each kind of task."""
_MEANINGS = {
    "tokens": "word indices, 0 to {last_token}; 0 is padding on the left of shorter texts",
    "image": "pixels from 0 to 1 ({integers}), channels first{missing}",
    "series": "steps × columns, the newest step last, in the units of the data{missing}",
    "row": "one value per column, in the units of the data{encoded}{missing}",
}


def are_blocks_flattened(preprocess: Preprocess) -> bool:
    """Return whether the blocks of an example are flattened and concatenated into one row."""
    blocks = preprocess.blocks
    return bool(blocks) and (len(blocks) > 1 or preprocess.missing is not None)


def inputs_of(model: SavedModel) -> list[Json]:
    """Describe the inputs of the exported graph.

    The graph has one input for each block of an example if the model's backbone receives the blocks
    as one flattened row (see `are_blocks_flattened`). Otherwise, it has a single input.

    Args:
        model: The saved model.

    Returns:
        One dictionary for each input, with the keys `name`, `kind` ("image", "row", "series" or
        "tokens"), `shape` (a string is the name of a dynamic size), `dtype` and `meaning`. The
        following keys are absent if they do not apply: `columns` (names along the last axis),
        `categories` (text columns that are encoded as indicator columns, with their values), `gaps`
        (true if NaN represents a missing value), `tokens` (size of the vocabulary) and `range`
        (value of integer pixels that becomes 1, instead of 255).
    """
    preprocess = Preprocess.of_model(model)
    shape = model.arch.input_shape
    gaps = preprocess.missing is not None
    blocks = preprocess.blocks
    if model.arch.vocabulary is not None:
        return [_describe("tokens", "tokens", shape, tokens=model.arch.vocabulary)]
    if are_blocks_flattened(preprocess):
        return [
            _describe(b.name, "image", b.shape, gaps=gaps, range=preprocess.pixel_range)
            if b.image
            else _describe(b.name, "row", b.shape, gaps=gaps)
            for b in blocks
        ]
    if len(shape) == 3:
        name = blocks[0].name if blocks else "image"
        channels: Sizes = shape[:1] if preprocess.channels is None else ("channels",)
        sides: Sizes = shape[1:] if preprocess.resize is None else ("height", "width")
        return [_describe(name, "image", (*channels, *sides), range=preprocess.pixel_range)]
    if blocks:
        return [_describe(blocks[0].name, "row", blocks[0].shape)]
    names = preprocess.names(model.columns) if model.columns else []
    width = shape[0]
    if preprocess.raw is not None:
        width = preprocess.select_columns(torch.empty(0, preprocess.raw[-1])).shape[-1]
    categories = {
        column: list(values)
        for column, values in model.categories
        if set(indicator_names(column, values)) <= set(names)
    }
    kind = "series" if len(shape) == 2 else "row"
    # Raw series are stored as steps x columns.
    sizes = (*shape[:0:-1], width)
    return [_describe(kind, kind, sizes, columns=names, categories=categories, gaps=gaps)]


def _describe(name: str, kind: str, shape: Sizes, **optional: Any) -> Json:
    pixel_range = optional.get("range")
    meaning = _MEANINGS[kind].format(
        last_token=optional.get("tokens", 0) - 1,
        integers=f"integers divided by {pixel_range:g}" if pixel_range else "bytes divided by 255",
        encoded=(
            "; NAME=VALUE is 1 where column NAME has that value, else 0"
            if optional.get("categories")
            else ""
        ),
        missing="; NaN where a value is missing" if optional.get("gaps") else "",
    )
    return {
        "name": name,
        "kind": kind,
        "shape": ["batch", *shape],
        "dtype": "int64" if kind == "tokens" else "float32",
        "meaning": meaning,
        **{key: value for key, value in optional.items() if value},
    }


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
    values, some values or blocks are missing at random. Dynamic image sizes depend on `size`.

    Args:
        model: The saved model.
        size: Number of examples.
        draws: Random generator.

    Returns:
        One tensor for each input of the graph, `[size, *shape]`.
    """
    preprocess = Preprocess.of_model(model)
    is_flattened = are_blocks_flattened(preprocess)
    side = preprocess.resize or 0
    sizes: dict[int | str, int] = {
        "batch": size,
        "channels": 1 if size % 2 == 0 else preprocess.channels or 3,
        "height": side if size == 1 else 2 * side - 1,
        "width": side if size == 1 else side + size,
    }
    parts = []
    for spec in inputs_of(model):
        shape = [sizes.get(n, n) for n in spec["shape"]]
        if spec["kind"] == "tokens":
            part = torch.randint(0, spec["tokens"], shape, generator=draws)
        elif spec["kind"] == "image":
            part = torch.rand(shape, generator=draws)
        else:
            part = torch.randn(shape, generator=draws)
            if preprocess.mean is not None and preprocess.std is not None and not is_flattened:
                part = part * torch.tensor(preprocess.std) + torch.tensor(preprocess.mean)
        if spec.get("gaps"):
            # A block is missing as a whole.
            places = [size, *[1] * (len(shape) - 1)] if is_flattened else shape
            part = part.masked_fill(torch.rand(places, generator=draws) < 0.3, torch.nan)
        parts.append(part)
    return tuple(parts)


class ExportedModel(nn.Module):
    """Module that maps raw inputs to the predictions of `Run.predict`.

    The preprocessing equals `hetero_fl.data.Preprocess`, but supports dynamic sizes and has no
    branches that depend on values.

    Args:
        model: The saved model.
        personal: Whether to include the client's label frequencies.

    Attributes:
        inputs: Descriptions of the inputs of `forward` (see `inputs_of`).
        kind: Kind of task: "multiclass", "multilabel" or "regression".
    """

    mean: Tensor | None
    std: Tensor | None
    offset: Tensor | None

    def __init__(self, model: SavedModel, personal: bool) -> None:
        super().__init__()
        self.inputs = inputs_of(model)
        self.kind = model.task.kind
        self.preprocess = Preprocess.of_model(model)
        self.model = model.module(personal).requires_grad_(False)
        self.register_buffer("offset", model.offset(personal))
        for name in ("mean", "std"):
            value = getattr(self.preprocess, name)
            numbers = None if value is None else torch.tensor(value)
            if numbers is not None and numbers.ndim and len(model.arch.input_shape) == 3:
                numbers = numbers[:, None, None]
            self.register_buffer(name, numbers)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute predictions for raw examples.

        Args:
            *inputs: One tensor for each input, `[N, *shape]`.

        Returns:
            Probabilities, or values for regression, `[N, outputs]`. Rows of invalid examples
            contain NaN.
        """
        z: Tensor = self.model(self._preprocessed(inputs))
        if self.offset is not None:
            z = z + self.offset
        if self.kind == "multilabel":
            z = z.sigmoid()
        elif self.kind == "multiclass":
            z = z.softmax(-1)
        return z.masked_fill(self._invalid_rows(inputs).unsqueeze(1), torch.nan)

    def _preprocessed(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Convert raw inputs, one tensor `[N, *shape]` each, to the input of the model."""
        x = inputs[0]
        if self.inputs[0]["kind"] == "tokens":
            return x
        side = self.preprocess.resize
        channels = self.preprocess.channels
        if are_blocks_flattened(self.preprocess):
            x = torch.cat([part.flatten(1) for part in inputs], dim=1)
        # An image that already has this size is unchanged.
        if side is not None:
            x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        if channels == 1:
            x = x.mean(1, keepdim=True)
        elif channels is not None:
            # A gray image is repeated in each channel.
            x = x[:, torch.arange(channels) % _num_channels(x)]
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        if self.preprocess.missing is not None:
            missing = x.isnan()
            marks = missing
            if self.preprocess.blocks:
                spans = spans_of(self.preprocess.blocks)
                marks = torch.stack([missing[:, slice(*span)].all(1) for span in spans], dim=1)
            x = torch.cat([x.masked_fill(missing, 0.0), marks.to(x.dtype)], dim=-1)
        return x.transpose(1, 2) if x.ndim == 3 else x

    def _invalid_rows(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return whether each row is an invalid example, bool `[N]`.

        Invalid are infinite and unsupported missing values, and images with other channels.
        """
        invalid = []
        channels = self.preprocess.channels or 1
        for part, spec in zip(inputs, self.inputs, strict=True):
            values = part.float().flatten(1)
            found = values.isinf() if spec.get("gaps") else values.isinf() | values.isnan()
            if spec["kind"] == "image" and channels > 1:
                count = _num_channels(part)
                found = found | ((count != 1) & (count != channels))
            invalid.append(found.any(1))
        return torch.stack(invalid).any(0)


def _num_channels(x: Tensor) -> Tensor:
    """Return the number of channels as a tensor.

    Tracing would convert an integer to a constant.
    """
    return torch.ones_like(x[0, :, 0, 0], dtype=torch.int64).sum()
