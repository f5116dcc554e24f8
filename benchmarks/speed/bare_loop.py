"""FedAvg in plain PyTorch on the benchmark of pfl-research, for the benchmark `pfl_research`.

    python -m benchmarks.speed.bare_loop IMAGES.npz ROWS CLIENTS [DEVICE]

For each line on standard input, the script trains one round and prints one line of JSON with the
`seconds` of the round.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# Number of rows per client, number of rows per step, and learning rate.
ROWS, BATCH, LR = 50, 10, 0.1


class ChannelsLast(nn.Module):
    """Layer that converts images to the channels-last memory format, as in pfl-research."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the images in channels-last format, `[batch, channels, height, width]`."""
        return x.contiguous(memory_format=torch.channels_last)


class SimpleCNN(nn.Module):
    """The model `simple_cnn` of pfl-research.

    The model consists of two convolutions, a hidden layer and two dropout layers. For images of
    32x32x3 and 10 classes, it has 1,626,442 parameters.

    Args:
        num_classes: Number of classes.
        in_channels: Number of image channels.
        input_size: Height and width of the images.
    """

    def __init__(self, num_classes: int, in_channels: int, input_size: tuple[int, int]) -> None:
        super().__init__()
        height, width = ((side - 4) // 2 for side in input_size)
        self.backbone = nn.Sequential(
            ChannelsLast(),
            nn.Conv2d(in_channels, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(64 * height * width, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
        )
        self.head = nn.Linear(128, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)


class BareLoop:
    """FedAvg in plain PyTorch, which does not encode, check, record or save anything.

    Args:
        images: Normalized images on the training device, `[rows, channels, height, width]`.
        labels: Labels on the training device, `[rows]`.
        per_round: Number of clients per round.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, per_round: int) -> None:
        self.images = images.split(ROWS)
        self.labels = labels.split(ROWS)
        self.per_round = per_round
        side = (images.shape[2], images.shape[3])
        self.module = SimpleCNN(10, images.shape[1], side).to(images.device).train()
        self.weights = {n: t.clone() for n, t in self.module.state_dict().items()}

    def run_round(self) -> None:
        """Train a random cohort one client after the other, and average the weights."""
        mean = {n: torch.zeros_like(t) for n, t in self.weights.items()}
        for client in torch.randperm(len(self.images))[: self.per_round].tolist():
            x, y = self.images[client], self.labels[client]
            self.module.load_state_dict(self.weights)
            optimizer = torch.optim.SGD(self.module.parameters(), LR, fused=True)
            for batch in torch.randperm(len(x), device=x.device).split(BATCH):
                optimizer.zero_grad()
                logits = self.module.head(self.module.backbone(x[batch]))
                F.cross_entropy(logits, y[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                for name, tensor in self.module.state_dict().items():
                    mean[name].add_(tensor, alpha=1 / self.per_round)
        self.weights = mean


def serve(path: Path, rows: int, per_round: int, device: str = "cpu") -> None:
    """Train a round for each line on standard input.

    Args:
        path: The `.npz` file of the images.
        rows: Number of training rows of all clients.
        per_round: Number of clients per round.
        device: The torch device.
    """
    torch.manual_seed(0)
    with np.load(path) as arrays:
        images = torch.from_numpy(arrays["train_images"][:rows])
        labels = torch.from_numpy(arrays["train_labels"][:rows].astype(np.int64))
    images = images.permute(0, 3, 1, 2).float()
    images = (images - images.mean((0, 2, 3), True)) / images.std((0, 2, 3), keepdim=True)
    images, labels = images.contiguous().to(device), labels.flatten().to(device)
    loop = BareLoop(images, labels, per_round)
    for _ in sys.stdin:
        started = time.perf_counter()
        loop.run_round()
        if images.is_cuda:
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
