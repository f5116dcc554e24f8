"""Trees of tensors of many participants, stacked leaf by leaf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hetero_fl.runtime.fitting import Kept


def stack_trees(trees: Sequence[Any]) -> tuple[Any, Any]:
    """Trees of one shape stacked leaf by leaf, and vmap's dimensions for them: what all share goes in once (None)."""
    first = trees[0]
    if isinstance(first, Mapping):
        parts = {k: stack_trees([t[k] for t in trees]) for k in first}
        return {k: p[0] for k, p in parts.items()}, {k: p[1] for k, p in parts.items()}
    if not isinstance(first, Tensor) or all(t is first for t in trees):
        return first, None
    return torch.stack(list(trees)), 0


def take(tree: Any, dims: Any, who: Tensor | slice) -> Any:
    """Those participants' slices of a stacked tree."""
    if isinstance(tree, Mapping):
        return {k: take(v, dims[k], who) for k, v in tree.items()}
    return tree if dims is None else tree[who]


def stack_kept(saved: Sequence[Kept]) -> Kept:
    """Optimisers' states stacked; their step counters are equal (see `batched.signature`)."""
    return {
        key: {n: v if n == "step" else torch.stack([s[key][n] for s in saved]) for n, v in state.items()}
        for key, state in saved[0].items()
    }
