"""What runs differently under `vmap` than in a live module: dropout has a key for each participant, linear layers a backward
pass of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hetero_fl.runtime.dropout import KeyedDropout

LARGE = 2**14  # weights of a participant's layer


class StackedOps(KeyedDropout):
    """While active, linear layers take `linear` below, and `F.dropout` a mask from `key` (int64, batched) if there is one."""

    def __init__(self, key: Tensor | None) -> None:
        super().__init__(0 if key is None else key)
        self.drops = key is not None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return linear(*args, **(kwargs or {}))
        if self.drops:
            return super().__torch_function__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for one participant, `[…, in]` to `[…, out]`.

    torch's own rule leaves the gradient of stacked weights transposed, and copying it into place costs as much as
    computing it. Small layers keep that rule: for them calling this one costs more.
    """
    if weight.numel() < LARGE:
        return F.linear(input, weight, bias)
    out: Tensor = _Linear.apply(input.reshape(-1, input.shape[-1]), weight)
    out = out.view(*input.shape[:-1], -1)
    return out if bias is None else out + bias


class _Linear(torch.autograd.Function):
    """x·Wᵀ of one participant; under vmap that of all of them."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, int | None], x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
        if dims[1] is None:  # all have the same weights: one matrix product
            assert dims[0] is not None
            return F.linear(x, weight), dims[0]
        stacked = weight.movedim(dims[1], 0)
        own = x.expand(info.batch_size, *x.shape) if dims[0] is None else x.movedim(dims[0], 0)
        out: Tensor = _StackedLinear.apply(own, stacked)
        return out, 0


class _StackedLinear(torch.autograd.Function):
    """x·Wᵀ for each participant: `[K, B, in]` and `[K, out, in]` to `[K, B, out]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            torch.bmm(grad, weight) if wanted[0] else None,
            torch.bmm(grad.transpose(1, 2), x) if wanted[1] else None,
        )
