"""Split any classifier into a backbone and a head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from model_zoo.errors import InputError, ModelError, suggest_names
from model_zoo.shapes import Shape
from model_zoo.split_model import SplitModel, measure_feature_width, probe, replace_submodule

# Largest accepted difference between the logits of a module before and after splitting.
TOLERANCE = 1e-4
# Factor of the head's weights for which operations after the head, such as bounds, change outputs.
LARGE = 1e4


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


def split_module(module: nn.Module, shape: Shape, head: str | None = None) -> SplitModel:
    """Split a classifier into a backbone, which computes features, and a head.

    A `SplitModel` and a module with the attributes `backbone` and `head` keep these parts. In any
    other model, the head is replaced by the identity, and the rest is the backbone. The head is the
    layer that computes the logits, whatever its name and its position in the constructor: the
    forward pass of two examples is observed. If the model has a method `forward`, backbone and head
    together must return the logits that `forward` returns, for other weights, too.

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
    backbone: Any = getattr(module, "backbone", None)
    given: Any = getattr(module, "head", None)
    has_parts = isinstance(backbone, nn.Module) and isinstance(given, nn.Module) and head is None
    if isinstance(module, SplitModel) or (has_parts and type(module).forward is nn.Module.forward):
        split = module if isinstance(module, SplitModel) else SplitModel(backbone, given)
        width = measure_feature_width(split.backbone, shape)
        if split.num_features not in (0, width):
            raise ModelError(
                f"feature_dim is {split.num_features}, but the backbone returns {width} features"
            )
        split.num_features = width
        _check_forward(split, shape)
        return split
    return _split_classifier(module, shape, head, has_parts)


def _check_forward(split: SplitModel, shape: Shape) -> None:
    """Check that a subclass with an own method `forward` returns the logits of its head."""
    if type(split).forward is SplitModel.forward:
        return
    x = shape.random(2)
    features = probe(split.backbone, x, shape)
    expected = probe(split.head, features, f"features of width {split.num_features}")
    if not have_equal_values(probe(split, x, shape), expected):
        raise ModelError(
            f"{type(split).__name__}.forward: expected the logits head(backbone(x)); delete the "
            "method, or make the class a subclass of nn.Module"
        )


def _split_classifier(
    module: nn.Module, shape: Shape, head: str | None, has_parts: bool
) -> SplitModel:
    """Split a module with a method `forward` (see `split_module`)."""
    calls: list[tuple[nn.Module, Any]] = []
    with _recorded_calls(module, calls):
        expected = evaluate_examples(module, shape)
    logits = getattr(expected, "logits", expected)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"expected a model that returns logits, got {type(expected).__name__}; return the "
            "logits alone"
        )
    parameters = list(module.parameters())
    if has_parts:
        split = SplitModel(module.get_submodule("backbone"), module.get_submodule("head"))
        changed = _logits_of_other_weights(module, split.head, parameters, shape)
        if _has_logits(split, logits, changed, parameters, shape):
            split.set_source(module, "head")
            return split
    paths = {part: path for path, part in module.named_modules()}
    candidates = _find_heads(calls, logits)
    if head is not None:
        if head not in paths.values():
            found = f"; choose from {', '.join(paths[part] for part in candidates)}"
            hint = suggest_names(head, paths.values()) or (found if candidates else "")
            raise ModelError(f"head: no submodule '{head}'{hint}")
        candidates = [module.get_submodule(head)]
    for candidate in candidates:
        changed = _logits_of_other_weights(module, candidate, parameters, shape)
        split = _replace_head(module, candidate, paths[candidate], hasattr(expected, "logits"))
        if _has_logits(split, logits, changed, parameters, shape):
            return split
        split.source_module()
    if not have_equal_values(logits, _logits_of(module, shape)):
        raise ModelError(
            "returns different outputs for equal inputs; draw random numbers from the global "
            "generators of torch, NumPy or Python, which are seeded for each client"
        )
    if not candidates:
        raise ModelError(
            "head: no layer of the model computes its outputs; pass SplitModel(backbone, head)"
        )
    raise ModelError(
        f"head: the model's outputs are not those of its submodule '{paths[candidates[0]]}'; "
        "return logits without softmax, name another submodule, as in "
        "head='NAME', or pass SplitModel(backbone, head)"
    )


def _replace_head(module: nn.Module, head: nn.Module, path: str, has_attribute: bool) -> SplitModel:
    """Split a module into a head and the rest, in which the identity replaces the head."""
    rest: nn.Module = LogitsOnly(module) if has_attribute else module
    if head is module:
        rest = nn.Flatten()
    else:
        replace_submodule(module, head, nn.Identity())
    split = SplitModel(rest, head)
    split.set_source(module, path)
    return split


def check_training(split: SplitModel, module: nn.Module, shape: Shape) -> None:
    """Check that a model returns the same logits in training mode as the module before the split.

    Args:
        split: The model.
        module: An equal module that was not split.
        shape: Shape of an example.

    Raises:
        ModelError: If the module cannot be trained, or its outputs in training mode are not those
            of its head.
    """
    advice = "return the same logits in both modes"
    kind = type(evaluate_examples(module, shape)).__name__
    expected = evaluate_examples(module, shape, training=True)
    if type(expected).__name__ != kind:
        raise ModelError(
            f"returns a {kind} in evaluation mode, but a {type(expected).__name__} in training "
            f"mode; {advice} (torchvision: aux_logits=False)"
        )
    logits = evaluate_examples(split, shape, training=True)
    if not have_equal_values(logits, getattr(expected, "logits", expected)):
        raise ModelError(
            f"head: in training mode, the model's outputs are not those of its submodule "
            f"'{split.head_path}'; {advice}"
        )


@contextmanager
def _recorded_calls(module: nn.Module, calls: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Append each submodule that is called inside the `with` block, and its output, to a list.

    A module without submodules counts as its own submodule.
    """

    def record(part: nn.Module, _inputs: Any, output: Any) -> None:
        calls.append((part, output))

    parts = [part for part in module.modules() if part is not module] or [module]
    hooks = [part.register_forward_hook(record) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _find_heads(calls: Sequence[tuple[nn.Module, Any]], logits: Tensor) -> list[nn.Module]:
    """Return the submodules that may be the head of a model, the most likely one first.

    These are the modules with parameters whose outputs are the logits, inner modules and linear
    layers before others. In some text models, the logits are some rows of the head's outputs, so
    the linear layer and the module that were called last follow.

    Args:
        calls: The submodules in the order in which their calls ended, and their outputs.
        logits: Outputs of the model.
    """
    trained = [(part, output) for part, output in calls if any(True for _ in part.parameters())]
    exact = [
        part
        for part, output in trained
        if isinstance(output, Tensor)
        and output.shape == logits.shape
        and torch.equal(output, logits)
    ]
    leaves = [part for part, _ in reversed(trained) if not any(True for _ in part.children())]
    found = [
        *sorted(exact, key=lambda part: not isinstance(part, nn.Linear)),
        *[part for part in leaves if isinstance(part, nn.Linear)][:1],
        *leaves[:1],
    ]
    return list(dict.fromkeys(found))


def _logits_of(module: nn.Module, shape: Shape) -> Any:
    outputs = evaluate_examples(module, shape)
    return getattr(outputs, "logits", outputs)


def _logits_of_other_weights(
    module: nn.Module, head: nn.Module, parameters: Sequence[nn.Parameter], shape: Shape
) -> Any:
    """Return a module's logits for other weights and large outputs of the head.

    An operation after the head that does not change the initial outputs, such as a scale of one or
    bounds, changes these outputs.

    Args:
        module: The module, before or after it was split. Its weights are restored.
        head: The head.
        parameters: Parameters of the module, in equal order before and after the split.
        shape: Shape of an example.

    Returns:
        The logits, or None if the module refuses the weights.
    """
    before = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in parameters:
                spread = float(p.std(correction=0)) or 1.0
                p.add_(spread * (torch.rand(p.shape, generator=generator) - 0.5))
            for p in head.parameters():
                p.mul_(LARGE)
        return _logits_of(module, shape)
    except InputError:
        return None
    finally:
        for parameter, values in zip(parameters, before, strict=True):
            parameter.data.copy_(values)


def _has_logits(
    split: SplitModel,
    expected: Tensor,
    changed: Any,
    parameters: Sequence[nn.Parameter],
    shape: Shape,
) -> bool:
    """Return whether a model has the given logits for the same examples, and features `[B, D]`.

    If so, the width of the features is set.

    Args:
        split: The model.
        expected: Logits of the module before the split.
        changed: The same for other weights, or None to leave this out.
        parameters: Parameters of the module.
        shape: Shape of an example.
    """
    try:
        features = evaluate_examples(split.backbone, shape)
        if not isinstance(features, Tensor) or features.ndim != 2:
            return False
        logits = evaluate_examples(split, shape)
    except InputError:
        return False
    split.num_features = features.shape[1]
    if changed is None or not have_equal_values(logits, expected):
        return have_equal_values(logits, expected)
    largest = changed.abs().max()
    actual = _logits_of_other_weights(split, split.head, parameters, shape)
    return actual is not None and have_equal_values(actual / largest, changed / largest)


def have_equal_values(actual: Any, expected: Any) -> bool:
    """Return whether two objects are tensors of one shape with about the same values."""
    return (
        isinstance(actual, Tensor)
        and isinstance(expected, Tensor)
        and expected.shape == actual.shape
        and bool(torch.allclose(expected, actual, atol=TOLERANCE, equal_nan=True))
    )


def mixes_examples(model: SplitModel, shape: Shape, training: bool) -> bool:
    """Return whether the outputs of a model for an example depend on another example of the batch.

    Args:
        model: The model.
        shape: Shape of an example.
        training: Whether to evaluate the model in training mode.
    """
    x = shape.random(2)
    other = torch.stack([x[0], x[0]])
    outputs = [probe(model, batch, shape, training=training)[:1] for batch in (x, other)]
    return not have_equal_values(*outputs)


def evaluate_examples(module: nn.Module, shape: Shape, training: bool = False) -> Any:
    """Return a module's outputs for two random examples, which are equal in each call.

    Args:
        module: The module.
        shape: Shape of an example.
        training: Whether to evaluate the module in training mode.

    Raises:
        InputError: If the module raises an exception.
    """
    return probe(module, shape.random(2), shape, training=training)
