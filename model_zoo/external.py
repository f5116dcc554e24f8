"""Image classifiers of torchvision and timm as backbones.

Both libraries are imported on first use. Images that are too small for a model are enlarged to the
smallest multiple of 32 pixels that the model accepts. Stochastic depth is disabled, so that dropout
is the only source of randomness.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from model_zoo.errors import InputError, ModelError, one_line
from model_zoo.generators import keyed_generators
from model_zoo.options import OptionalRate
from model_zoo.shapes import Shape
from model_zoo.split_model import Body, measure_feature_width


class Enlarge(nn.Upsample):
    """Bilinear upsampling of images `[B, C, H, W]` to a size that the model accepts."""


def import_library(name: str) -> ModuleType:
    """Import `timm` or the models of torchvision.

    Raises:
        ModelError: If the library is not installed.
    """
    try:
        return import_module("torchvision.models" if name == "torchvision" else name)
    except ImportError as error:
        raise ModelError(
            f"package {name} cannot be imported ({one_line(error)}); run pip install {name}"
        ) from error


def model_names(library_name: str) -> list[str]:
    """Return the names of a library's image classifiers, without the prefix."""
    module = import_library(library_name)
    listed: list[str] = (
        module.list_models(module=module) if library_name == "torchvision" else module.list_models()
    )
    return listed


def torchvision_backbone(
    shape: Shape, *, name: str, pretrained: bool = False, dropout: OptionalRate = None
) -> Body:
    """Build a classifier of torchvision without its last layer.

    If the model does not accept images of this size, the images are enlarged.

    Args:
        shape: Shape of an image.
        name: Name of the model in torchvision.
        pretrained: Whether to load the library's default weights.
        dropout: Dropout rate, which some models do not support. If None, the model's default.

    Returns:
        The backbone and the width of the features.

    Raises:
        ModelError: If the model accepts none of the tested sizes, does not support an option, or
            the weights cannot be loaded.
    """
    options = {} if dropout is None else {"dropout": dropout}
    return _fit_size(_make_torchvision, name, shape, pretrained, options)


def timm_backbone(
    shape: Shape, *, name: str, pretrained: bool = False, drop_rate: OptionalRate = None
) -> Body:
    """Build a classifier of timm without its last layer.

    Args:
        shape: Shape of an image.
        name: Name of the model in timm.
        pretrained: Whether to load the library's default weights.
        drop_rate: Dropout rate, which some models do not support. If None, the model's default.

    Returns:
        The backbone and the width of the features.

    Raises:
        ModelError: As in `torchvision_backbone`.
    """
    options = {} if drop_rate is None else {"drop_rate": drop_rate}
    return _fit_size(_make_timm, name, shape, pretrained, options)


LIBRARIES: dict[str, Callable[..., Body]] = {
    "torchvision": torchvision_backbone,
    "timm": timm_backbone,
}


def _fit_size(
    make: Callable[..., nn.Module],
    name: str,
    shape: Shape,
    pretrained: bool,
    options: Mapping[str, Any],
) -> Body:
    """Return a model for images that are enlarged if necessary, and the width of its features."""
    size, width = _accepted_size(make, name, shape, **options)
    model = make(name, Shape(shape.channels, size), pretrained, options)
    disable_stochastic_depth(model)
    if size != shape.size:
        enlarge = Enlarge(size=size, mode="bilinear", align_corners=False)
        model = nn.Sequential(OrderedDict(enlarge=enlarge, model=model))
    return model, width


@cache
def _accepted_size(
    make: Callable[..., nn.Module], name: str, shape: Shape, **options: Any
) -> tuple[tuple[int, ...], int]:
    """Return the smallest tested size of images that a model accepts, and its number of features.

    The model is run on two blank images of each size. No random numbers are drawn.
    """
    errors = []
    for size in _candidate_sizes(shape):
        model_shape = Shape(shape.channels, size)
        try:
            with keyed_generators(0):
                model = make(name, model_shape, False, options)
            return size, measure_feature_width(model, model_shape)
        except InputError as error:
            errors.append(error)
    raise errors[0]


def _candidate_sizes(shape: Shape) -> list[tuple[int, ...]]:
    """Return the size of the image and eight larger sizes with about the same aspect ratio.

    The shorter sides of the larger sizes are the next eight multiples of 32.
    """
    shorter = min(shape.size)
    first = (shorter // 32 + 1) * 32
    return [shape.size] + [
        tuple(max(32, round(side * target / shorter / 32) * 32) for side in shape.size)
        for target in range(first, first + 8 * 32, 32)
    ]


def _make_torchvision(
    name: str, shape: Shape, pretrained: bool, options: Mapping[str, Any]
) -> nn.Module:
    models = import_library("torchvision")
    arguments = dict(options)
    # The auxiliary classifiers of these models do not accept small images.
    if name in ("googlenet", "inception_v3"):
        arguments["aux_logits"] = False
        if not pretrained:
            arguments["init_weights"] = True
    patch = int(name.rpartition("_")[2]) if name.startswith("vit_") else 0
    side = shape.size[0]
    # Vision transformers are built for one size of square images.
    if patch:
        if shape.size != (side, side):
            raise ModelError(f"expected a square image, got {shape}")
        _check_patches(shape, (patch, patch))
        arguments["image_size"] = side
    with _translate_errors(pretrained):
        weights = models.get_model_weights(name).DEFAULT if pretrained else None
        if weights is not None and patch:
            model = models.get_model(name, weights=None, **arguments)
            state = weights.get_state_dict(progress=False, check_hash=True)
            model.load_state_dict(
                models.vision_transformer.interpolate_embeddings(side, patch, state)
            )
        else:
            model = models.get_model(name, weights=weights, progress=False, **arguments)
    replace_first_convolution(model, shape.channels, pretrained)
    if shape.channels != 3 and hasattr(model, "transform_input"):
        # GoogLeNet and Inception normalize the three color channels themselves.
        model.transform_input = False
    if not remove_classifier(model):
        raise ModelError(
            "no classifier found; expected fc, classifier, head or heads with a Linear layer"
        )
    return model


def _make_timm(name: str, shape: Shape, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    timm = import_library("timm")
    # With num_classes=0 the model returns its pooled features.
    arguments = {"pretrained": pretrained, "num_classes": 0, "in_chans": shape.channels, **options}
    with _translate_errors(pretrained):
        # Transformers are built for one image size; convolutional networks reject the argument.
        try:
            model = timm.create_model(name, img_size=shape.size, **arguments)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = timm.create_model(name, **arguments)
    patches = next(
        (module for module in model.modules() if isinstance(module, timm.layers.PatchEmbed)), None
    )
    if patches is not None and not patches.dynamic_img_pad:
        # timm would ignore the pixels beyond the last whole patch.
        _check_patches(shape, patches.patch_size)
    return model


def _check_patches(shape: Shape, patch: tuple[int, int]) -> None:
    if any(side % p for side, p in zip(shape.size, patch, strict=True)):
        raise InputError(f"expected multiples of the patch size {patch[0]}x{patch[1]}, got {shape}")


@contextlib.contextmanager
def _translate_errors(pretrained: bool) -> Iterator[None]:
    """Convert a library's errors to ModelError, and hide output while weights are loaded."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    try:
        if not pretrained:
            yield
            return
        hub.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    # Building and downloading raise the errors of several libraries.
    except Exception as error:
        if pretrained:
            raise ModelError(
                f"pretrained: cannot load the pretrained weights: {one_line(error)}"
            ) from error
        # A TypeError means that the model lacks one of the arguments, whatever the image size.
        error_type = ModelError if isinstance(error, TypeError) else InputError
        raise error_type(f"cannot create the model: {one_line(error)}") from error
    finally:
        hub.setLevel(level)


def replace_first_convolution(model: nn.Module, channels: int, pretrained: bool) -> None:
    """Change the number of input channels of an RGB model in place.

    The first convolution is replaced, unless the model already has this number of channels.
    Pretrained weights are adapted as in timm. For one channel, the weights are summed over the
    colors. Otherwise, the weights are repeated and scaled by 3 / channels, which preserves the
    activations of gray images. Weights that are not pretrained are drawn again with the same
    standard deviation.

    Args:
        model: A model with three input channels.
        channels: The new number of input channels.
        pretrained: Whether the weights are pretrained.
    """
    path, old = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if old.in_channels == channels:
        return
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    with torch.no_grad():
        if not pretrained:
            new.weight.normal_(std=float(old.weight.std()))
        elif channels == 1:
            new.weight.copy_(old.weight.sum(1, keepdim=True))
        else:
            repeats = -(-channels // old.in_channels)
            new.weight.copy_(
                old.weight.repeat(1, repeats, 1, 1)[:, :channels] * (old.in_channels / channels)
            )
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    _replace(model, path, new)


def remove_classifier(model: nn.Module) -> bool:
    """Replace the last linear layer of the classifier with the identity.

    The classifier is the submodule `fc`, `classifier`, `head` or `heads`. If the classifier has no
    linear layer, the last convolution is replaced (SqueezeNet ends with a 1x1 convolution).

    Returns:
        Whether a classifier was found.
    """
    for part in ("fc", "classifier", "head", "heads"):
        if not isinstance(getattr(model, part, None), nn.Module):
            continue
        inside = list(model.get_submodule(part).named_modules(prefix=part))
        for layer_type in (nn.Linear, nn.Conv2d):
            if paths := [path for path, module in inside if isinstance(module, layer_type)]:
                _replace(model, paths[-1], nn.Identity())
                return True
    return False


def disable_stochastic_depth(model: nn.Module) -> None:
    """Disable stochastic depth and in-place dropout.

    Afterwards, `F.dropout` is the only operation that draws random numbers in training.
    """
    for module in model.modules():
        class_name = type(module).__name__
        # torchvision
        if class_name == "StochasticDepth":
            module.p = 0.0  # type: ignore[assignment]
        # timm
        elif class_name == "DropPath":
            module.drop_prob = 0.0  # type: ignore[assignment]
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            module.inplace = False


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
