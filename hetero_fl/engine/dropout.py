"""Dropout whose masks are drawn from generators that are seeded for each step and participant.

Masks depend on the step, the participant and the order of the layers, and not on a global generator
or on the participants that are trained together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

STRIDE = 0x7F4A7C15  # between the seeds of two masks of a step; another than between steps
SEEDS = 2**32  # of which torch's generator on CPUs reads no more
LEVELS = 2**16  # a drop probability is rounded to one of so many


class DropoutStreams:
    """The masks of a step: of one participant, or of each participant of a stack.

    Each mask is drawn from a seed of its own, for whole batches, of which a short batch takes the
    first rows. So padding a batch to the length of another participant's changes no draw.

    Args:
        device: Where the masks are drawn.
    """

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device)
        self._keys: Sequence[int] = ()
        self._most_rows = 1
        self._num_masks = 0
        self._place: Tensor | None = None

    def seed(self, keys: Sequence[int], batch_size: int = 0) -> None:
        """Begin a step.

        Args:
            keys: The seed of each participant.
            batch_size: Number of examples of a whole batch.
        """
        self._keys = keys
        self._most_rows = batch_size + 1  # a last example alone joins the batch before it
        self._num_masks = 0

    @contextmanager
    def stacked(self, place: Tensor) -> Iterator[None]:
        """Draw a mask for each participant; `place` is batched by `torch.vmap`."""
        self._place = place
        try:
            yield
        finally:
            self._place = None

    def mask(self, input: Tensor, p: float) -> Tensor:
        """Return the next mask, 0 or `1 / (1 - p)`, in the shape of `input`."""
        if not self._keys:
            raise RuntimeError("dropout of a model in training outside a training step")
        self._num_masks += 1
        if self._place is not None:
            mask: Tensor = _StackedMask.apply(input.detach(), self._place, p, self)
            return mask
        return self._draw(input, self._keys[0], p)

    def draw_stacked(self, like: Tensor, p: float) -> Tensor:
        """Return the masks of all participants, shape `[K, ...]` as `like`."""
        return torch.stack(
            [self._draw(rows, k, p) for rows, k in zip(like, self._keys, strict=True)]
        )

    def _draw(self, like: Tensor, key: int, p: float) -> Tensor:
        kept = round((1 - p) * LEVELS)
        if kept in (0, LEVELS):
            return torch.full_like(like, kept / LEVELS)
        rows = -(-len(like) // self._most_rows) * self._most_rows
        shape = (rows, *like.shape[1:])
        self._generator.manual_seed((key + self._num_masks * STRIDE) % SEEDS)
        # Four 16-bit levels per draw take a tenth of the time of `bernoulli_`.
        draws = torch.empty(-(-prod(shape) // 4), dtype=torch.int64, device=like.device)
        draws.random_(-(2**63), None, generator=self._generator)
        levels = draws.view(torch.int16)[: prod(shape)].view(shape)
        mask = torch.lt(levels, kept - LEVELS // 2, out=like.new_empty(shape))
        return mask.mul_(LEVELS / kept)[: len(like)]


class _StackedMask(torch.autograd.Function):
    """The mask of one participant; under vmap those of all of them."""

    @staticmethod
    def forward(input: Tensor, place: Tensor, p: float, streams: DropoutStreams) -> Tensor:
        return streams.draw_stacked(input[None], p)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        return None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        dims: tuple[int | None, ...],
        input: Tensor,
        place: Tensor,
        p: float,
        streams: DropoutStreams,
    ) -> tuple[Tensor, int]:
        if dims[0] is None:
            like = input.expand(info.batch_size, *input.shape)
        else:
            like = input.movedim(dims[0], 0)
        return streams.draw_stacked(like, p), 0


class KeyedDropout(nn.Dropout):
    """`nn.Dropout` with masks from `DropoutStreams`.

    Args:
        p: Probability of an element to be zeroed.
        streams: The generators of the step.
    """

    def __init__(self, p: float, streams: DropoutStreams) -> None:
        super().__init__(p)
        self._streams = streams

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        return input * self._streams.mask(input, self.p)


def use_keyed_dropout(module: nn.Module, streams: DropoutStreams) -> bool:
    """Replace a model's dropout layers; return whether it has any that drops."""
    found = False
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # also one that is there twice
            if type(child) is nn.Dropout:
                setattr(parent, name, KeyedDropout(child.p, streams))
                found = found or child.p > 0
    return found
