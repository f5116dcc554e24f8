"""The whole way from raw examples to probabilities as one module, which can be written down as a graph.

A graph cannot refuse: for a row that `Run.predict` refuses (infinity, a missing value that the model has no answer to, pixels
outside 0..1, tokens out of range) the result is NaN, so that no mistake passes for a prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_fl.data.layout import spans_of
from hetero_fl.data.preprocess import Preprocess
from hetero_fl.experiment.exporting.inputs import Input, inputs_of, side_by_side
from hetero_fl.images import OVERSHOOT
from hetero_fl.saved import SavedModel

OUTPUTS = {"multiclass": "probabilities", "multilabel": "probabilities", "regression": "values"}


class Exported(nn.Module):
    """Raw inputs, `[N, *shape]` each as `inputs` say, to probabilities or values `[N, outputs]`; as the run's `predict`.

    `home`: with the client's own label frequencies, as on its own patients.
    """

    prior: Tensor | None

    def __init__(self, model: SavedModel, home: bool) -> None:
        super().__init__()
        self.inputs, self.kind = inputs_of(model), model.task.kind
        self.view = Seen(model)
        self.model = model.module().requires_grad_(False)
        known = home and model.log_prior is not None
        self.register_buffer("prior", torch.tensor(model.log_prior) if known else None)

    def forward(self, *given: Tensor) -> Tensor:
        refused = self.view.refused(given)
        z = self.model(self.view(given)).logits
        z = z if self.prior is None else z + self.prior
        found: Tensor = z if self.kind == "regression" else z.sigmoid() if self.kind == "multilabel" else z.softmax(-1)
        return found.masked_fill(refused.unsqueeze(1), torch.nan)


class Seen(nn.Module):
    """What `hetero_fl.data.Preprocess` makes of what it takes, with sizes that stay free and no branch on a value."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, model: SavedModel) -> None:
        super().__init__()
        self.inputs, self.view = inputs_of(model), Preprocess(**model.preprocess)
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
        x = torch.cat([part.flatten(1) for part in given], dim=1) if several else self._resized(given[0])
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        if self.view.missing is not None:
            gone = x.isnan()
            x = torch.cat([x.masked_fill(gone, 0.0), self._marks(gone).to(x.dtype)], dim=-1)
        return x.transpose(1, 2) if x.ndim == 3 else x

    def refused(self, given: tuple[Tensor, ...]) -> Tensor:
        """bool `[N]`: rows that are no examples."""
        found = [self._bad(part, one).flatten(1).any(1) for part, one in zip(given, self.inputs, strict=True)]
        return torch.stack(found).any(0)

    def _bad(self, x: Tensor, one: Input) -> Tensor:
        if one.kind == "tokens":
            return (x < 0) | (x >= one.tokens)
        bad = x.isinf() if one.gaps else x.isinf() | x.isnan()
        if one.kind != "image":
            return bad
        bad = bad | (x < -OVERSHOOT) | (x > 1 + OVERSHOOT)
        if self.view.channels is not None and self.view.channels > 1:
            found = _channels(x)
            bad = bad | ((found != 1) & (found != self.view.channels))
        return bad

    def _resized(self, x: Tensor) -> Tensor:
        side, wanted = self.view.resize, self.view.channels
        if side is not None:  # of an image that has this size already it is the image
            x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        if wanted == 1:
            return x.mean(1, keepdim=True)
        # A grey image is taken for each of the colours; one in colour, channel by channel.
        return x if wanted is None else x[:, torch.arange(wanted) % _channels(x)]

    def _marks(self, gone: Tensor) -> Tensor:
        if not self.view.blocks:
            return gone
        return torch.stack([gone[:, start:stop].all(1) for start, stop in spans_of(self.view.blocks)], dim=1)


def _channels(x: Tensor) -> Tensor:
    """How many channels images have, as a tensor: a number would be fixed to that of the examples."""
    return torch.ones_like(x[0, :, 0, 0], dtype=torch.int64).sum()
