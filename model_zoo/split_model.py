"""Models that consist of a backbone (input to features) and a head (features to logits)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from model_zoo.errors import InputError, ModelError, one_line
from model_zoo.generators import keyed_generators
from model_zoo.module_state import ModuleSnapshot, advise_on_error
from model_zoo.options import is_integer
from model_zoo.shapes import Shape

# A backbone, the width of the features and, optionally, the dropout rate between features and head.
Body = tuple[nn.Module, int] | tuple[nn.Module, int, float]


class SplitModel(nn.Module):
    """A backbone followed by a head, which returns logits.

    The methods `forward_features`, `forward_head`, `get_classifier` and `reset_classifier` have the
    meaning that they have in timm. The names of all parameters begin with `backbone.` or `head.`.

    Args:
        backbone: Module that maps inputs `[B, channels, *size]` to features `[B, feature_dim]`.
        head: Module that maps features to logits `[B, num_classes]`.
        feature_dim: Width of the features. If None, the input width of the head's first linear
            layer is used.

    Attributes:
        backbone: The backbone.
        head: The head.
        num_features: Width of the features, or 0 if it is not known, because the head has no linear
            layer.
        head_path: Path of the head in the module that was split, "head" by default. If the module
            is the head, the path is empty.
        converted_type: Type of the tensors before they were converted to torch's default type, or
            None if they were not converted.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from model_zoo import SplitModel
        >>> model = SplitModel(nn.Flatten(), nn.Linear(64, 3))
        >>> x = torch.rand(2, 1, 8, 8)
        >>> model(x).shape, model.forward_features(x).shape, model.num_features
        (torch.Size([2, 3]), torch.Size([2, 64]), 64)
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, feature_dim: int | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.head_path = "head"
        self.converted_type: torch.dtype | None = None
        # In a tuple, so that the tensors of the module are not registered twice.
        self._source: tuple[nn.Module, ...] = ()
        linear = next((part for part in head.modules() if isinstance(part, nn.Linear)), None)
        if feature_dim is None and linear is not None:
            feature_dim = linear.in_features
        self.num_features = feature_dim or 0

    def set_source(self, module: nn.Module, head_path: str) -> None:
        """Record the module that was split into the backbone and the head of this model.

        Args:
            module: The module, which shares all parameters with this model.
            head_path: Path of the head in the module.
        """
        self._source = (module,)
        self.head_path = head_path

    def source_module(self) -> nn.Module:
        """Return the module that was split, or this model if no module was split.

        The head is put back into the module, so this model must not be used afterwards.
        """
        if not self._source:
            return self
        (module,) = self._source
        if self.head_path:
            replace_submodule(module, module.get_submodule(self.head_path), self.head)
        return module

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features of a batch, shape `[B, num_features]`."""
        return self.backbone(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits for features, shape `[B, num_classes]`.

        Args:
            features: Features, shape `[B, num_features]`.
            pre_logits: Whether to return the input of the classifier, which is the features.
        """
        if pre_logits:
            return features
        return self.head(features)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a linear layer with new weights.

        Args:
            num_classes: Number of outputs. If 0, the model returns its features.

        Raises:
            ModelError: If the width of the features is not known or `num_classes` is no integer of
                at least 0.

        Example:
            >>> import torch
            >>> from model_zoo import create_model
            >>> model = create_model("mlp", num_classes=3, input_size=8)
            >>> model.reset_classifier(5)
            >>> model(torch.rand(2, 1, 8, 8)).shape
            torch.Size([2, 5])
        """
        if not is_integer(num_classes, 0):
            raise ModelError(
                f"reset_classifier: num_classes: expected an integer >= 0, got {num_classes!r}"
            )
        if num_classes and not self.num_features:
            raise ModelError(
                "reset_classifier: the width of the features is not known, as the head has no "
                "linear layer; set head to a module of your own"
            )
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


class DropoutLinear(nn.Linear):
    """A linear head with dropout on the input.

    Dropout does not change the features that the model returns.

    Args:
        in_features: Width of the features.
        out_features: Number of outputs.
        p: Probability of dropping a feature in training.
    """

    def __init__(self, in_features: int, out_features: int, p: float) -> None:
        super().__init__(in_features, out_features)
        self.dropout = nn.Dropout(p)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


def assemble(body: Body, num_classes: int, feature_dim: int | None) -> SplitModel:
    """Return a model that consists of a backbone and a linear head.

    Args:
        body: The backbone, the width of the features and, optionally, the dropout rate of the head.
        num_classes: Number of outputs.
        feature_dim: Width of the features. If the backbone has another width, a projection (linear
            layer and ReLU) to this width is appended. If None, the backbone's width is kept.
    """
    backbone = body[0]
    width = body[1]
    if feature_dim is not None and feature_dim != width:
        projection = nn.Sequential(nn.Linear(width, feature_dim), nn.ReLU())
        backbone = nn.Sequential(OrderedDict(body=backbone, projection=projection))
        width = feature_dim
    head = (
        DropoutLinear(width, num_classes, body[2])
        if len(body) == 3
        else nn.Linear(width, num_classes)
    )
    return SplitModel(backbone, head, width)


def scale_outputs(backbone: nn.Module, share: float) -> nn.Module:
    """Divide the outputs of all convolutions and linear layers of a backbone by `share`.

    Layers of a narrow copy of a model sum over fewer channels. The division preserves the magnitude
    of the sums (the scaler of Diao et al., HeteroFL, ICLR 2021, section 3).

    Args:
        backbone: The backbone, modified in place.
        share: Share of the wide model's channels that the copy has. If 0, the backbone does not
            change.

    Returns:
        The backbone.
    """

    def divide(_layer: nn.Module, _inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        return outputs / share

    if share:
        for module in backbone.modules():
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                module.register_forward_hook(divide)
    return backbone


def measure_feature_width(backbone: nn.Module, shape: Shape) -> int:
    """Return the width of a backbone's features, measured on a batch of two blank examples.

    The backbone runs in evaluation mode, so no random numbers are drawn and no BatchNorm statistics
    change.

    Args:
        backbone: The backbone, which may be any module.
        shape: Shape of an example.

    Raises:
        InputError: If the backbone does not accept examples of this shape.
        ModelError: If the backbone does not return features of shape `[B, D]`.
    """
    features = probe(backbone, shape.zeros(2), shape)
    if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[0] != 2:
        raise ModelError(
            "backbone: expected features of shape (2, D) for a batch of 2 examples, got "
            f"{_shape_of(features)}"
        )
    return features.shape[1]


def check_outputs(logits: Any, num_classes: int) -> None:
    """Check the outputs of a model for two examples.

    Raises:
        ModelError: If the outputs are not logits of shape `[2, num_classes]`.
    """
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, num_classes):
        raise ModelError(
            f"head: expected logits of shape (2, {num_classes}) for a batch of 2 examples, got "
            f"{_shape_of(logits)}"
        )


def _shape_of(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def probe(module: nn.Module, x: Tensor, examples: object, training: bool = False) -> Any:
    """Return the outputs of a module of unknown origin, and restore the module afterwards.

    All modes, buffers and attributes are restored. The global random number generators do not
    change, and calls with equal inputs draw equal random numbers.

    Args:
        module: The module.
        x: Inputs of the module.
        examples: Description of the inputs, for the error message.
        training: Whether to run the module in training mode.

    Raises:
        InputError: If the module raises an exception.
    """
    modes = {part: part.training for part in module.modules()}
    before = ModuleSnapshot(module)
    if training:
        module.train()
    else:
        module.eval()
    try:
        with keyed_generators(0), torch.no_grad():
            return module(x)
    # A module may raise any exception, or call sys.exit.
    except (Exception, SystemExit) as error:
        mode = "in training mode: " if training else ""
        prefix = "SystemExit: " if isinstance(error, SystemExit) else ""
        reason = f"{prefix}{one_line(error)}{advise_on_error(error, module)}"
        raise InputError(f"{mode}cannot process {examples}: {reason}") from error
    finally:
        before.restore(before.changes())
        for part, mode_before in modes.items():
            part.training = mode_before


def replace_submodule(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a submodule under each of its names, in place."""
    for parent in list(module.modules()):
        # `named_children` skips further names of a child.
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is a BatchNorm layer of any dimension.

    Example:
        >>> from torch import nn
        >>> from model_zoo import is_batch_norm
        >>> is_batch_norm(nn.BatchNorm2d(4)), is_batch_norm(nn.GroupNorm(2, 4))
        (True, False)
    """
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def batch_norm_buffers(model: nn.Module) -> set[str]:
    """Return the names of the running means and variances of all BatchNorm layers.

    In federated learning, these buffers are averaged together with the weights. The integer buffer
    `num_batches_tracked` is not included.

    Example:
        >>> from torch import nn
        >>> from model_zoo import batch_norm_buffers
        >>> sorted(batch_norm_buffers(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))))
        ['1.running_mean', '1.running_var']
    """
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if is_batch_norm(module)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }
