"""Split any classifier into a backbone and a head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from model_zoo.errors import InputError, ModelError, one_line, suggest_names
from model_zoo.shapes import Shape
from model_zoo.split_model import SplitModel, in_evaluation_mode, measure_feature_width

# Submodules that are classifiers in torchvision, timm and transformers.
CLASSIFIERS = ("fc", "classifier", "head", "heads", "score")
# Largest accepted difference between the logits of a module before and after splitting.
TOLERANCE = 1e-4


class LogitsOnly(nn.Module):
    """Wrapper of a `transformers` classifier that maps an input tensor to logits.

    Args:
        model: An image or text classifier whose outputs have an attribute `logits`.

    Attributes:
        model: The classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return cast("Tensor", self.model(x).logits)
        # Token 0 is padding.
        outputs = self.model(input_ids=x, attention_mask=(x != 0).long())
        return cast("Tensor", outputs.logits)


def find_head(module: nn.Module, head: str | None = None) -> str:
    """Return the path of a model's head.

    The head is the last linear layer of `fc`, `classifier`, `head`, `heads` or `score`, or of the
    module that timm's `get_classifier` returns, or else the last linear layer of the model. A
    SqueezeNet ends with a 1x1 convolution instead.

    Args:
        module: The model.
        head: Path of the head. If None, the head is searched for.

    Raises:
        ModelError: If there is no submodule `head`, or `head` is None and the model has no linear
            layer.

    Example:
        >>> from torch import nn
        >>> from model_zoo.heads import find_head
        >>> find_head(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2)))
        '3'
    """
    paths = {path: part for path, part in module.named_modules() if path}
    if head is not None:
        if head not in paths:
            raise ModelError(f"head: no submodule '{head}'{suggest_names(head, paths)}")
        return head
    named: list[str] = [name for name in CLASSIFIERS if name in paths]
    get_classifier: Any = getattr(module, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    named += [path for path, part in paths.items() if part is classifier]
    for name in named:
        inside = {p: m for p, m in paths.items() if p == name or p.startswith(f"{name}.")}
        for layer_type in (nn.Linear, nn.Conv2d):
            if found := _last(inside.items(), layer_type):
                return found
    found = _last(paths.items(), nn.Linear)
    if found is None:
        raise ModelError("head: the model has no linear layer; name the head, such as head='fc'")
    return found


def _last(parts: Iterable[tuple[str, nn.Module]], layer_type: type[nn.Module]) -> str | None:
    found = [path for path, part in parts if isinstance(part, layer_type)]
    return found[-1] if found else None


def split_module(module: nn.Module, shape: Shape, head: str | None = None) -> SplitModel:
    """Split a classifier into a backbone, which computes features, and a head.

    A `SplitModel` and a module with the attributes `backbone` and `head` keep these parts. In any
    other model, the head (see `find_head`) is replaced by the identity, and the rest is the
    backbone. If the model has a method `forward`, backbone and head together must return the logits
    that `forward` returns.

    Args:
        module: The model, which is modified in place and becomes a part of the result.
        shape: Shape of an example.
        head: Path of the head. If None, the head is searched for.

    Raises:
        InputError: If the model does not accept examples of this shape.
        ModelError: If the model has no head, or transforms the outputs of the head.

    Example:
        >>> from torch import nn
        >>> from model_zoo.heads import split_module
        >>> from model_zoo.shapes import Shape
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> split_module(net, Shape(1, (8, 8))).head
        Linear(in_features=8, out_features=2, bias=True)
    """
    if isinstance(module, SplitModel):
        width = measure_feature_width(module.backbone, shape)
        if module.known_feature_dim not in (None, width):
            raise ModelError(
                f"feature_dim is {module.feature_dim}, but the backbone returns {width} features"
            )
        module.feature_dim = width
        return module
    backbone: Any = getattr(module, "backbone", None)
    given: Any = getattr(module, "head", None)
    has_parts = isinstance(backbone, nn.Module) and isinstance(given, nn.Module) and head is None
    if has_parts and type(module).forward is nn.Module.forward:
        return SplitModel(backbone, given, measure_feature_width(backbone, shape))
    expected = _evaluate(module, shape)
    if not isinstance(getattr(expected, "logits", expected), Tensor):
        raise ModelError(f"expected a model that returns logits, got {type(expected).__name__}")
    split = _assemble(backbone, given, shape) if has_parts else None
    if split is not None and _has_logits(split, expected, shape):
        split.set_source(module, "head")
        return split
    path = find_head(module, head)
    parent, _, name = path.rpartition(".")
    found = module.get_submodule(path)
    setattr(module.get_submodule(parent), name, nn.Identity())
    rest = LogitsOnly(module) if hasattr(expected, "logits") else module
    split = SplitModel(rest, found, measure_feature_width(rest, shape))
    split.set_source(module, path)
    if not _has_logits(split, expected, shape):
        raise ModelError(
            f"head: the model's outputs are not those of its submodule '{path}'; return logits "
            "without softmax, name another submodule, or pass SplitModel(backbone, head)"
        )
    return split


def _assemble(backbone: Any, head: Any, shape: Shape) -> SplitModel | None:
    """Return the model of two parts, or None if the backbone cannot return features `[B, D]`."""
    try:
        return SplitModel(backbone, head, measure_feature_width(backbone, shape))
    except ModelError:
        return None


def _has_logits(split: SplitModel, outputs: Any, shape: Shape) -> bool:
    """Return whether the logits of a model equal the given outputs for the same examples."""
    actual = _evaluate(split, shape).logits
    expected = getattr(outputs, "logits", outputs)
    return (
        isinstance(expected, Tensor)
        and expected.shape == actual.shape
        and bool(torch.allclose(expected, actual, atol=TOLERANCE))
    )


def _evaluate(module: nn.Module, shape: Shape) -> Any:
    """Return a module's outputs for two random examples, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    x = shape.zeros(2)
    if x.is_floating_point():
        x = torch.rand(x.shape, generator=generator)
    else:
        x = torch.randint(1, shape.vocabulary_size, x.shape, generator=generator)
    with in_evaluation_mode(module), torch.no_grad():
        try:
            return module(x)
        # A module of unknown origin may raise any exception.
        except Exception as error:
            raise InputError(f"cannot process {shape}: {one_line(error)}") from error
