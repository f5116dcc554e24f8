"""Models by name: what there is, what options each takes, and :func:`create_model`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from . import external, user
from .catalogue import MODELS, check_value
from .errors import InputError, ModelError, nearest
from .shapes import Shape, make_shape, whole
from .split import SplitModel, assemble

EXTERNAL = tuple(external.OPTIONS)
PREFIXES = (*EXTERNAL, "python")


def list_models(pattern: str = "*") -> list[str]:
    """Names that match ``pattern`` (``*``, ``?``, ``[…]``), sorted.

    This package's own models; for a pattern that begins with ``timm:`` or ``torchvision:``, that library's, with
    the prefix. Every name listed can be given to :func:`create_model`.
    """
    prefix, colon, rest = pattern.partition(":")
    if not colon:
        return sorted(name for name in MODELS if fnmatchcase(name, pattern))
    if prefix not in EXTERNAL:
        raise ModelError(f"pattern {pattern}: models can be listed for {' and '.join(EXTERNAL)}, not for {prefix}")
    return sorted(f"{prefix}:{name}" for name in external.names(prefix) if fnmatchcase(name, rest))


def model_options(name: str) -> dict[str, Any]:
    """The options that ``create_model(name, …)`` takes as keywords, with their defaults.

    For a ``timm:`` or ``torchvision:`` model None stands for the model's own default, for a user's own for a value
    that must be given. Raises :class:`ModelError` for an unknown name.
    """
    with _naming(name):
        return _known(name)[0]


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises :class:`ModelError`, in one line, where ``name`` or an option is unknown or a value is out of range."""
    with _naming(name):
        _checked_options(name, options)


def create_model(
    name: str,
    num_classes: int,
    in_channels: int = 1,
    input_size: int | Sequence[int] = 28,
    feature_dim: int | None = None,
    *,
    pretrained: bool = False,
    vocabulary: int | None = None,
    **options: Any,
) -> SplitModel:
    """Makes a model that is a backbone under a head.

    Args:
        name: one of :func:`list_models`; or ``torchvision:NAME``, ``timm:NAME``, or ``python:package.module:Class`` for
            one's own.
        num_classes: width of the logits, at least 1.
        in_channels: channels of an image or series, columns of a table row.
        input_size: S for images of S x S pixels, (H, W) for images, (L,) for series of length L, () for table rows.
            The model then takes x of shape [B, in_channels, *input_size].
        feature_dim: the common width of the features. Where the backbone has another width, a projection
            (Linear, then ReLU) ends it; None leaves the backbone's own width.
        pretrained: start from the library's published weights (torchvision's, timm's, and ``resnet18``).
        vocabulary: how many different tokens there are, for models of text. ``input_size`` is then (L,), and the model takes
            x of whole numbers [B, L] from 0 (no word: shorter texts are filled up with it from the left) to below it.
        options: the model's own, see :func:`model_options`.

    The initial weights come from torch's global generator, as every module's do: for weights that depend on a seed
    alone, call it under ``torch.random.fork_rng()`` and ``torch.manual_seed(seed)``.

    Raises:
        ModelError: one line, for anything that cannot be made as asked.
    """
    with _naming(name):
        shape = make_shape(in_channels, input_size, vocabulary)
        return _create(name, num_classes, shape, feature_dim, pretrained, options)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the model's name before the message."""
    try:
        yield
    except ModelError as error:
        raise type(error)(f"model {name}: {error}") from error.__cause__


def _create(
    name: str,
    num_classes: int,
    shape: Shape,
    feature_dim: int | None,
    pretrained: bool,
    options: Mapping[str, Any],
) -> SplitModel:
    given = _checked_options(name, options)
    for argument, value in (("num_classes", num_classes), ("feature_dim", feature_dim)):
        if not whole(value) and not (argument == "feature_dim" and value is None):
            raise ModelError(f"{argument}: found {value!r}, a whole number of at least 1 is needed")
    prefix, _, rest = name.partition(":")
    if prefix == "python":
        return user.build(rest, shape, num_classes, feature_dim, pretrained, given)
    if prefix in EXTERNAL:
        if shape.kind != "image":
            raise InputError(f"takes images, found {shape}")
        body = external.external_backbone(prefix, rest, shape, pretrained=pretrained, **given)
        return assemble(body, num_classes, feature_dim)
    entry = MODELS[name]
    entry.check_shape(shape)
    if pretrained and not entry.has_weights:
        having = [model for model, e in MODELS.items() if e.has_weights]
        raise ModelError(f"pretrained: it has no published weights; {', '.join(having)}, torchvision: and timm: have")
    if entry.has_weights:
        given["pretrained"] = pretrained
    return assemble(entry.build(shape, **entry.fixed, **given), num_classes, feature_dim)


def _known(name: str) -> tuple[dict[str, Any], bool]:
    """The options of ``name``, and whether it takes any others too. Raises :class:`ModelError` for no such model."""
    if not isinstance(name, str):
        raise ModelError("a name is needed")
    prefix, colon, rest = name.partition(":")
    if prefix == "python" and colon:
        return user.options(user.load(rest))
    if prefix in EXTERNAL and colon:
        if not external.is_known(prefix, rest):
            near = nearest(rest, external.names(prefix), f"{prefix}:")
            raise ModelError(f"{prefix} has no such image classifier{near}")
        return dict(external.OPTIONS[prefix]), False
    if colon:
        raise ModelError(f"no such prefix{nearest(prefix, PREFIXES)}; there are {', '.join(PREFIXES)}")
    if name not in MODELS:
        raise ModelError(f"no such model{nearest(name, MODELS)}")
    return MODELS[name].options, False


def _checked_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    known, takes_any = _known(name)
    for option in options:
        if option not in known and not takes_any:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ModelError(f"unknown option {option}{nearest(option, known)}; {takes}")
    if name in MODELS:
        return MODELS[name].checked(options)
    if name.startswith("python:"):
        return dict(options)
    return {option: check_value(option, value, 0.0) for option, value in options.items() if value is not None}
