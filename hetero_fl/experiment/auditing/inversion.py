"""Gradient inversion: images from what a step on them changed.

Three means: labels read off the head's gradient (iDLG, Zhao et al. 2020); the exact input of a fully connected first layer
(Phong et al. 2018; Geiping et al. 2020, proposition 3.1); and the image whose gradient points where the upload does, found by
descent on 1 − cosine + total variation (Geiping et al. 2020, eq. 4).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.architecture import Tensors
from hetero_fl.data import Preprocess
from hetero_fl.data.resampled import as_made
from hetero_fl.experiment.auditing.likeness import likeness, matched
from hetero_fl.experiment.auditing.upload import Upload, upload
from hetero_fl.experiment.prepared import Prepared
from hetero_fl.nets import Batch, Net, Nets
from hetero_fl.seeding import Key, generator
from model_zoo import SplitModel

STEPS, RATE = 800, 0.1
SMOOTH = (0.01, 0.05, 0.2)  # weights of the total variation: a beginning for each
Protect = Callable[[Tensors], Tensors]
Say = Callable[[str], None]
ENOUGH = 1e-3  # of the cosine's distance: no further beginning is tried


class Inverter:
    """One upload, and the descent towards the images behind it. Images are in 0..1 here, as people look at them.

    Args:
        seen: from pixels in 0..1, `[B, *shape]`, to what the model takes.
    """

    def __init__(self, upload: Upload, labels: Tensor, seen: Callable[[Tensor], Tensor]) -> None:
        self.upload, self.labels, self.seen = upload, labels, seen
        with torch.random.fork_rng(devices=[]):
            self.module: SplitModel = upload.arch.build()
        counters = {n: t for n, t in self.module.state_dict().items() if n not in upload.model}
        self.module.load_state_dict({**counters, **upload.model})
        self.module.train()
        for layer in self.module.modules():
            if isinstance(layer, nn.modules.dropout._DropoutNd):
                layer.eval()  # nobody else knows what was dropped
        named = dict(self.module.named_parameters())
        self.parameters = [named[n] for n in upload.gradient]
        self.wanted = torch.cat([g.flatten() for g in upload.gradient.values()])
        self.nets = Nets({"model": Net.live(self.module)})

    def distance(self, pixels: Tensor, through: bool = False) -> Tensor:
        """1 − cosine of the angle between the gradient of these images and the upload's; differentiable if asked for."""
        batch = Batch(x=self.seen(pixels), y=self.labels)
        loss = self.upload.objective.total(self.nets, batch, self.upload.given)
        found = torch.autograd.grad(loss, self.parameters, create_graph=through, allow_unused=True)
        flat = torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for g, p in zip(found, self.parameters, strict=True)
            ]
        )
        return 1 - F.cosine_similarity(flat, self.wanted, dim=0, eps=1e-12)

    def descend(self, start: Tensor, smooth: float = SMOOTH[0], steps: int = STEPS) -> Tensor:
        """Adam on the sign of the gradient, its rate lowered three times (Geiping et al. 2020, section 5)."""
        pixels = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([pixels], lr=RATE)
        marks = [int(steps * part) for part in (3 / 8, 5 / 8, 7 / 8)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, marks, gamma=0.1)
        best, least = start, math.inf
        for _ in range(steps):
            cost = self.distance(pixels, through=True) + smooth * variation(pixels)
            if float(cost.detach()) < least:
                best, least = pixels.detach().clone(), float(cost.detach())
            (slope,) = torch.autograd.grad(cost, [pixels])
            pixels.grad = slope.sign()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                pixels.clamp_(0, 1)
        return best

    def search(self, shape: tuple[int, ...], *key: Key, steps: int = STEPS) -> tuple[Tensor, float]:
        """The best images of several beginnings, `[B, *shape]`, and their distance; beginnings are drawn by the key.

        How smooth images are is not known beforehand: each beginning takes another weight, and the upload decides.
        """
        found: list[tuple[float, Tensor]] = []
        exact = first_layer_input(self.module, self.upload.gradient) if len(self.labels) == 1 else None
        if exact is not None:
            low, high = (self.seen(torch.full((1, *shape), value)).flatten() for value in (0.0, 1.0))
            pixels = ((exact - low) / (high - low)).reshape(1, *shape).clamp(0, 1)
            found.append((float(self.distance(pixels)), pixels))
        for smooth in SMOOTH:
            if found and min(found, key=lambda f: f[0])[0] < ENOUGH:
                break
            start = torch.rand(len(self.labels), *shape, generator=generator(*key, str(smooth)))
            pixels = self.descend(start, smooth, steps)
            found.append((float(self.distance(pixels)), pixels))
        least, best = min(found, key=lambda f: f[0])
        return best, least


def read_labels(upload: Upload, kind: str) -> Tensor | None:
    """The label of a batch of one, `[1]` (classes) or `[1, C]`, off the head's bias: cross-entropy's gradient is p − y there,
    below nought only where y is. None where the head's bias does not travel, or there are no labels to read."""
    if kind == "regression":
        return None
    outputs = upload.arch.outputs
    biases = [g for n, g in upload.gradient.items() if n.startswith("head.") and tuple(g.shape) == (outputs,)]
    if not biases:
        return None
    return biases[-1].argmin()[None] if kind == "multiclass" else (biases[-1] < 0)[None].to(biases[-1].dtype)


def first_layer_input(module: nn.Module, gradient: Tensors) -> Tensor | None:
    """The input of a batch of one to a model whose first layer is fully connected, flat: of any of its units, the weights'
    gradient over the bias's. None for other models."""
    first = next(
        ((n, m) for n, m in module.named_modules() if next(m.parameters(recurse=False), None) is not None), None
    )
    if first is None or not isinstance(first[1], nn.Linear):
        return None
    weight, bias = (gradient.get(f"{first[0]}.{part}") for part in ("weight", "bias"))
    if weight is None or bias is None or not bool(bias.any()):
        return None
    unit = int(bias.abs().argmax())
    return weight[unit] / bias[unit]


def variation(pixels: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, of images `[B, C, H, W]`."""
    return (pixels.diff(dim=-1).abs().mean() + pixels.diff(dim=-2).abs().mean()).nan_to_num()


@dataclass(frozen=True)
class Inverted:
    """One step inverted: images in 0..1, `[B, C, H, W]`, true, found by way, and guessed without the upload; figures by way."""

    true: Tensor
    found: dict[str, Tensor]
    blind: Tensor
    rows: list[dict[str, Any]]


def invert(
    ways: Mapping[str, tuple[Prepared, Protect | None]], client: str, images: int, batch: int, seed: int, say: Say
) -> Iterator[Inverted]:
    """So many steps of a client on keyed draws of its training rows, each inverted from what arrives in each way.

    Labels are read off the upload where that can be done, and else known. The blind guess is the mean image of the common
    test set: what needs no upload.
    """
    prepared, _ = next(iter(ways.values()))
    data, view = prepared.data, prepared.federation.cards[client].preprocess
    train = data.columns(client, "train", view)
    low, high = _ends(as_made(data, client, ["train"]).x, view)
    guess = data.columns(client, "common_test", view)["x"].mean(0, keepdim=True)

    def pixels(x: Tensor) -> Tensor:
        return (x - low) / (high - low)

    for number in range(images):
        rows = _drawn(train["y"], batch, "audit", seed, "inversion", client, number)
        true, blind = pixels(train["x"][rows]), pixels(guess).expand(len(rows), -1, -1, -1)
        figures, found = [{"way": "blind", **likeness(blind, true)}], {}
        for way, (setting, protect) in ways.items():
            begun = time.perf_counter()
            given = upload(setting, client, rows, protect)
            read = read_labels(given, data.task.kind) if len(rows) == 1 else None
            labels = train["y"][rows] if read is None else read
            inverter = Inverter(given, labels, lambda p: low + p * (high - low))
            best, distance = inverter.search(tuple(true.shape[1:]), "audit", seed, "start", client, number)
            found[way] = matched(best, true)
            known = "known" if read is None else "read" if bool((read == train["y"][rows]).all()) else "misread"
            figures.append(
                {"way": way, **likeness(found[way], true), "distance": distance, "label": known,
                 "seconds": time.perf_counter() - begun}
            )  # fmt: skip
            say(f"{client}, step {number + 1} of {images}, {way}: PSNR {figures[-1]['psnr']:.1f} dB")
        yield Inverted(true, found, blind, figures)


def _ends(x: Tensor, view: Preprocess) -> tuple[Tensor, Tensor]:
    """Black and white as a client's model sees them, `[1, C, H, W]` each."""
    white = 255.0 if x.dtype == torch.uint8 else max(1.0, float(x.max()))
    black = min(0.0, float(x.min()))
    return view(torch.full_like(x[:1], black)), view(torch.full_like(x[:1], white))


def _drawn(y: Tensor, count: int, *key: Key) -> Tensor:
    """So many rows, of as many classes as can be."""
    order = torch.randperm(len(y), generator=generator(*key))
    if y.ndim > 1:
        return order[:count]
    seen: Counter[int] = Counter()
    turn = []
    for row in order.tolist():
        turn.append((seen[int(y[row])], row))
        seen[int(y[row])] += 1
    ranked = sorted(range(len(turn)), key=lambda i: turn[i][0])  # stable: the first of each class, then the second
    return torch.tensor([turn[i][1] for i in ranked[:count]])
