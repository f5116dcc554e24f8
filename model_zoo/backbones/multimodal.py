"""A model for several modalities: one branch per block and a fusion that handles missing blocks."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from model_zoo.backbones.images import cnn, resnet
from model_zoo.backbones.transformer import vit
from model_zoo.errors import InputError, ModelError
from model_zoo.options import Count, Rate, is_integer, is_list
from model_zoo.shapes import Shape
from model_zoo.split_model import Body

Fusion = Literal["concat", "gated"]
ImageNetwork = Literal["cnn", "resnet", "vit"]
# Height and width of a patch of the vision transformer in pixels.
PATCH = 4
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def _check_blocks(value: Any) -> Any:
    if not is_list(value) or not all(is_list(pair) and len(pair) == 2 for pair in value):
        raise ModelError(f"expected pairs of a name and a shape, got {value!r}")
    for name, shape in value:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ModelError(f"name {name!r} is not valid; use letters, digits and _")
        # The branches are attributes of the module.
        if name in ("fusion", "hide") or hasattr(nn.Module(), name):
            raise ModelError(f"name '{name}' is reserved; choose another name")
        if not is_list(shape) or len(shape) not in (1, 2, 3) or not all(map(is_integer, shape)):
            raise ModelError(
                f"expected one to three integers >= 1 as shape of '{name}', got {shape!r}"
            )
    if len({name for name, _ in value}) < len(value):
        raise ModelError(f"expected different names, got {value!r}")
    return tuple((name, tuple(map(int, shape))) for name, shape in value)


# Name and shape of each block in a row, in order: `(("image", (1, 28, 28)), ("genes", (60,)))`.
Blocks = Annotated[tuple[tuple[str, tuple[int, ...]], ...], _check_blocks]


class Branch(nn.Sequential):
    """A branch, which maps one block of a row to features `[B, width]`.

    Images are processed by a small network without BatchNorm, other blocks by two layers with
    LayerNorm. No normalization depends on other examples, so clients that share a branch do not
    share statistics of their data.

    Args:
        shape: Shape of the block.
        image: Network for images, see `multimodal`.
        image_width: Channels of the first convolution, see `multimodal`.
        hidden: Width of the hidden layer.
        width: Width of the features.
        dropout: Dropout rate of the hidden layer.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        image: ImageNetwork,
        image_width: int,
        hidden: int,
        width: int,
        dropout: float,
    ) -> None:
        if len(shape) == 3:
            body, body_width = _image_network(Shape(shape[0], shape[1:]), image, image_width)[:2]
            super().__init__(body, nn.Linear(body_width, width), nn.ReLU())
        else:
            super().__init__(
                nn.Linear(math.prod(shape), hidden),
                nn.LayerNorm(hidden),
                nn.ReLU(),
                nn.Dropout(dropout) if dropout > 0 else nn.Identity(),
                nn.Linear(hidden, width),
                nn.ReLU(),
            )


def _image_network(shape: Shape, name: ImageNetwork, width: int) -> Body:
    """Build the network of an image branch."""
    if name == "resnet":
        return resnet(shape, widths=(width, 2 * width, 4 * width), norm="group")
    if name == "vit":
        return vit(shape, patch=PATCH, width=4 * width, depth=2)
    return cnn(shape, width=width, norm="group")


class Fuse(nn.Module):
    """A module that fuses the outputs of the branches into features.

    The output of the branch of a missing block is replaced by a learned embedding.

    Args:
        blocks: Number of blocks.
        width: Width of the features.
        method: `concat` applies LayerNorm, a linear layer and ReLU to the concatenated outputs.
            `gated` sums the outputs with softmax weights, including the embeddings of missing
            blocks.
    """

    def __init__(self, blocks: int, width: int, method: Fusion) -> None:
        super().__init__()
        self.absent = nn.Parameter(torch.zeros(blocks, width))
        self.method = method
        if method == "concat":
            self.norm = nn.LayerNorm(blocks * width)
            self.mix = nn.Linear(blocks * width, width)
        else:
            self.norm = nn.LayerNorm(width)
            self.gate = nn.Linear(width, 1)
            self.mix = nn.Linear(width, width)

    @override
    def forward(self, parts: Tensor, present: Tensor) -> Tensor:
        """Return the fused features, shape `[B, width]`.

        Args:
            parts: Outputs of the branches, shape `[B, blocks, width]`.
            present: Boolean mask of the blocks that are present, shape `[B, blocks]`.
        """
        filled = torch.where(present[..., None], parts, self.absent)
        if self.method == "concat":
            return self.mix(self.norm(filled.flatten(-2))).relu()
        filled = self.norm(filled)
        weights = self.gate(filled).softmax(-2)
        return self.mix((weights * filled).sum(-2)).relu()


class Multimodal(nn.Module):
    """A backbone for rows of concatenated blocks.

    Inputs have shape `[B, D]`, or `[B, D + blocks]` with an indicator per block that is 1 if the
    block is missing. In training, blocks are hidden at random, but never all blocks of an example,
    so that the model learns to predict from any subset of blocks.

    Args:
        blocks: Name and shape of each block.
        width: Width of the features.
        image: Network of image branches, see `multimodal`.
        image_width: Channels of the first convolution of image branches, see `multimodal`.
        hidden: Width of the hidden layer of other branches.
        fusion: Method of the fusion, see `Fuse`.
        drop: Probability of hiding a block in training.
        dropout: Dropout rate of branches that are not images.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        width: int,
        image: ImageNetwork,
        image_width: int,
        hidden: int,
        fusion: Fusion,
        drop: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self._shapes = dict(blocks)
        for name, shape in blocks:
            branch = Branch(
                shape,
                image=image,
                image_width=image_width,
                hidden=hidden,
                width=width,
                dropout=dropout,
            )
            self.add_module(name, branch)
        self.hide = nn.Dropout(drop) if drop > 0 and len(blocks) > 1 else nn.Identity()
        self.fusion = Fuse(len(blocks), width, fusion)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        values = x[:, : sum(sizes)].split(sizes, dim=1)
        parts = [
            getattr(self, name)(block.reshape(-1, *shape) if len(shape) == 3 else block)
            for (name, shape), block in zip(self._shapes.items(), values, strict=True)
        ]
        present = (
            x.new_ones(x.shape[0], len(sizes))
            if x.shape[1] == sum(sizes)
            else 1 - x[:, sum(sizes) :]
        )
        kept = self.hide(present)
        # If all blocks of an example are hidden, none is.
        kept = torch.where(kept.sum(1, keepdim=True) > 0, kept, present)
        return self.fusion(torch.stack(parts, dim=1), kept > 0)


def multimodal(
    shape: Shape,
    *,
    blocks: Blocks = (),
    width: Count = 32,
    image: ImageNetwork = "cnn",
    image_width: Count = 16,
    hidden: Count = 64,
    fusion: Fusion = "concat",
    drop: Rate = 0.3,
    dropout: Rate = 0.0,
) -> Body:
    """Build a backbone with a branch for each block of a row, and a fusion of the branches.

    The names of tensors begin with `backbone.NAME.` for the branch of a block and with
    `backbone.fusion.` for the fusion. A learned embedding replaces a missing block. Hiding blocks
    at random in training is the modality dropout of Neverova et al., "ModDrop" (TPAMI 2016).

    Args:
        shape: Shape of a row.
        blocks: Name and shape of each block. If empty, the whole example is a single block, which
            is named after the kind of example (see `Shape.kind`).
        width: Width of the branches and of the features.
        image: Network of image branches. `cnn` and `resnet` have three stages with GroupNorm, and
            `vit` has patches of 4x4 pixels and two transformer blocks.
        image_width: Channels of the first convolution of `cnn` and `resnet`, and a quarter of the
            width of `vit`.
        hidden: Width of the hidden layer of other branches.
        fusion: Method of the fusion, see `Fuse`.
        drop: Probability of hiding a block in training.
        dropout: Dropout rate of branches that are not images.

    Returns:
        The backbone and the width of the features.

    Raises:
        InputError: If the width of a row differs from the total width of the blocks, with or
            without an indicator for each block, an image is smaller than 4x4 pixels, or it cannot
            be divided into patches.
    """
    if not blocks:
        blocks = ((shape.kind, (shape.channels, *shape.size)),)
    num_values = sum(math.prod(s) for _, s in blocks)
    if shape.num_values not in (num_values, num_values + len(blocks)):
        listed = " + ".join(f"{name} {'x'.join(map(str, s))}" for name, s in blocks)
        raise InputError(f"expected {num_values} values ({listed}), got {shape}")
    for name, size in blocks:
        if len(size) == 3 and min(size[1:]) < 4:
            raise InputError(
                f"option blocks: expected at least 4x4 pixels for '{name}', got {size[1]}x{size[2]}"
            )
        if len(size) == 3 and image == "vit" and any(side % PATCH for side in size[1:]):
            raise InputError(
                f"option image: vit needs sides that are multiples of {PATCH} for '{name}', got "
                f"{size[1]}x{size[2]}"
            )
    backbone = Multimodal(
        blocks,
        width=width,
        image=image,
        image_width=image_width,
        hidden=hidden,
        fusion=fusion,
        drop=drop,
        dropout=dropout,
    )
    return backbone, width
