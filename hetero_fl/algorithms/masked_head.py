"""The head of a model of which each client trains a leading slice and leaves out the classes that it lacks."""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_fl.architecture import Tensors

HEAD = ("head.weight", "head.bias")


def packed(weight: Tensor, bias: Tensor, width: int, say: Tensor) -> tuple[Tensor, Tensor]:
    """A linear head `[C, d]`, `[C]` as wide as the wide one, so that heads of all widths add up: values `[C, width + 1]` with
    the bias last, and their weights, which are those of the classes, `say` `[C]`, and nought where the client owns nothing."""
    values, weights = weight.new_zeros(2, len(bias), width + 1)
    values[:, : weight.shape[1]], values[:, width] = weight, bias
    weights[:, : weight.shape[1]], weights[:, width] = 1, 1
    return values, weights * say[:, None]


def unpacked(model: Tensors, mean: Tensor, weight: Tensor) -> Tensors:
    """The wide head with the mean of packed ones wherever anybody had a say."""
    width = mean.shape[1] - 1
    now = torch.cat([model[HEAD[0]], model[HEAD[1]][:, None]], 1)
    new = torch.where(weight > 0, mean, now)
    return {HEAD[0]: new[:, :width].clone(), HEAD[1]: new[:, width].clone()}
