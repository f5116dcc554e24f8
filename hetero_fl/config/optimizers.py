"""Optimizers of local training, one class for each value of `optimizer.name`."""

from __future__ import annotations

from typing import ClassVar, Literal

from hetero_fl.config.base import OptimizerConfig


class SGD(OptimizerConfig):
    """Stochastic gradient descent, `torch.optim.SGD`.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.SGD(lr=0.1, momentum=0.9).name
        'sgd'
    """

    name: Literal["sgd"] = "sgd"


class Adam(OptimizerConfig):
    """The optimizer of Kingma and Ba (2015), `torch.optim.Adam`.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.Adam(lr=5e-4).lr
        0.0005
    """

    _unused: ClassVar[frozenset[str]] = frozenset({"momentum", "nesterov"})

    name: Literal["adam"] = "adam"


class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), `torch.optim.AdamW`.

    Example:
        >>> import hetero_fl as hfl
        >>> hfl.AdamW(weight_decay=0.01).name
        'adamw'
    """

    _unused: ClassVar[frozenset[str]] = frozenset({"momentum", "nesterov"})

    name: Literal["adamw"] = "adamw"
