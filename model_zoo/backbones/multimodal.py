"""One model for several kinds of measurement of the same thing: a branch for each block of a row, and a fusion that knows which
blocks are there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model_zoo.backbones.cnn import cnn
from model_zoo.errors import InputError, ModelError
from model_zoo.shapes import Shape, is_integer
from model_zoo.split_model import Body

Blocks = tuple[tuple[str, tuple[int, ...]], ...]
"""Name and shape of each block, in the order in which they lie in a row: ``(("image", (1, 28, 28)), ("genes", (60,)))``."""
Fusion = Literal["concat", "gated"]
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def checked_blocks(value: Any) -> Blocks:
    """``value`` as blocks. Raises :class:`ModelError` for anything else."""
    found = []
    for pair in value if isinstance(value, Sequence) and not isinstance(value, str) else [None]:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ModelError(
                f"option blocks: found {value!r}, pairs of a name and a shape are needed"
            )
        name, shape = pair
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ModelError(f"option blocks: found name {name!r}; take letters, digits and _")
        if name in ("fusion", "hide") or hasattr(nn.Module(), name):
            raise ModelError(
                f"option blocks: found name '{name}', which a part of the model has; take another"
            )
        if (
            not isinstance(shape, Sequence)
            or len(shape) not in (1, 2, 3)
            or not all(is_integer(s) for s in shape)
        ):
            raise ModelError(
                f"option blocks: found shape {shape!r} of {name}, one to three whole numbers are needed"
            )
        found.append((name, tuple(int(s) for s in shape)))
    if len({name for name, _ in found}) < len(found):
        raise ModelError(f"option blocks: found {value!r}, each name may be there once")
    return tuple(found)


class Branch(nn.Sequential):
    """Features [B, width] of one block: a small CNN with GroupNorm for images, else two layers with LayerNorm.

    Neither looks at other examples: no statistics of those who have a block leak into those who share the branch.
    """

    def __init__(
        self, shape: tuple[int, ...], image_width: int, hidden: int, width: int, dropout: float
    ) -> None:
        if len(shape) == 3:
            body, out = cnn(Shape(shape[0], shape[1:]), width=image_width, norm="group")[:2]
            super().__init__(body, nn.Linear(out, width), nn.ReLU())
        else:
            super().__init__(
                nn.Linear(math.prod(shape), hidden),
                nn.LayerNorm(hidden),
                nn.ReLU(),
                nn.Dropout(dropout) if dropout > 0 else nn.Identity(),
                nn.Linear(hidden, width),
                nn.ReLU(),
            )


class Fuse(nn.Module):
    """One vector of several: what a learned embedding says in place of a block that is absent is part of it.

    ``concat``: LayerNorm of the branches side by side, then Linear and ReLU. ``gated``: the sum of the branches, each with a
    weight that a softmax gives it; an absent block's embedding competes with the others.
    """

    def __init__(self, blocks: int, width: int, how: Fusion) -> None:
        super().__init__()
        self.absent = nn.Parameter(torch.zeros(blocks, width))
        self.how = how
        if how == "concat":
            self.norm = nn.LayerNorm(blocks * width)
            self.mix = nn.Linear(blocks * width, width)
        else:
            self.norm = nn.LayerNorm(width)
            self.gate = nn.Linear(width, 1)
            self.mix = nn.Linear(width, width)

    def forward(self, parts: Tensor, present: Tensor) -> Tensor:
        """[B, width] of ``parts`` [B, blocks, width], where ``present`` [B, blocks]."""
        seen = torch.where(present[..., None], parts, self.absent)
        if self.how == "concat":
            mixed: Tensor = self.mix(self.norm(seen.flatten(-2))).relu()
            return mixed
        seen = self.norm(seen)
        weights = self.gate(seen).softmax(-2)
        gated: Tensor = self.mix((weights * seen).sum(-2)).relu()
        return gated


class Multimodal(nn.Module):
    """The backbone: rows [B, D] of blocks side by side, or [B, D + blocks] with a 1 for each block that is missing.

    In training each block that is there is hidden with probability ``drop`` (never all of them), so that a reading by any of
    them alone is learned, too. The draws are :class:`nn.Dropout`'s.
    """

    def __init__(
        self,
        blocks: Blocks,
        width: int,
        image_width: int,
        hidden: int,
        fusion: Fusion,
        drop: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self._shapes = dict(blocks)
        for name, shape in blocks:
            self.add_module(name, Branch(shape, image_width, hidden, width, dropout))
        self.hide = nn.Dropout(drop) if drop > 0 and len(blocks) > 1 else nn.Identity()
        self.fusion = Fuse(len(blocks), width, fusion)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        values = x[:, : sum(sizes)].split(sizes, dim=1)
        parts = [
            getattr(self, name)(block.reshape(-1, *shape) if len(shape) == 3 else block)
            for (name, shape), block in zip(self._shapes.items(), values, strict=True)
        ]
        there = (
            x.new_ones(x.shape[0], len(sizes))
            if x.shape[1] == sum(sizes)
            else 1 - x[:, sum(sizes) :]
        )
        kept = self.hide(there)
        # who would see nothing sees what there is
        kept = torch.where(kept.sum(1, keepdim=True) > 0, kept, there)
        fused: Tensor = self.fusion(torch.stack(parts, dim=1), kept > 0)
        return fused


def multimodal(
    shape: Shape,
    *,
    blocks: Blocks = (),
    width: int = 32,
    image_width: int = 16,
    hidden: int = 64,
    fusion: Fusion = "concat",
    drop: float = 0.3,
    dropout: float = 0.0,
) -> Body:
    """A branch for each of ``blocks``, each giving ``width`` numbers, and their fusion to ``width`` features.

    Tensors are called ``backbone.NAME.…`` by block, and ``backbone.fusion.…``. Images have ``image_width``, twice and four
    times as many channels (:func:`model_zoo.backbones.cnn.cnn`), other blocks ``hidden`` units with ``dropout``. Without ``blocks`` the
    example is one block, called after its kind. In place of a block that is absent stands an embedding that is learned;
    hiding blocks at random in training is the modality dropout of Neverova et al., "ModDrop" (TPAMI 2016).

    Raises:
        InputError: rows of another width than the blocks have (with an indicator for each, or without).
    """
    if not blocks:
        blocks = ((shape.kind, (shape.channels, *shape.size)),)
    numbers = sum(math.prod(s) for _, s in blocks)
    if shape.numbers not in (numbers, numbers + len(blocks)):
        listed = " + ".join(f"{name} {'x'.join(map(str, s))}" for name, s in blocks)
        raise InputError(f"takes {listed}, {numbers} numbers, found {shape}")
    for name, size in blocks:
        if len(size) == 3 and min(size[1:]) < 4:
            raise InputError(f"needs at least 4x4 pixels, found {size[1]}x{size[2]} ({name})")
    return Multimodal(blocks, width, image_width, hidden, fusion, drop, dropout), width
