"""Gradient inversion: reconstruct examples from one upload."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import upload_part
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.objectives import Batch, Context, ModelView, ModelViews, Objective
from hetero_fl.core.participant import Participant, copy_tensors
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Fit, Plan, Rows, Step
from hetero_fl.data import Preprocess
from hetero_fl.data.federated_data import unprocessed_rows
from hetero_fl.experiment.preparation import PreparedRun
from hetero_fl.experiment.runner import load_inherited_models
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import Key, keyed_generator
from model_zoo import SplitModel

# How like two images are, and which of several is which. Images are in 0..1.


def image_similarity(found: Tensor, true: Tensor) -> dict[str, float]:
    """PSNR and SSIM, the mean over a step's images."""
    pairs = list(zip(found, true, strict=True))
    return {
        "psnr": sum(psnr(a, b) for a, b in pairs) / len(pairs),
        "ssim": sum(ssim(a, b) for a, b in pairs) / len(pairs),
    }


def psnr(found: Tensor, true: Tensor) -> float:
    """Peak signal-to-noise ratio of images in 0..1, dB; at most 100."""
    return float(-10 * (found - true).square().mean().clamp(min=1e-10).log10())


def ssim(found: Tensor, true: Tensor, window: int = 7) -> float:
    """Structural similarity of images `[C, H, W]` in 0..1, the mean over windows (Wang et al. 2004, eq. 13); 1 for equal ones."""
    window = min(window, *true.shape[-2:])
    a = found[None].double()
    b = true[None].double()

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    n = window**2 / (window**2 - 1)
    ma = mean(a)
    mb = mean(b)
    va, vb, both = (
        n * (mean(x * y) - p * q) for x, y, p, q in ((a, a, ma, ma), (b, b, mb, mb), (a, b, ma, mb))
    )
    c1 = 0.01**2
    c2 = 0.03**2
    return float(
        ((2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()
    )


def match_order(found: Tensor, true: Tensor) -> Tensor:
    """The reconstructions in the order of the originals that they are nearest to: a sum over the batch has no order."""
    cost = (found[:, None] - true[None]).square().flatten(2).mean(2)
    turns = permutations(range(len(true)))
    best = min(turns, key=lambda turn: float(sum(cost[i, j] for j, i in enumerate(turn))))
    return found[list(best)]


# What the server holds of one client after a single step on a few rows: made by the run's own
# machinery, not imitated.

MODEL = "model"


@dataclass(frozen=True)
class ObservedUpload:
    """What an attacker at the server starts from.

    `model` are the tensors at which the step was taken, as far as they travelled those that the server sent, and else the
    initial ones; `gradient` is what the upload gives away of the loss's gradient, parameters only; `objective` and `context` are
    the client's loss, which the attacker is granted.
    """

    arch: ModelSpec
    model: Tensors
    gradient: Tensors
    objective: Objective
    context: Context


class SingleStepMethod:
    """A method whose clients take a single step of SGD on some of their training rows; all else is the method's own."""

    def __init__(self, method: Algorithm, rows: Tensor, rate: float) -> None:
        self.method = method
        self.rows = rows
        self.rate = rate
        self.rounds: list[
            list[Fit]
        ] = []  # the fits of each time that it was carried out, the server's dry runs included

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def train(self, client: Participant, received: Payload) -> Plan[Any]:
        """The method's round of a client, its fits on own rows cut to one step."""
        plan = self.method.train(client, received)
        answer = None
        self.rounds.append([])
        while True:
            try:
                asked = plan.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = (
                yield [self._limit_step(s) for s in asked]
                if isinstance(asked, list)
                else self._limit_step(asked)
            )

    def _limit_step(self, step: Step) -> Step:
        if not (
            isinstance(step, Fit) and isinstance(step.data, Rows) and step.data.name == "train"
        ):
            return step
        beside = {name: column[self.rows] for name, column in step.data.extra_columns.items()}
        data = replace(step.data, rows=self.rows, extra_columns=beside)
        short = replace(
            step, data=data, epochs=1, steps=1, batch_size=len(self.rows), augment=None, anneal=False, keep=None, drift={},
            optimizer=OptimizerConfig(name="sgd", lr=self.rate),
        )  # fmt: skip
        self.rounds[-1].append(short)
        return short


def reason_not_invertible(prepared: PreparedRun, client: str) -> str | None:
    """Why no image can be sought in this client's upload; None if one can."""
    method = prepared.method
    client_info = prepared.federation.client_infos[client]
    spec = method.uploads.get(MODEL)
    shape = client_info.arch.input_shape
    sends = upload_part(method, client_info.settings, client_info.settings.share_every - 1) != ()
    if spec is None or spec.kind != "params" or not method.needs.counts_traffic or not sends:
        return f"{prepared.name}: '{client}' sends no parameters of its model; there is no gradient to invert"
    if prepared.data.vocabulary is not None:
        return f"{prepared.data.name}: examples are tokens; inversion is for images"
    if len(shape) != 3:
        return f"{prepared.data.name}: '{client}' sees examples of shape {shape}; inversion is for images"
    return None


def observe_upload(
    prepared: PreparedRun,
    client: str,
    rows: Tensor,
    protect: Callable[[Tensors], Tensors] | None = None,
) -> ObservedUpload:
    """What arrives from a client that has taken one step on these of its training rows (int64 `[B]`), in the first round in
    which it sends, with whatever the run does to an upload on its way.

    Args:
        protect: what becomes of the update (sent minus received) besides, by a function of one's own.

    Raises:
        UserError: no update came of the step.
    """
    client_info = prepared.federation.client_infos[client]
    rate = client_info.settings.optimizer.lr
    index = client_info.settings.share_every - 1
    method = SingleStepMethod(prepared.method, rows, rate)
    runtime = prepared.config.runtime.model_copy(
        update={"executor": "serial", "device": "cpu", "precision": "float32"}
    )
    config = prepared.config.model_copy(update={"runtime": runtime})
    trainer = replace(prepared, config=config, method=cast(Algorithm, method)).make_trainer()
    try:
        load_inherited_models(prepared.inherited, trainer)
        received, sent = trainer.request_upload(client, index)
    finally:
        trainer.executor.close()
    fits = [fit for fit in method.rounds[0] if MODEL in fit.train]
    if MODEL not in sent or not fits:
        raise UserError(
            f"--clients: '{client}' sends nothing of a step on its own rows under {prepared.name}"
        )
    before = copy_tensors(prepared.federation.initial_tensors(client_info.arch))
    before |= received.get(MODEL, {})
    update = {
        n: t - before[n] for n, t in sent[MODEL].items() if n in client_info.arch.parameter_names
    }
    if protect is not None:
        update = protect(update)
    gradient = {n: -t / rate for n, t in update.items()}
    if not any(bool(g.any()) for g in gradient.values()):
        raise UserError(
            f"--clients: '{client}': the upload tells nothing of the step; all of the update is nought"
        )
    return ObservedUpload(client_info.arch, before, gradient, fits[-1].objective, fits[-1].context)


# Gradient inversion: images from what a step on them changed.
#
# Three means: labels read off the head's gradient (iDLG, Zhao et al. 2020); the exact input of a
# fully connected first layer (Phong et al. 2018; Geiping et al. 2020, proposition 3.1); and the
# image whose gradient points where the upload does, found by descent on 1 − cosine + total
# variation (Geiping et al. 2020, eq. 4).

STEPS = 800
RATE = 0.1
SMOOTH = (0.01, 0.05, 0.2)  # weights of the total variation: a beginning for each
Protect = Callable[[Tensors], Tensors]
Say = Callable[[str], None]
ENOUGH = 1e-3  # of the cosine's distance: no further beginning is tried


class Inverter:
    """One upload, and the descent towards the images behind it. Images are in 0..1 here, as people look at them.

    Args:
        view: from pixels in 0..1, `[B, *shape]`, to what the model takes.
    """

    def __init__(
        self, upload: ObservedUpload, labels: Tensor, view: Callable[[Tensor], Tensor]
    ) -> None:
        self.upload = upload
        self.labels = labels
        self.seen = view
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
        self.nets = ModelViews({"model": ModelView.from_module(self.module)})

    def distance(self, pixels: Tensor, preprocess: bool = False) -> Tensor:
        """1 − cosine of the angle between the gradient of these images and the upload's; differentiable if asked for."""
        batch = Batch(x=self.seen(pixels), y=self.labels)
        loss = self.upload.objective.total_loss(self.nets, batch, self.upload.context)
        found = torch.autograd.grad(
            loss, self.parameters, create_graph=preprocess, allow_unused=True
        )
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
        best = start
        least = math.inf
        for _ in range(steps):
            cost = self.distance(pixels, preprocess=True) + smooth * total_variation(pixels)
            if float(cost.detach()) < least:
                best = pixels.detach().clone()
                least = float(cost.detach())
            (slope,) = torch.autograd.grad(cost, [pixels])
            pixels.grad = slope.sign()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                pixels.clamp_(0, 1)
        return best

    def invert_from_starts(
        self, shape: tuple[int, ...], *key: Key, steps: int = STEPS
    ) -> tuple[Tensor, float]:
        """The best images of several beginnings, `[B, *shape]`, and their distance; beginnings are drawn by the key.

        How smooth images are is not known beforehand: each beginning takes another weight, and the upload decides.
        """
        found: list[tuple[float, Tensor]] = []
        exact = (
            first_layer_input(self.module, self.upload.gradient) if len(self.labels) == 1 else None
        )
        if exact is not None:
            low, high = (
                self.seen(torch.full((1, *shape), value)).flatten() for value in (0.0, 1.0)
            )
            pixels = ((exact - low) / (high - low)).reshape(1, *shape).clamp(0, 1)
            found.append((float(self.distance(pixels)), pixels))
        for smooth in SMOOTH:
            if found and min(found, key=lambda f: f[0])[0] < ENOUGH:
                break
            start = torch.rand(
                len(self.labels), *shape, generator=keyed_generator(*key, str(smooth))
            )
            pixels = self.descend(start, smooth, steps)
            found.append((float(self.distance(pixels)), pixels))
        least, best = min(found, key=lambda f: f[0])
        return best, least


def read_labels(upload: ObservedUpload, kind: str) -> Tensor | None:
    """The label of a batch of one, `[1]` (classes) or `[1, C]`, off the head's bias: cross-entropy's gradient is p − y there,
    below nought only where y is. None where the head's bias does not travel, or there are no labels to read."""
    if kind == "regression":
        return None
    outputs = upload.arch.outputs
    biases = [
        g
        for n, g in upload.gradient.items()
        if n.startswith("head.") and tuple(g.shape) == (outputs,)
    ]
    if not biases:
        return None
    return (
        biases[-1].argmin()[None]
        if kind == "multiclass"
        else (biases[-1] < 0)[None].to(biases[-1].dtype)
    )


def first_layer_input(module: nn.Module, gradient: Tensors) -> Tensor | None:
    """The input of a batch of one to a model whose first layer is fully connected, flat: of any of its units, the weights'
    gradient over the bias's. None for other models."""
    first = next(
        (
            (n, m)
            for n, m in module.named_modules()
            if next(m.parameters(recurse=False), None) is not None
        ),
        None,
    )
    if first is None or not isinstance(first[1], nn.Linear):
        return None
    weight, bias = (gradient.get(f"{first[0]}.{part}") for part in ("weight", "bias"))
    if weight is None or bias is None or not bool(bias.any()):
        return None
    unit = int(bias.abs().argmax())
    return weight[unit] / bias[unit]


def total_variation(pixels: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, of images `[B, C, H, W]`."""
    return (pixels.diff(dim=-1).abs().mean() + pixels.diff(dim=-2).abs().mean()).nan_to_num()


@dataclass(frozen=True)
class InvertedBatch:
    """One step inverted: images in 0..1, `[B, C, H, W]`, true, found by way, and guessed without the upload; figures by way."""

    true: Tensor
    found: dict[str, Tensor]
    blind: Tensor
    rows: list[dict[str, Any]]


def invert(
    ways: Mapping[str, tuple[PreparedRun, Protect | None]],
    client: str,
    images: int,
    batch: int,
    seed: int,
    say: Say,
) -> Iterator[InvertedBatch]:
    """So many steps of a client on keyed draws of its training rows, each inverted from what arrives in each way.

    Labels are read off the upload where that can be done, and else known. The blind guess is the mean image of the common
    test set: what needs no upload.
    """
    prepared, _ = next(iter(ways.values()))
    data = prepared.data
    view = prepared.federation.client_infos[client].preprocess
    train = data.columns(client, "train", view)
    low, high = _value_range(unprocessed_rows(data, client, ["train"]).x, view)
    guess = data.columns(client, "common_test", view)["x"].mean(0, keepdim=True)

    def pixels(x: Tensor) -> Tensor:
        return (x - low) / (high - low)

    for number in range(images):
        rows = _draw_rows(train["y"], batch, "audit", seed, "inversion", client, number)
        true = pixels(train["x"][rows])
        blind = pixels(guess).expand(len(rows), -1, -1, -1)
        figures = [{"way": "blind", **image_similarity(blind, true)}]
        found = {}
        for way, (setting, protect) in ways.items():
            begun = time.perf_counter()
            given = observe_upload(setting, client, rows, protect)
            read = read_labels(given, data.task.kind) if len(rows) == 1 else None
            labels = train["y"][rows] if read is None else read
            inverter = Inverter(given, labels, lambda p: low + p * (high - low))
            best, distance = inverter.invert_from_starts(
                tuple(true.shape[1:]), "audit", seed, "start", client, number
            )
            found[way] = match_order(best, true)
            known = (
                "known"
                if read is None
                else "read"
                if bool((read == train["y"][rows]).all())
                else "misread"
            )
            figures.append(
                {"way": way, **image_similarity(found[way], true), "distance": distance, "label": known,
                 "seconds": time.perf_counter() - begun}
            )  # fmt: skip
            say(
                f"{client}, step {number + 1} of {images}, {way}: PSNR {figures[-1]['psnr']:.1f} dB"
            )
        yield InvertedBatch(true, found, blind, figures)


def _value_range(x: Tensor, view: Preprocess) -> tuple[Tensor, Tensor]:
    """Black and white as a client's model sees them, `[1, C, H, W]` each."""
    white = 255.0 if x.dtype == torch.uint8 else max(1.0, float(x.max()))
    black = min(0.0, float(x.min()))
    return view(torch.full_like(x[:1], black)), view(torch.full_like(x[:1], white))


def _draw_rows(y: Tensor, count: int, *key: Key) -> Tensor:
    """Return the indices of `count` rows drawn by the key, from as many classes as possible."""
    import pandas as pd  # slow to load

    order = torch.randperm(len(y), generator=keyed_generator(*key))
    if y.ndim > 1:
        return order[:count]
    labels = pd.Series(y[order].numpy())
    turn = labels.groupby(labels).cumcount().to_numpy()
    # the first row of each class, then the second
    return order[turn.argsort(kind="stable")[:count]]
