"""Dropout with masks from a generator that is seeded for each step and participant.

A mask depends on the optimizer step, the participant and the position of the layer. Masks depend
neither on the global generator nor on other participants that are trained at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

# Difference between the seeds of two consecutive masks of a step. This number must differ from
# `GOLDEN` in `engine.training`, the difference between two steps.
STRIDE = 0x7F4A7C15
# Number of seeds that the CPU generator of torch distinguishes.
SEEDS = 2**32
# Drop probabilities are rounded to multiples of 1 / LEVELS.
LEVELS = 2**16


class DropoutStreams:
    """The dropout masks of an optimizer step, for one or for several stacked participants.

    Each mask has its own seed and is drawn for a full batch. A smaller batch uses the first rows of
    the mask. Therefore, padding a batch to the size of another participant's batch does not change
    the mask.

    Args:
        device: The device on which masks are drawn.
    """

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device)
        self._keys: Sequence[int] = ()
        self._most_rows = 1
        self._num_masks = 0
        self._participant_idx: Tensor | None = None

    def seed(self, keys: Sequence[int], batch_size: int = 0) -> None:
        """Begin an optimizer step, so that the next mask is the first mask of this step.

        Args:
            keys: The seed of each participant.
            batch_size: Number of examples of a full batch.
        """
        self._keys = keys
        # A batch can have one more example: a last batch of one example is merged with the batch
        # before it.
        self._most_rows = batch_size + 1
        self._num_masks = 0

    @contextmanager
    def stacked(self, participant_idx: Tensor) -> Iterator[None]:
        """Draw the masks of all stacked participants inside the `with` block.

        Args:
            participant_idx: Index of the participant, a scalar under `torch.vmap`.
        """
        self._participant_idx = participant_idx
        try:
            yield
        finally:
            self._participant_idx = None

    def mask(self, x: Tensor, p: float) -> Tensor:
        """Draw the next mask of the step.

        Args:
            x: Tensor that determines shape, dtype and device of the mask, shape `[B, ...]`.
            p: Probability that an element is zeroed.

        Returns:
            Mask in the shape of `x`, with values 0 and `1 / (1 - p)`.

        Raises:
            RuntimeError: If no step has begun.
        """
        if not self._keys:
            raise RuntimeError("dropout in training mode was used outside a training step")
        self._num_masks += 1
        if self._participant_idx is not None:
            mask: Tensor = _StackedMask.apply(x.detach(), self._participant_idx, p, self)
            return mask
        return self._draw(x, self._keys[0], p)

    def draw_stacked(self, like: Tensor, p: float) -> Tensor:
        """Draw the next mask of each participant.

        Args:
            like: Tensor in the shape of the masks, `[K, B, ...]`.
            p: Probability that an element is zeroed.
        """
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
        # Drawing four 16-bit integers at once takes a tenth of the time of `bernoulli_`.
        draws = torch.empty(-(-prod(shape) // 4), dtype=torch.int64, device=like.device)
        draws.random_(-(2**63), None, generator=self._generator)
        levels = draws.view(torch.int16)[: prod(shape)].view(shape)
        mask = torch.lt(levels, kept - LEVELS // 2, out=like.new_empty(shape))
        return mask.mul_(LEVELS / kept)[: len(like)]


class _StackedMask(torch.autograd.Function):
    """The mask of one participant, or the masks of all participants under vmap."""

    @staticmethod
    def forward(x: Tensor, _participant_idx: Tensor, p: float, streams: DropoutStreams) -> Tensor:
        return streams.draw_stacked(x[None], p)[0]

    @staticmethod
    def setup_context(ctx: Any, _inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(_ctx: Any, _grad: Tensor) -> tuple[None, None, None, None]:
        return None, None, None, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        x, _participant_idx, p, streams = args
        like = x.expand(info.batch_size, *x.shape) if dims[0] is None else x.movedim(dims[0], 0)
        return streams.draw_stacked(like, p), 0


class KeyedDropout(nn.Dropout):
    """`nn.Dropout` with masks from `DropoutStreams`.

    Args:
        p: Probability that an element is zeroed.
        streams: The masks of the current step.
    """

    def __init__(self, p: float, streams: DropoutStreams) -> None:
        super().__init__(p)
        # A method, because the changing state of the streams is not state of the model.
        self._mask = streams.mask

    @override
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * self._mask(x, self.p)


def use_keyed_dropout(module: nn.Module, streams: DropoutStreams) -> bool:
    """Replace all `nn.Dropout` layers of a model by `KeyedDropout` layers, in place.

    Args:
        module: The model.
        streams: The masks of the new layers.

    Returns:
        Whether any dropout layer has a positive probability.
    """
    found = False
    for parent in list(module.modules()):
        # `_modules` also lists a layer that is used twice.
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Dropout:
                setattr(parent, name, KeyedDropout(child.p, streams))
                found = found or child.p > 0
    return found
