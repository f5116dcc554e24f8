"""A model from raw examples to probabilities, as one module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_fl.core.images import OVERSHOOT
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data.dataset import Categories, indicator_names, spans_of
from hetero_fl.data.preprocessing import Preprocess

# What an exported model is given: raw examples, as far as the model sees them, each kind of
# measurement under a name.

Sizes = tuple[int | str, ...]
_MEANINGS = {
    "tokens": "numbers of words, 0 to {last_token}; 0 is no word and fills shorter texts up from the left",
    "image": "pixels from 0 to 1 (bytes divided by 255), channels first{missing}",
    "series": "steps × columns, the newest step last, in the units of the data{missing}",
    "row": "a value a column, in the units of the data{encoded}{missing}",
}
_ENCODED = "; NAME=VALUE is 1 where column NAME has that value, else 0"


@dataclass(frozen=True)
class Input:
    """One input: its name, its shape without the batch (a word is a size that is free), what its numbers are.

    `columns` are the names along the last axis, where those are known; `categories` the text columns that some of them
    encode, with their values; `allows_missing`: NaN is a missing value, and no mistake;
    `tokens`: how many different ones there are.
    """

    name: str
    kind: Literal["image", "row", "series", "tokens"]
    shape: Sizes
    columns: tuple[str, ...] = ()
    allows_missing: bool = False
    tokens: int = 0
    categories: Categories = ()

    @property
    def dtype(self) -> str:
        """Of the numbers."""
        return "int64" if self.kind == "tokens" else "float32"

    @property
    def meaning(self) -> str:
        """What the numbers are, in words."""
        return _MEANINGS[self.kind].format(
            last_token=self.tokens - 1,
            encoded=_ENCODED if self.categories else "",
            missing="; NaN where a value is missing" if self.allows_missing else "",
        )

    def record(self) -> dict[str, Any]:
        """Return the input as plain fields, for JSON."""
        optional = {
            "columns": list(self.columns),
            "categories": {column: list(values) for column, values in self.categories},
            "gaps": self.allows_missing,
            "tokens": self.tokens,
        }
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": ["batch", *self.shape],
            "dtype": self.dtype,
            "meaning": self.meaning,
            **{key: value for key, value in optional.items() if value},
        }


def side_by_side(view: Preprocess) -> bool:
    """Whether the model reads blocks as one row, and not a single block in its own shape."""
    return bool(view.blocks) and (len(view.blocks) > 1 or view.missing is not None)


def inputs_of(model: SavedModel) -> tuple[Input, ...]:
    """What the exported graph takes: tokens, images, rows or series; a block of several each by itself."""
    view = Preprocess(**model.preprocess)
    seen = model.arch.input_shape
    gaps = view.missing is not None
    if model.arch.vocabulary is not None:
        return (Input("tokens", "tokens", seen, tokens=model.arch.vocabulary),)
    if side_by_side(view):
        return tuple(
            Input(block.name, "image" if block.image else "row", block.shape, allows_missing=gaps)
            for block in view.blocks
        )
    if len(seen) == 3:
        name = view.blocks[0].name if view.blocks else "image"
        channels: Sizes = ("channels",) if view.channels is not None else seen[:1]
        return (
            Input(
                name,
                "image",
                (*channels, *(("height", "width") if view.resize is not None else seen[1:])),
            ),
        )
    if view.blocks:
        return (Input(view.blocks[0].name, "row", view.blocks[0].shape),)
    names = tuple(view.names(model.columns)) if model.columns else ()
    columns = (
        seen[0] if view.raw is None else view.select_columns(torch.empty(0, view.raw[-1])).shape[-1]
    )
    kind: Literal["series", "row"] = "series" if len(seen) == 2 else "row"
    categories = tuple(
        pair for pair in model.categories if set(indicator_names(*pair)) <= set(names)
    )
    shape = (*seen[:0:-1], columns)  # a series lies in memory with its steps first
    return (Input(kind, kind, shape, names, gaps, categories=categories),)


def to_predict_form(model: SavedModel, arrays: tuple[Tensor, ...]) -> Any:
    """The same examples in the form that `Run.predict` takes: whole rows where it wants those, or blocks by name."""
    view = Preprocess(**model.preprocess)
    if side_by_side(view):
        return {block.name: part for block, part in zip(view.blocks, arrays, strict=True)}
    (x,) = arrays
    if view.raw is None or view.spans is None or view.blocks:
        return x
    whole = x.new_full((*x.shape[:-1], view.raw[-1]), torch.nan)
    whole[..., torch.cat([torch.arange(*span) for span in view.spans])] = x
    return whole


def draw_inputs(model: SavedModel, size: int, draws: torch.Generator) -> tuple[Tensor, ...]:
    """Examples to try a graph on, `size` of each input: values of the size that this client's data have, and gaps where the
    model has an answer to them; free sizes of images differ with `size`."""
    view = Preprocess(**model.preprocess)
    parts = tuple(_draw_input(one, view, size, draws) for one in inputs_of(model))
    if not side_by_side(view):
        return parts
    gone = torch.rand(size, len(parts), generator=draws) < 0.3
    whole = [gone[:, i].reshape(-1, *[1] * (part.ndim - 1)) for i, part in enumerate(parts)]
    return (
        tuple(p.masked_fill(g, torch.nan) for p, g in zip(parts, whole, strict=True))
        if view.missing
        else parts
    )


def _draw_input(one: Input, view: Preprocess, size: int, draws: torch.Generator) -> Tensor:
    if one.kind == "tokens":
        return torch.randint(
            0, one.tokens, (size, *_concrete_shape(one, view, size)), generator=draws
        )
    if one.kind == "image":
        return torch.rand(size, *_concrete_shape(one, view, size), generator=draws)
    x = torch.randn(size, *_concrete_shape(one, view, size), generator=draws)
    if view.mean is not None and view.std is not None and not side_by_side(view):
        x = x * torch.tensor(view.std) + torch.tensor(view.mean)
    if one.allows_missing:
        x = x.masked_fill(torch.rand(x.shape, generator=draws) < 0.2, torch.nan)
    return x


def _concrete_shape(one: Input, view: Preprocess, size: int) -> list[int]:
    """A number for each free size: of channels 1 or what the model sees (3, of grey); smaller and larger images by turns."""
    side = view.resize or 0
    colours = (1, 3 if view.channels in (None, 1) else view.channels)
    free = {
        "channels": colours[size % 2],
        "height": side if size == 1 else 2 * side - 1,
        "width": side if size == 1 else side + size,
    }
    return [free[s] if isinstance(s, str) else s for s in one.shape]


# The whole way from raw examples to probabilities as one module, which can be written down as a
# graph.
#
# A graph cannot refuse: for a row that `Run.predict` refuses (infinity, a missing value that the
# model has no answer to, pixels outside 0..1, tokens out of range) the result is NaN, so that no
# mistake passes for a prediction.

OUTPUTS = {"multiclass": "probabilities", "multilabel": "probabilities", "regression": "values"}


class ExportedModel(nn.Module):
    """Raw inputs, `[N, *shape]` each as `inputs` say, to probabilities or values `[N, outputs]`; as the run's `predict`.

    `personal`: with the client's own label frequencies, as on its own patients.
    """

    prior: Tensor | None

    def __init__(self, model: SavedModel, personal: bool) -> None:
        super().__init__()
        self.inputs = inputs_of(model)
        self.kind = model.task.kind
        self.view = ExportedPreprocessing(model)
        self.model = model.module().requires_grad_(False)
        known = personal and model.log_prior is not None
        self.register_buffer("prior", torch.tensor(model.log_prior) if known else None)

    def forward(self, *given: Tensor) -> Tensor:
        refused = self.view.invalid_rows(given)
        z = self.model(self.view(given)).logits
        z = z if self.prior is None else z + self.prior
        found: Tensor = (
            z
            if self.kind == "regression"
            else z.sigmoid()
            if self.kind == "multilabel"
            else z.softmax(-1)
        )
        return found.masked_fill(refused.unsqueeze(1), torch.nan)


class ExportedPreprocessing(nn.Module):
    """What `hetero_fl.data.Preprocess` makes of what it takes, with sizes that stay free and no branch on a value."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, model: SavedModel) -> None:
        super().__init__()
        self.inputs = inputs_of(model)
        self.view = Preprocess(**model.preprocess)
        image = len(model.arch.input_shape) == 3
        for name in ("mean", "std"):
            value = getattr(self.view, name)
            numbers = None if value is None else torch.tensor(value)
            if numbers is not None and image and numbers.ndim:
                numbers = numbers[:, None, None]
            self.register_buffer(name, numbers)

    def forward(self, given: tuple[Tensor, ...]) -> Tensor:
        """What the model takes."""
        if self.inputs[0].kind == "tokens":
            # One that is out of range is refused below, and may not stop the rows beside it.
            return given[0].clamp(0, self.inputs[0].tokens - 1)
        several = side_by_side(self.view)
        x = (
            torch.cat([part.flatten(1) for part in given], dim=1)
            if several
            else self._resize(given[0])
        )
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        if self.view.missing is not None:
            gone = x.isnan()
            x = torch.cat([x.masked_fill(gone, 0.0), self._missing_marks(gone).to(x.dtype)], dim=-1)
        return x.transpose(1, 2) if x.ndim == 3 else x

    def invalid_rows(self, given: tuple[Tensor, ...]) -> Tensor:
        """bool `[N]`: rows that are no examples."""
        found = [
            self._bad(part, one).flatten(1).any(1)
            for part, one in zip(given, self.inputs, strict=True)
        ]
        return torch.stack(found).any(0)

    def _bad(self, x: Tensor, one: Input) -> Tensor:
        if one.kind == "tokens":
            return (x < 0) | (x >= one.tokens)
        bad = x.isinf() if one.allows_missing else x.isinf() | x.isnan()
        if one.kind != "image":
            return bad
        bad = bad | (x < -OVERSHOOT) | (x > 1 + OVERSHOOT)
        if self.view.channels is not None and self.view.channels > 1:
            found = _channels(x)
            bad = bad | ((found != 1) & (found != self.view.channels))
        return bad

    def _resize(self, x: Tensor) -> Tensor:
        side = self.view.resize
        wanted = self.view.channels
        if side is not None:  # of an image that has this size already it is the image
            x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        if wanted == 1:
            return x.mean(1, keepdim=True)
        # A grey image is taken for each of the colours; one in colour, channel by channel.
        return x if wanted is None else x[:, torch.arange(wanted) % _channels(x)]

    def _missing_marks(self, gone: Tensor) -> Tensor:
        if not self.view.blocks:
            return gone
        return torch.stack(
            [gone[:, start:stop].all(1) for start, stop in spans_of(self.view.blocks)], dim=1
        )


def _channels(x: Tensor) -> Tensor:
    """How many channels images have, as a tensor: a number would be fixed to that of the examples."""
    return torch.ones_like(x[0, :, 0, 0], dtype=torch.int64).sum()
