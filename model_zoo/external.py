"""Image classifiers of torchvision and timm as backbones.

Both libraries are imported on first use.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from model_zoo.errors import InputError, ModelError, one_line
from model_zoo.shapes import Shape
from model_zoo.split_model import Body, feature_width

# Any image classifier of torchvision or timm as a backbone. Both libraries are imported when first
# asked for.
#
# Many of them cannot take small images. Such a model sees them enlarged (bilinearly), to the
# smallest multiple of 32 pixels that it can take; ``describe`` says so. Stochastic depth is off, so
# that all randomness is dropout's.

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "torchvision": {"dropout": None},
    "timm": {"drop_rate": None},
}
"""The options of each library's models; None leaves the model's own value. Not every model has them."""


class Enlarge(nn.Upsample):
    """Bilinear enlargement of [B, C, H, W] to the size that the model behind it needs."""


def library(name: str) -> ModuleType:
    """``timm``, or torchvision's models. Raises :class:`ModelError` where the library is not installed."""
    try:
        return import_module("torchvision.models" if name == "torchvision" else name)
    except ImportError as error:
        raise ModelError(
            f"needs the package {name} ({one_line(error)}); pip install {name}"
        ) from error


def model_names(library_name: str) -> list[str]:
    """The library's image classifiers, without the prefix."""
    module = library(library_name)
    listed: list[str] = (
        module.list_models(module=module) if library_name == "torchvision" else module.list_models()
    )
    return listed


def is_known(library_name: str, name: str) -> bool:
    """Is ``name`` one of them? timm's may carry the tag of their weights (``resnet18.a1_in1k``)."""
    return (
        name.partition(".")[0] in model_names(library_name)
        if library_name == "timm"
        else name in model_names(library_name)
    )


def external_backbone(
    library_name: str, name: str, shape: Shape, *, pretrained: bool = False, **options: Any
) -> Body:
    """The model ``name`` of the library ``library_name`` (``torchvision`` or ``timm``) without its classifier.

    The size to enlarge to, if any, is found by making the model and trying it on two blank images. Pretrained weights
    are the library's default ones. Raises :class:`ModelError` where no size will do, where the model does not have
    an option, or where weights cannot be had.
    """
    make = _torchvision if library_name == "torchvision" else _timm
    refusal: ModelError | None = None
    for size in _sizes(shape):
        seen = Shape(shape.channels, size)
        try:
            model = make(name, seen, False, options)
            width = feature_width(model, seen)
            break
        except InputError as error:
            refusal = refusal or error
    else:
        assert refusal is not None
        raise refusal
    if pretrained:
        model = make(name, seen, True, options)
    leave_only_dropout(model)
    if size != shape.size:
        enlarge = Enlarge(size=size, mode="bilinear", align_corners=False)
        model = nn.Sequential(OrderedDict(enlarge=enlarge, model=model))
    return model, width


def _sizes(shape: Shape) -> list[tuple[int, ...]]:
    """The image's own size, then larger ones of about its proportions: shorter side the next 8 multiples of 32."""
    shorter = min(shape.size)
    first = (shorter // 32 + 1) * 32
    return [shape.size] + [
        tuple(max(32, round(side * wanted / shorter / 32) * 32) for side in shape.size)
        for wanted in range(first, first + 8 * 32, 32)
    ]


def _torchvision(
    name: str, shape: Shape, pretrained: bool, options: Mapping[str, Any]
) -> nn.Module:
    """torchvision's model, its first convolution replaced where the images have not 3 channels."""
    models = library("torchvision")
    arguments = dict(options)
    if name in ("googlenet", "inception_v3"):  # their auxiliary classifiers need larger images
        arguments["aux_logits"] = False
        if not pretrained:
            arguments["init_weights"] = True
    patch = int(name.rpartition("_")[2]) if name.startswith("vit_") else 0
    side = shape.size[0]
    if patch:  # these fix the image's size when made
        if shape.size != (side, side):
            raise ModelError(f"takes square images only, found {shape}")
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
        model.transform_input = False  # GoogLeNet's and Inception's own colour normalisation
    if not remove_classifier(model):
        raise ModelError(
            "no classifier was found in it (fc, classifier, head or heads with a Linear layer)"
        )
    return model


def _timm(name: str, shape: Shape, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    """timm's model with ``num_classes=0``: its features, pooled as the model does it."""
    timm = library("timm")
    arguments = {"pretrained": pretrained, "num_classes": 0, "in_chans": shape.channels, **options}
    with _translate_errors(pretrained):
        try:  # transformers are made for one image size, convolutional networks refuse the argument
            model = timm.create_model(name, img_size=shape.size, **arguments)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = timm.create_model(name, **arguments)
    patches = next(
        (module for module in model.modules() if isinstance(module, timm.layers.PatchEmbed)), None
    )
    if patches is not None and not patches.dynamic_img_pad:
        # timm would leave the pixels beyond the last whole patch unread
        _check_patches(shape, patches.patch_size)
    return model


def _check_patches(shape: Shape, patch: tuple[int, int]) -> None:
    if any(side % p for side, p in zip(shape.size, patch, strict=True)):
        raise InputError(f"cannot take {shape}: its patches are {patch[0]}x{patch[1]}")


@contextlib.contextmanager
def _translate_errors(pretrained: bool) -> Iterator[None]:
    """Words what the library raises; mutes what is printed while weights are downloaded."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    try:
        if not pretrained:
            yield
            return
        hub.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except Exception as error:  # building and downloading raise the errors of several libraries
        if pretrained:
            raise ModelError(
                f"the pretrained weights could not be had: {one_line(error)}"
            ) from error
        # an argument that the model has not
        kind = ModelError if isinstance(error, TypeError) else InputError
        raise kind(f"could not be made: {one_line(error)}") from error
    finally:
        hub.setLevel(level)


# What is changed in another library's model to make a backbone of it: its ends, and its random
# draws.


def replace_first_convolution(model: nn.Module, channels: int, pretrained: bool) -> None:
    """Lets a model for RGB take ``channels`` input channels, in place.

    Pretrained weights are kept as timm does it: summed over the colours for one channel, else repeated and scaled by
    3/channels, so that grey images excite the layer as before. New weights are drawn with the old ones' deviation.
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
    """Puts Identity for the classifier's last Linear (SqueezeNet's last layer is a 1x1 convolution).

    The classifier is looked for under ``fc``, ``classifier``, ``head`` and ``heads``; False if there is none.
    """
    for part in ("fc", "classifier", "head", "heads"):
        if not isinstance(getattr(model, part, None), nn.Module):
            continue
        inside = list(model.get_submodule(part).named_modules(prefix=part))
        for kind in (nn.Linear, nn.Conv2d):
            if paths := [path for path, module in inside if isinstance(module, kind)]:
                _replace(model, paths[-1], nn.Identity())
                return True
    return False


def leave_only_dropout(model: nn.Module) -> None:
    """Turns stochastic depth off and dropout out of place, so that ``F.dropout`` is all that draws in training."""
    for module in model.modules():
        kind = type(module).__name__
        if kind == "StochasticDepth":  # torchvision's
            module.p = 0.0  # type: ignore[assignment]
        elif kind == "DropPath":  # timm's
            module.drop_prob = 0.0  # type: ignore[assignment]
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            module.inplace = False


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
