"""Models with fixed weights, and batches of examples."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from model_zoo import SplitModel, create_model

Size = tuple[int, ...]


def make(
    name: str, classes: int = 10, channels: int = 1, size: int | Size = 28, **options: object
) -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, classes, channels, size, **options)


def batch(channels: int, *size: int, n: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(seed))


def check_vmap(models: list[SplitModel], x: Tensor) -> None:
    """Check stacked models against one model after another, in training and float64.

    Predictions, gradients and statistics are compared.

    Args:
        models: Models of one architecture.
        x: Batches of all models, of shape `[models, rows, ...]`.
    """
    for model in models:
        model.double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the runtime draws its masks by key
    single = copy.deepcopy(models)
    parameters, buffers = stack_module_state(models)

    def run(p: dict[str, Tensor], b: dict[str, Tensor], rows: Tensor) -> Tensor:
        out: Tensor = functional_call(models[0], (p, b), (rows,))
        return out

    together = vmap(run)(parameters, buffers, x)
    together.square().sum().backward()
    for k, model in enumerate(single):
        one = model(x[k])
        one.square().sum().backward()
        torch.testing.assert_close(together[k], one)
        for n, p in model.named_parameters():
            torch.testing.assert_close(parameters[n].grad[k], p.grad)
        for n, b in model.named_buffers():
            torch.testing.assert_close(buffers[n][k], b)


class Convolution(nn.Module):
    """A convolutional network for images of 8x8, in the style of the PyTorch tutorials."""

    def __init__(self, num_classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.fc1 = nn.Linear(36 * width, 10)
        self.out = nn.Linear(10, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc1(self.conv(x).relu().flatten(1)).relu())  # type: ignore[no-any-return]


DRIFTING = f"python:{__name__}:Drifting"


class Drifting(nn.Module):
    """A classifier of digits with tied weights, and state that its forward pass writes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.register_buffer("center", torch.zeros(64))
        self.peak = torch.zeros(64)
        self.steps = torch.tensor(0)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.training:
            self.center = 0.9 * self.center + 0.1 * x.detach().mean(0)
            self.peak = torch.maximum(self.peak, x.detach().amax(0))
            self.steps += 1
        x = (x - self.center) / (1 + self.peak) * (1 + self.steps / 100)
        return self.head(self.second(self.first(x).tanh()).tanh())  # type: ignore[no-any-return]


class TwoLayers(SplitModel):
    """A model whose head has two linear layers."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        input_size: tuple[int, ...],
        feature_dim: int | None,
    ) -> None:
        head = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
        super().__init__(nn.Flatten(), head, 64)
